"""A digest of every array, computed where it lies: the same on every mesh and for every number of processes.

Each element's bits are mixed with its index, dimension by dimension, and all are added modulo 2^32, in two lanes.
Mixing is a bijection of the bits, so that one changed element always changes the sum.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

LANES = ((0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F))
"""Per lane an odd multiplier of the bits and one of the indices (xxHash's primes, Collet)."""
BLOCK = 2**20
"""Elements digested at a time."""


def digests(arrays: Mapping[str, jax.Array]) -> tuple[dict[str, str], list[str]]:
    """(16 hexadecimal digits for each array, names of those that hold a number that is not finite).

    The devices compute; what comes to the host are three words per array.
    """
    words = jax.device_get({name: _digest(x.sharding)(x) for name, x in arrays.items()})
    found = {name: f"{int(w[0]):08x}{int(w[1]):08x}" for name, w in words.items()}
    return found, [name for name, w in words.items() if w[2]]


@lru_cache
def _digest(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    """A function from an array so sharded to uint32 (lane, lane, elements that are not finite).

    Each device digests its part; parts are added over the axes that split the array, and only those. Compiled once
    per shape: a weight and its moments share it.
    """
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return jax.jit(lambda x: _words(x, (0,) * x.ndim))

    spec = sharding.spec

    def run(x: jax.Array) -> jax.Array:
        split = [_axes(part) for part in spec]
        split += [()] * (x.ndim - len(split))
        offsets = tuple(_index(axes) * jnp.uint32(size) for axes, size in zip(split, x.shape, strict=True))
        words = _words(x, offsets)
        axes = tuple(axis for group in split for axis in group)
        return lax.psum(words, axes) if axes else words

    mapped = jax.shard_map(run, mesh=sharding.mesh, in_specs=spec, out_specs=P(), check_vma=False)
    return jax.jit(mapped)


def _axes(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _index(axes: tuple[str, ...]) -> jax.Array:
    return lax.axis_index(axes).astype(jnp.uint32) if axes else jnp.uint32(0)


def _words(x: jax.Array, offsets: tuple[jax.Array | int, ...]) -> jax.Array:
    """Of an array whose index begins at these offsets. In blocks of rows: what is computed is never held whole."""
    lead, columns = (x.shape[:-1], x.shape[-1]) if x.ndim > 1 else (x.shape, 1)
    count = math.prod(lead)
    assert count < 2**32
    if x.size == 0:
        return jnp.zeros(len(LANES) + 1, jnp.uint32)
    x_RC = x.reshape(count, columns)
    rows = max(1, min(count, BLOCK // max(1, columns)))

    def block(i: jax.Array | int, words: jax.Array) -> jax.Array:
        first = jnp.uint32(i) * np.uint32(rows)
        start = jnp.minimum(first, np.uint32(count - rows))  # the last block reaches back, and counts those rows once
        row_R = start + jnp.arange(rows, dtype=jnp.uint32)
        part_RC = lax.dynamic_slice_in_dim(x_RC, start, rows)
        index: list[jax.Array] = []
        for d in range(len(lead)):
            size, stride = np.uint32(lead[d]), np.uint32(math.prod(lead[d + 1 :]))
            index.append((row_R // stride % size)[:, None])
        if x.ndim > 1:
            index.append(jnp.arange(columns, dtype=jnp.uint32)[None])
        index = [i + jnp.asarray(offset, jnp.uint32) for i, offset in zip(index, offsets, strict=True)]
        return words + _block_words(part_RC, index, (row_R >= first)[:, None])

    zero = jnp.zeros(len(LANES) + 1, jnp.uint32)
    blocks = -(-count // rows)
    return block(0, zero) if blocks == 1 else lax.fori_loop(0, blocks, block, zero)


def _block_words(x_RC: jax.Array, index: list[jax.Array], counted_R1: jax.Array) -> jax.Array:
    bits_RC = _bits(x_RC)
    finite = jnp.isfinite(x_RC) if jnp.issubdtype(x_RC.dtype, jnp.inexact) else jnp.ones((), bool)
    words = []
    for lane, (by_bits, by_index) in enumerate(LANES):
        place = jnp.full((1, 1), lane + 1, jnp.uint32)
        for d, i in enumerate(index):
            place = place + _mix(i * np.uint32(by_index) + np.uint32(d * 2 + lane + 1))
        words.append(jnp.where(counted_R1, _mix((bits_RC * np.uint32(by_bits)) ^ place), 0))
    words.append(jnp.where(counted_R1, (~finite).astype(jnp.uint32), 0))
    return jnp.stack([jnp.sum(word, dtype=jnp.uint32) for word in words])


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer (Appleby): a bijection of 32 bits in which each bit of input moves half of the output."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _bits(x: jax.Array) -> jax.Array:
    """The elements' bits as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, words).astype(jnp.uint32)
