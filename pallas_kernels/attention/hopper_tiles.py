"""Which tiles a Hopper kernel visits, in which order, and what it masks in them; both sides of it.

A kernel owns tiles of rows (queries; keys for dk and dv) and walks over tiles of columns: first those that need
no mask, then the others. XLA computes the walk before the kernel; the kernel reads it as scalars.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import shim
from pallas_kernels.visible import FULL

GROUP = 64  # rows that one warpgroup owns: the height of a wgmma
GROUPS = 2  # warpgroups that compute
TILE = GROUPS * GROUP  # rows that one block owns
LOG2E = math.log2(math.e)
BEYOND = 1 << 29  # an index that no row and no column has; twice it is still an int32


class Walk(NamedTuple):
    """Arrays for one kind of rows, or inside a kernel their refs.

    B is 1 where the mask is the same for all; P row tiles of `tile_rows`.
    """

    loops_BP5: Any
    """int32: unmasked tiles, all tiles; by range also: first tile, first and one past the last unmasked tile."""
    tiles_BPJ: Any
    """int32, by list: column tiles, the unmasked ones first. One zero by range."""
    codes_BPJ: Any
    """int32, by list: bit r says that term r is active. One zero by range."""
    rows_BLR: Any
    """int32, L = 2 terms: the first seen columns of every term, then the last ones; rows beyond the end see nothing.
    With dropout one more: the rows' positions."""
    seeds_BN2: Any = np.zeros((1, 1, 2), np.uint32)
    """With dropout: two words per sequence and query head."""
    columns_C: Any = np.zeros(1, np.int32)
    """With dropout: the columns' positions, in whole tiles."""


def walk_ranges(first_BR: jax.Array, last_BR: jax.Array, ranges: Any, tile_rows: int, whole: bool = False) -> Walk:
    """The walk of an interval mask. `ranges`: start, full_start, full_stop, stop, each int32_BP, in column tiles.

    `whole`: a row tile that reaches beyond the end masks everywhere, so that rows that do not exist see nothing.
    """
    start, full_start, full_stop, stop = jnp.broadcast_arrays(*ranges)
    if whole and first_BR.shape[1] % tile_rows:
        full_stop = full_stop.at[:, -1].set(full_start[:, -1])
    loops_BP5 = jnp.stack([full_stop - full_start, stop - start, start, full_start, full_stop], axis=-1)
    nothing = jnp.zeros((1, 1, 1), jnp.int32)
    return Walk(loops_BP5.astype(jnp.int32), nothing, nothing, _row_bounds(first_BR[None], last_BR[None], tile_rows))


def walk_list(first_XBR: jax.Array, last_XBR: jax.Array, tiles: Any, tile_rows: int) -> Walk:
    """The walk over lists of active tiles; X terms of which one must show the column."""
    J = tiles.index_BQJ.shape[-1]
    active = jnp.arange(J) < tiles.count_BQ[..., None]
    free = active & (tiles.code_BQJ & FULL != 0)
    order = jnp.argsort(jnp.where(free, 0, jnp.where(active, 1, 2)), axis=-1, stable=True)
    tiles_BPJ, codes_BPJ = (jnp.take_along_axis(x, order, axis=-1) for x in (tiles.index_BQJ, tiles.code_BQJ))
    counts = jnp.stack([free.sum(-1), tiles.count_BQ], axis=-1)
    loops_BP5 = jnp.pad(counts, ((0, 0), (0, 0), (0, 3))).astype(jnp.int32)
    return Walk(loops_BP5, tiles_BPJ, codes_BPJ, _row_bounds(first_XBR, last_XBR, tile_rows))


def with_dice(walk: Walk, seeds_BN2: jax.Array, row_R: jax.Array, column_C: jax.Array, tile: int) -> Walk:
    """The walk, with what dropout counts by; `tile`: columns of a step."""
    B, _, rows = walk.rows_BLR.shape
    row_R = jnp.pad(row_R.astype(jnp.int32), (0, rows - row_R.shape[0]))
    rows_BLR = jnp.concatenate([walk.rows_BLR, jnp.broadcast_to(row_R, (B, 1, rows))], axis=1)
    columns_C = jnp.pad(column_C.astype(jnp.int32), (0, -column_C.shape[0] % tile))
    return walk._replace(rows_BLR=rows_BLR, seeds_BN2=seeds_BN2, columns_C=columns_C)


def _row_bounds(first_XBR: jax.Array, last_XBR: jax.Array, tile_rows: int) -> jax.Array:
    extra = ((0, 0), (0, 0), (0, -first_XBR.shape[-1] % tile_rows))
    first = jnp.pad(first_XBR, extra, constant_values=BEYOND)
    last = jnp.pad(last_XBR, extra, constant_values=-1)
    return jnp.concatenate([first, last]).swapaxes(0, 1).astype(jnp.int32)


class Steps(NamedTuple):
    """Inside a kernel: the walk of one row tile, read from the refs of a `Walk`."""

    refs: Walk
    at: tuple[jax.Array, jax.Array]
    listed: bool

    @classmethod
    def of(cls, refs: Walk, batch: jax.Array, tile: jax.Array, listed: bool) -> "Steps":
        return cls(refs, (batch if refs.loops_BP5.shape[0] > 1 else 0 * batch, tile), listed)

    @property
    def free(self) -> jax.Array:
        return self.refs.loops_BP5[(*self.at, 0)]

    @property
    def total(self) -> jax.Array:
        return self.refs.loops_BP5[(*self.at, 1)]

    def tile(self, step: jax.Array) -> jax.Array:
        """The column tile of a step: unmasked ones, then what lies before them, then what lies behind."""
        if self.listed:
            return self.refs.tiles_BPJ[(*self.at, step)]
        free, low, begin, end = (self.refs.loops_BP5[(*self.at, i)] for i in (0, 2, 3, 4))
        before = low + step - free
        return jnp.where(step < free, begin + step, jnp.where(before < begin, before, before - begin + end))

    def code(self, step: jax.Array) -> jax.Array:
        return self.refs.codes_BPJ[(*self.at, step)] if self.listed else jnp.int32(1)


def load_bounds(rows_smem: Any) -> list[tuple[jax.Array, jax.Array]]:
    """The first and last seen column of a warpgroup's rows, per term, in registers."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    terms = rows_smem.shape[0] // 2
    rows = [shim.load_rows(rows_smem.at[i], layout) for i in range(2 * terms)]
    return list(zip(rows[:terms], rows[terms:], strict=True))


def seen(bounds: list[tuple[jax.Array, jax.Array]], code: jax.Array, start: jax.Array, columns: int) -> jax.Array:
    """bool (GROUP, columns): which columns of the tile that begins at `start` the rows see."""
    shape = (GROUP, columns)
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    result: Any = None
    for term, (first, last) in enumerate(bounds):
        if len(bounds) > 1:  # an inactive term begins beyond every column
            first = first + (1 - ((code >> term) & 1)) * BEYOND
        first, last = (lax.broadcast_in_dim(bound - start, shape, [0]) for bound in (first, last))
        inside = (column >= first) & (column <= last)
        result = inside if result is None else result | inside
    return result


def keep(rate: float, seeds: tuple[jax.Array, jax.Array], query: jax.Array, key: jax.Array) -> jax.Array:
    """threefry.keep_mask, unrolled as kernels want it. All uint32; `query` and `key` have the tile's shape."""
    words = (*seeds, seeds[0] ^ seeds[1] ^ np.uint32(0x1BD11BDA))
    x0, x1 = query + words[0], key + words[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0, x1 = x0 + words[(i + 1) % 3], x1 + (words[(i + 2) % 3] + np.uint32(i + 1))
    return x0 >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def dropped(
    x: jax.Array, rate: float, walk: Walk, at: Any, rows_smem: Any, columns_smem: Any, by_key: bool
) -> jax.Array:
    """x of a tile with what dropout leaves of it. `at`: batch and query head; `by_key`: rows are keys."""
    row = shim.load_rows(rows_smem.at[rows_smem.shape[0] - 1], plgpu.Layout.WGMMA.reduce(1)).astype(jnp.uint32)
    column = shim.load_rows(columns_smem, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.uint32)
    row, column = lax.broadcast_in_dim(row, x.shape, [0]), lax.broadcast_in_dim(column, x.shape, [1])
    query, key = (column, row) if by_key else (row, column)
    kept = keep(rate, (walk.seeds_BN2[(*at, 0)], walk.seeds_BN2[(*at, 1)]), query, key)
    return jnp.where(kept, x * (1.0 / (1.0 - rate)), 0.0)


def fitting(stages: int, owned_bytes: int, step_bytes: int) -> int:
    """As many stages as wished, or as shared memory (227 KB, some of it for bounds and barriers) has room for."""
    return max(1, min(stages, (223 * 1024 - owned_bytes) // step_bytes))


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that TMA and wgmma read and write fast: the last dimension is cut into pieces of 128 bytes."""
    piece = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, piece)), plgpu.SwizzleTransform(128)))


def opaque(index: jax.Array) -> jax.Array:
    """The same index, of which the compiler does not know that it is the same in every step of a loop.

    It would compute wgmma's descriptors of what does not move before the loop, and spill them.
    """
    return lax.optimization_barrier(index)


def product(left: Any, right: Any, columns: int) -> jax.Array:
    """left right in float32 (GROUP, columns); `left` and `right` are shared memory."""

    def run(acc_ref):
        plgpu.wgmma(acc_ref, left, right)
        return acc_ref[...]

    return pl.run_scoped(run, plgpu.ACC((GROUP, columns), jnp.float32))


def add_product(acc: jax.Array, left: jax.Array, right: Any, stage: Any | None, meanwhile: Any = None) -> jax.Array:
    """acc + left right, `left` in registers; through the shared memory `stage` where there is one."""
    if stage is not None:
        stage[...] = left
        plgpu.commit_smem()

        def run_staged(acc_ref):
            plgpu.wgmma(acc_ref, stage, right)
            if meanwhile is not None:
                meanwhile()
            return acc_ref[...]

        return acc + pl.run_scoped(run_staged, plgpu.ACC((acc.shape[0], acc.shape[1]), jnp.float32))

    def run(acc_ref):
        plgpu.wgmma(acc_ref, left, right)
        if meanwhile is not None:
            meanwhile()

    total: Any = pl.run_state(run)(plgpu.ACC.init(acc))
    return total


def zeros(shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    """Registers in wgmma's layout: of its result, or of one number per row."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def capped(scores: jax.Array, scale: float, softcap: float) -> jax.Array:
    """softcap tanh(scale scores / softcap), from exp2: the hardware's own tanh has 11 bits."""
    return softcap - 2.0 * softcap / (1.0 + jnp.exp2(scores * (2.0 * LOG2E * scale / softcap)))
