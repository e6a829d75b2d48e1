"""Counter-based random bits: elementwise over index arrays, so any shard or kernel block makes its own."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Words: TypeAlias = tuple[jax.Array, jax.Array]
Word: TypeAlias = jax.Array | np.uint32

_ROTATIONS = np.array([[13, 15, 26, 6], [17, 29, 16, 24]], np.uint32)
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(key: tuple[Word, Word], counter: tuple[Word, Word]) -> Words:
    """Twenty rounds of Threefry on uint32 words that broadcast against each other.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the same function as
    JAX's default generator.
    """
    k0, k1, x0, x1 = jnp.broadcast_arrays(*key, *counter)
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    start = (x0 + k0, x1 + k1, *keys)
    # XLA's CPU compiler does not end on the unrolled rounds once they are fused with their consumers.
    return lax.platform_dependent(*start, cpu=_rolled, default=_unrolled)


def _block(x0, x1, inject0, inject1, rotations, number):
    for rotation in rotations:
        x0 = x0 + x1
        x1 = (x1 << rotation) | (x1 >> (np.uint32(32) - rotation))
        x1 = x0 ^ x1
    return x0 + inject0, x1 + inject1 + number


def _unrolled(x0, x1, k0, k1, k2):
    keys = (k0, k1, k2)
    for i in range(5):
        x0, x1 = _block(x0, x1, keys[(i + 1) % 3], keys[(i + 2) % 3], _ROTATIONS[i % 2], np.uint32(i + 1))
    return x0, x1


def _rolled(x0, x1, k0, k1, k2):
    def body(i, carry):
        x0, x1, k0, k1, k2, now, later = carry
        x0, x1 = _block(x0, x1, k1, k2, [now[j] for j in range(4)], i.astype(np.uint32) + np.uint32(1))
        return x0, x1, k1, k2, k0, later, now

    return lax.fori_loop(0, 5, body, (x0, x1, k0, k1, k2, *map(jnp.asarray, _ROTATIONS)))[:2]


def keep_mask(rate: float, key: Words, counter: Words) -> jax.Array:
    """True with probability 1 - rate, per element of the broadcast counters."""
    bits, _ = threefry2x32(key, counter)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
