"""A mask as kernels see it: intervals of keys per query and of queries per key, and which tiles to visit."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.patterns import Pattern

MOST_TERMS = 30
"""Of a mask that is lowered to lists of tiles: one bit each in a tile's code."""
FULL = 1 << MOST_TERMS
"""In the code of a tile: every query of it sees every key of it."""


class Ranges(NamedTuple):
    """Tiles to visit, per tile of the other side, all int32_BQ: [start, stop); none of [full_start, full_stop) needs
    the element mask. start <= full_start <= full_stop <= stop."""

    start: jax.Array
    full_start: jax.Array
    full_stop: jax.Array
    stop: jax.Array


class Tiles(NamedTuple):
    """Tiles to visit, per tile of the other side, as lists."""

    index_BQJ: jax.Array
    """int32: which; behind `count_BQ` of them the last is repeated."""
    code_BQJ: jax.Array
    """int32: bit r: term r shows something in this tile; `FULL`: some term shows all of it."""
    count_BQ: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("first_RBT", "last_RBT", "qfirst_RBS", "qlast_RBS"),
    meta_fields=("patterns",),
)
@dataclass(frozen=True)
class Visible:
    """Query t sees key s iff for some term r: first_RBT <= s <= last_RBT, and pattern r, if any, has their blocks.

    All int32; B is 1 where rows do not differ. `qfirst` and `qlast` say the same by key: qfirst_RBS <= t <= qlast_RBS.
    None of the four ever decreases along its last dimension.
    """

    first_RBT: jax.Array
    last_RBT: jax.Array
    qfirst_RBS: jax.Array
    qlast_RBS: jax.Array
    patterns: tuple[frozenset[Pattern], ...]

    @property
    def is_interval(self) -> bool:
        """One term without a pattern: `ranges` say all."""
        return len(self.patterns) == 1 and not self.patterns[0]

    def dense(self) -> jax.Array:
        """bool_BTS."""
        return self.seen(*(jnp.arange(x.shape[2]) for x in (self.first_RBT, self.qfirst_RBS)))

    def seen(self, query_t: jax.Array, key_s: jax.Array) -> jax.Array:
        """bool_Bts of some queries and keys, by index; nobody sees or is seen beyond T and S."""
        T, S = self.first_RBT.shape[2], self.qfirst_RBS.shape[2]
        found = jnp.zeros((), bool)
        for r, patterns in enumerate(self.patterns):
            first_Bt, last_Bt = (
                jnp.take(x[r], query_t, axis=1, mode="clip")[..., None] for x in (self.first_RBT, self.last_RBT)
            )
            term = (first_Bt <= key_s) & (key_s <= last_Bt)
            if patterns:
                block, matrix = merged(patterns, T, S)
                term &= jnp.asarray(matrix)[query_t[:, None] // block, key_s // block]
            found = found | term
        return found & (query_t < T)[:, None]

    def seen_keys(self) -> jax.Array:
        """bool_BS: keys that some query sees."""
        T, S = self.first_RBT.shape[2], self.qfirst_RBS.shape[2]
        found = jnp.zeros((), bool)
        for qfirst_BS, qlast_BS, patterns in zip(self.qfirst_RBS, self.qlast_RBS, self.patterns, strict=True):
            term = qfirst_BS <= qlast_BS
            if patterns:  # among the blocks of those queries is one that the pattern shows
                block, matrix = merged(patterns, T, S)
                above = jnp.asarray(np.pad(np.cumsum(matrix, axis=0), ((1, 0), (0, 0))))
                column_S = np.arange(S) // block
                term &= above[qlast_BS // block + 1, column_S] > above[qfirst_BS // block, column_S]
            found = found | term
        return found

    def ranges(self, tile_q: int, tile_k: int) -> Ranges:
        """Which key tiles each query tile visits; only of an interval mask."""
        assert self.is_interval
        return _ranges(self.first_RBT[0], self.last_RBT[0], tile_q, tile_k)

    def ranges_by_key(self, tile_q: int, tile_k: int) -> Ranges:
        """Which query tiles each key tile is visited by; only of an interval mask."""
        assert self.is_interval
        return _ranges(self.qfirst_RBS[0], self.qlast_RBS[0], tile_k, tile_q)

    def shown(self, tile_q: int, tile_k: int) -> jax.Array:
        """bool_QJ: whether any row shows something of a query tile and a key tile; any mask, tiles of any size."""
        T, S = self.first_RBT.shape[2], self.qfirst_RBS.shape[2]
        start = jnp.arange(0, S, tile_k)
        found = jnp.zeros((), bool)
        for r, patterns in enumerate(self.patterns):
            (lowest, _), (_, high) = (_at_ends(x, tile_q) for x in (self.first_RBT[r], self.last_RBT[r]))
            active = (lowest[..., None] < jnp.minimum(start + tile_k, S)) & (high[..., None] >= start)
            if patterns:
                block, matrix = merged(patterns, T, S)
                active &= _any_of_tiles(_any_of_tiles(matrix, 0, block, T, tile_q), 1, block, S, tile_k)
            found = found | jnp.any(active, axis=0)
        return found

    def tiles(self, tile_q: int, tile_k: int) -> Tiles:
        """Which key tiles each query tile visits, of any mask."""
        return _listed(self._codes(tile_q, tile_k))

    def tiles_by_key(self, tile_q: int, tile_k: int) -> Tiles:
        """Which query tiles each key tile is visited by, of any mask."""
        return _listed(jnp.swapaxes(self._codes(tile_q, tile_k), 1, 2))

    def misfit(self, *tiles: int) -> int | None:
        """A pattern's block that is not a multiple of some tile size, so that tiles cannot say it."""
        return misfit_of(self.patterns, tiles)

    def _codes(self, tile_q: int, tile_k: int) -> jax.Array:
        """code_BQJ of every query tile and key tile; 0: nothing is seen."""
        T, S = self.first_RBT.shape[2], self.qfirst_RBS.shape[2]
        rows, columns = -(-T // tile_q), -(-S // tile_k)
        start = jnp.arange(columns) * tile_k
        stop = start + tile_k
        whole = (stop <= S) & ((jnp.arange(rows) + 1) * tile_q <= T)[:, None]
        assert len(self.patterns) <= MOST_TERMS and self.misfit(tile_q, tile_k) is None, "cannot be said by tiles"
        code = jnp.zeros((), jnp.int32)
        for r, patterns in enumerate(self.patterns):
            (lowest, highest), (low, high) = (_at_ends(x, tile_q) for x in (self.first_RBT[r], self.last_RBT[r]))
            active = (lowest[..., None] < jnp.minimum(stop, S)) & (high[..., None] >= start)
            full = whole & (highest[..., None] <= start) & (low[..., None] >= stop - 1)
            if patterns:
                block, matrix = merged(patterns, T, S)
                shown = np.repeat(np.repeat(matrix, block // tile_q, 0), block // tile_k, 1)[:rows, :columns]
                active, full = active & shown, full & shown
            code = code | jnp.where(active, 1 << r, 0) | jnp.where(active & full, FULL, 0)
        return code


def misfit_of(patterns: tuple[frozenset[Pattern], ...], tiles: tuple[int, ...]) -> int | None:
    blocks = [math.gcd(*(p.block for p in term)) for term in patterns if term]
    return next((block for block in blocks if any(block % tile for tile in tiles)), None)


def _at_ends(end_BT: jax.Array, tile: int) -> tuple[jax.Array, jax.Array]:
    """Values at the first and the last index of every tile: the least and the greatest, as ends never go back."""
    T = end_BT.shape[1]
    begin = np.arange(0, T, tile)
    return end_BT[:, begin], end_BT[:, np.minimum(begin + tile, T) - 1]


def _ranges(first_BT: jax.Array, last_BT: jax.Array, tile: int, other: int) -> Ranges:
    (lowest, highest), (low, high) = (_at_ends(x, tile) for x in (first_BT, last_BT))
    start = lowest // other
    stop = jnp.maximum(high // other + 1, start)
    full_start = jnp.clip(-(-highest // other), start, stop)
    full_stop = jnp.clip((low + 1) // other, full_start, stop)
    return Ranges(start, full_start, full_stop, stop)


def _any_of_tiles(matrix: np.ndarray, axis: int, block: int, length: int, tile: int) -> np.ndarray:
    """A matrix of blocks along one axis as one of tiles: whether any block that a tile touches is shown."""
    starts = range(0, length, tile)
    parts = (np.take(matrix, range(i // block, (min(i + tile, length) - 1) // block + 1), axis) for i in starts)
    return np.stack([part.any(axis) for part in parts], axis)


def _listed(code_BQJ: jax.Array) -> Tiles:
    count_BQ = jnp.sum(code_BQJ != 0, axis=2, dtype=jnp.int32)
    order = jnp.argsort(code_BQJ == 0, axis=2, stable=True)
    behind = jnp.minimum(jnp.arange(code_BQJ.shape[2]), jnp.maximum(count_BQ - 1, 0)[..., None])
    index = jnp.take_along_axis(order, behind, axis=2).astype(jnp.int32)
    return Tiles(index, jnp.take_along_axis(code_BQJ, index, axis=2), count_BQ)


@lru_cache
def merged(patterns: frozenset[Pattern], queries: int, keys: int) -> tuple[int, np.ndarray]:
    """(block, matrix) of what all patterns show."""
    block = math.gcd(*(p.block for p in patterns))
    rows, columns = -(-queries // block), -(-keys // block)
    each = (np.kron(p.matrix(queries, keys), np.ones((p.block // block,) * 2, bool)) for p in patterns)
    return block, np.logical_and.reduce([m[:rows, :columns] for m in each])
