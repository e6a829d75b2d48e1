"""Which tiles the TPU kernels visit, as one flat int32 array for scalar memory, and how large the tiles are."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.visible import FULL, Ranges, Tiles

LANES = 128
TERM = 20
"""Bit of a tile's code that says that term 0 is active in it; the tile's index is below."""
MOST_TERMS = 10
"""That fit above it, below `FULL`."""
SMEM_BYTES = 768 * 1024
"""What lists may take of the 1 MiB of scalar memory; the compiler, double buffers and other calls have the rest."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tiles of the three kernels: queries and keys, multiples of 128. Shorter sequences take smaller ones."""

    forward_query: int = 512
    forward_key: int = 512
    dq_query: int = 512
    dq_key: int = 512
    dkv_query: int = 512
    dkv_key: int = 512
    interpret: Any = False
    """For tests without a TPU: True (the HLO interpreter) or `pltpu.InterpretParams`."""

    def __post_init__(self):
        for name in ("forward_query", "forward_key", "dq_query", "dq_key", "dkv_query", "dkv_key"):
            if (size := getattr(self, name)) < LANES or size % LANES:
                raise ValueError(f"{name}={size} is no multiple of {LANES}; try {LANES * max(1, round(size / LANES))}.")


MIB = 2**20
# Scoped VMEM that a kernel gets by default. Raising it is possible (not on v5p above 64 MiB) but takes it from XLA.
VMEM_BYTES = {"TPU v6": 32 * MIB, "TPU7x": 32 * MIB}
VMEM_BYTES_ELSEWHERE = 16 * MIB


def vmem_limit_bytes(device_kind: str) -> int:
    """Scoped VMEM of one kernel on chips that name themselves `device_kind`, e.g. TPU v5 lite, TPU v5, TPU v6e."""
    return next((size for kind, size in VMEM_BYTES.items() if device_kind.startswith(kind)), VMEM_BYTES_ELSEWHERE)


def largest_sizes(
    device_kind: str, head_size: int, value_size: int, itemsize: int, *, softcap: bool = False, most: int = 1024
) -> Sizes:
    """The largest tiles, none above `most`, whose estimated VMEM stays inside the chip's default limit.

    Unmeasured on chips: ordered by the work per grid step, which has to hide the step's overhead (about 0.35 us). Bytes
    per score are what the compilers for v5e took, rounded up: they keep much of a tile's arithmetic in registers.
    """
    limit = vmem_limit_bytes(device_kind)
    slope = 4 if softcap else 0

    def largest(estimate: Callable[[int, int], int]) -> tuple[int, int]:
        choices = [(1024, 1024), (1024, 512), (512, 1024), (512, 512), (512, 256), (256, 256), (256, 128)]
        return next(((q, k) for q, k in choices if max(q, k) <= most and estimate(q, k) <= limit), (LANES, LANES))

    def operands(q: int, k: int) -> int:
        return 2 * (_lanes(head_size) + _lanes(value_size)) * itemsize * (q + k)

    def forward(q: int, k: int) -> int:
        return operands(q, k) + q * value_size * (4 + 2 * itemsize) + q * k * (itemsize + 2)

    def dq(q: int, k: int) -> int:
        return operands(q, k) + q * head_size * (4 + 2 * itemsize) + q * k * (itemsize + 4 + slope)

    def dkv(q: int, k: int) -> int:
        sums = k * (_lanes(head_size) + _lanes(value_size)) * (4 + 2 * itemsize)
        return operands(q, k) + sums + q * k * (2 * itemsize + 4 + slope)

    names = ("forward_query", "forward_key", "dq_query", "dq_key", "dkv_query", "dkv_key")
    return Sizes(**dict(zip(names, (*largest(forward), *largest(dq), *largest(dkv)), strict=True)))


def _lanes(size: int) -> int:
    return math.ceil(size / LANES) * LANES


class Plan(NamedTuple):
    """For each outer tile the inner tiles that it visits, in scalar memory."""

    words: jax.Array
    """By mask row and outer tile. Ranges: start, count, full_start, full_stop. Lists: counts, then codes of `width`."""
    steps: jax.Array
    """The longest visit, at least 1: the grid is no longer than it has to be."""
    batch: int
    """Rows of the mask: 1 where it does not depend on the sequence."""
    outer: int
    width: int | None
    """Length of a list; None for ranges."""

    @property
    def size(self) -> int:
        return self.words.shape[0]

    def row(self, b, i):
        return (b if self.batch > 1 else 0) * self.outer + i

    def visit(self, words_ref, b, i, j):
        """(whether there is a j-th tile, its index or that of the last one, its code) of outer tile i."""
        row = self.row(b, i)
        if self.width is None:
            start, count, full_start, full_stop = (words_ref[4 * row + field] for field in range(4))
            tile = start + jnp.minimum(j, jnp.maximum(count - 1, 0))
            full = (full_start <= tile) & (tile < full_stop)
            return j < count, tile, jnp.where(full, FULL, 1 << TERM)
        word = words_ref[self.batch * self.outer + row * self.width + jnp.minimum(j, self.width - 1)]
        return j < words_ref[row], word & ((1 << TERM) - 1), word


def range_plan(ranges: Ranges, tiles: int) -> Plan:
    """Visits of contiguous tiles out of so many, those in the middle in full."""
    batch, outer = ranges.start.shape
    start = jnp.minimum(ranges.start, tiles - 1)  # where nothing is visited it may lie behind the last tile
    words = jnp.stack([start, ranges.stop - ranges.start, ranges.full_start, ranges.full_stop], axis=-1)
    return Plan(words.astype(jnp.int32).reshape(-1), _steps(ranges.stop - ranges.start), batch, outer, None)


def list_plan(tiles: Tiles) -> Plan:
    """Visits of listed tiles. A word is a tile's code and its index."""
    batch, outer, width = tiles.index_BQJ.shape
    word_BQJ = (tiles.code_BQJ & FULL) | ((tiles.code_BQJ & ~FULL) << TERM) | tiles.index_BQJ
    words = jnp.concatenate([tiles.count_BQ.reshape(-1), word_BQJ.reshape(-1)]).astype(jnp.int32)
    return Plan(words, _steps(tiles.count_BQ), batch, outer, width)


def _steps(counts: jax.Array) -> jax.Array:
    return jnp.maximum(counts.max(), 1).astype(jnp.int32)


def fit(size: int, length: int, blocks: Iterable[int] = ()) -> int:
    """The tile for a sequence of this length: at most its padding to whole lanes, and a divisor of patterns' blocks."""
    return math.gcd(size, *blocks) if blocks else min(size, _lanes(length))


def pad_to(x: jax.Array, axis: int, multiple: int, value: float | int = 0) -> jax.Array:
    """x with `axis` filled up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (0, missing, 0)
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)
