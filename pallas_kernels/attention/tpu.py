"""Flash attention on TPU: forward, dq, and dk with dv as three Pallas kernels, deterministic, for every mask of ours.

Tiles that a mask hides are neither computed nor fetched: their grid steps, where the grid has them at all, name the
tile that is already there. K and V are never repeated; dk and dv are summed over the query group in the kernel.
Any T and S (padded to whole tiles), any head sizes (blocks span a whole head; below 128 the matrix unit idles).
Source of the split backward: Dao 2023, "FlashAttention-2"; of block lists: JAX's splash attention.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import shim
from pallas_kernels.attention.flash import Noise, Scores
from pallas_kernels.attention.question import Question
from pallas_kernels.attention.tpu_kernels import LOG2_E, Body, dkv_kernel, dq_kernel, forward_kernel
from pallas_kernels.attention.tpu_tiles import (
    LANES,
    MOST_TERMS,
    SMEM_BYTES,
    Plan,
    Sizes,
    fit,
    largest_sizes,
    list_plan,
    pad_to,
    range_plan,
)
from pallas_kernels.masks import Documents, Prefix
from pallas_kernels.threefry import threefry2x32
from pallas_kernels.visible import Visible

SEES_NOTHING = 1e30
"""In base 2 and the place of lse = -inf: every exp2(score - lse) is 0."""

Block = tuple[jax.Array, pl.BlockSpec]


def cannot(asked: Question) -> str | None:
    """Why these kernels cannot do exactly this; None if they can."""
    if asked.chip.platform != "tpu":
        return "it needs a TPU"
    if asked.dtype not in ("bfloat16", "float32"):
        return f"it needs bfloat16 or float32, not {asked.dtype}"
    found = asked.mask.conjunctions(own=not asked.key_segments)
    if len(found) == 1 and not found[0].patterns:
        return None
    if len(found) > MOST_TERMS:
        return f"its lists of tiles tell {MOST_TERMS} terms apart, and the mask has {len(found)}"
    blocks = {pattern.block for term in found for pattern in term.patterns}
    if odd := [block for block in blocks if block % LANES]:
        return f"it needs patterns in blocks of a multiple of {LANES}, not {odd[0]}"
    return _too_long(asked, blocks)


def _too_long(asked: Question, blocks: set[int]) -> str | None:
    """Whether lists of tiles overfill scalar memory; each row has its own where the mask differs by row."""
    rows = asked.rows if asked.mask.has(Documents) or asked.mask.has(Prefix) else 1
    sizes = default_sizes(asked)
    pairs = [(getattr(sizes, f"{name}_query"), getattr(sizes, f"{name}_key")) for name in ("forward", "dq", "dkv")]
    counts = [
        (pl.cdiv(asked.queries, fit(query, asked.queries, blocks)), pl.cdiv(asked.keys, fit(key, asked.keys, blocks)))
        for query, key in pairs
    ]
    need = max(4 * rows * (a + 1) * (b + 1) for a, b in counts)
    if need <= SMEM_BYTES:
        return None
    return f"its lists of tiles would take {need} bytes of scalar memory, which holds {SMEM_BYTES}"


def default_sizes(asked: Question) -> Sizes:
    """Tiles that stay inside the chip's VMEM, smaller with dropout, whose rounds take the compiler long."""
    itemsize, most = jnp.dtype(asked.dtype).itemsize, 512 if asked.dropout else 1024
    kind, head, value = asked.chip.kind, asked.head_size, asked.value_size
    return largest_sizes(kind, head, value, itemsize, softcap=asked.softcap, most=most)


def candidates(asked: Question) -> list[Sizes]:
    """What `benchmarks.tune_attention` tries; what does not fit VMEM fails there, by name."""
    tiles = [(512, 512), (512, 1024), (1024, 512), (1024, 1024), (256, 512), (512, 256)]
    return [
        Sizes(
            forward_query=forward[0],
            forward_key=forward[1],
            dq_query=backward[0],
            dq_key=backward[1],
            dkv_query=backward[0],
            dkv_key=backward[1],
        )
        for forward in tiles
        for backward in tiles
    ]


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: Visible,
    noise: Noise | None,
    scores: Scores,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNU in q's dtype, lse_BNT in float32: natural, -inf where a query sees nothing)."""
    T = q_BTNH.shape[1]
    tiles = _tiles(mask, sizes.forward_query, sizes.forward_key)
    call = _Call.of(mask, noise, scores, sizes, tiles, q_BTNH, k_BSKH, by_query=True)
    inputs = [call.queries(q_BTNH), call.keys(k_BSKH), call.keys(v_BSKU)]
    U, tile_query = v_BSKU.shape[3], tiles[0]
    outputs = [call.rows_out(U, q_BTNH.dtype), call.rows_out(1, jnp.float32)]
    out_BNUT, lse_BN1T = call(forward_kernel, inputs, outputs, [(U, tile_query), (1, tile_query), (1, tile_query)])
    return jnp.moveaxis(out_BNUT[..., :T], 3, 1), lse_BN1T[:, :, 0, :T]


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: Visible,
    noise: Noise | None,
    scores: Scores,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    dout_BTNU: jax.Array,
    sizes: Sizes,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTNH, dk_BSKH, dv_BSKU) in the inputs' types, from delta = sum(out dout) - dlse."""
    T, S, H, U = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3], v_BSKU.shape[3]
    base2_BNT = jnp.where(jnp.isneginf(lse_BNT), SEES_NOTHING, lse_BNT * LOG2_E)
    rows_BN2T = jnp.stack([base2_BNT, delta_BNT], axis=2).astype(jnp.float32)

    def inputs(call: "_Call") -> list[Block]:
        operands = [call.queries(q_BTNH), call.keys(k_BSKH), call.keys(v_BSKU), call.queries(dout_BTNU)]
        return [*operands, call.rows(rows_BN2T)]

    tiles = _tiles(mask, sizes.dq_query, sizes.dq_key)
    call = _Call.of(mask, noise, scores, sizes, tiles, q_BTNH, k_BSKH, by_query=True)
    (dq_BNHT,) = call(dq_kernel, inputs(call), [call.rows_out(H, q_BTNH.dtype)], [(H, tiles[0])])

    tiles = _tiles(mask, sizes.dkv_query, sizes.dkv_key)
    call = _Call.of(mask, noise, scores, sizes, tiles, q_BTNH, k_BSKH, by_query=False)
    outputs = [call.keys_out(H, k_BSKH.dtype), call.keys_out(U, v_BSKU.dtype)]
    dk_BKSH, dv_BKSU = call(dkv_kernel, inputs(call), outputs, [(tiles[1], H), (tiles[1], U)])
    return jnp.moveaxis(dq_BNHT[..., :T], 3, 1), jnp.swapaxes(dk_BKSH, 1, 2)[:, :S], jnp.swapaxes(dv_BKSU, 1, 2)[:, :S]


def _tiles(mask: Visible, query: int, key: int) -> tuple[int, int]:
    """Tiles of these sizes, smaller where lengths or the blocks of patterns want it."""
    blocks = {pattern.block for term in mask.patterns for pattern in term}
    return fit(query, mask.first_RBT.shape[2], blocks), fit(key, mask.qfirst_RBS.shape[2], blocks)


def _plan(mask: Visible, tiles: tuple[int, int], by_query: bool) -> Plan:
    if not mask.is_interval:
        assert len(mask.patterns) <= MOST_TERMS, "cannot be said by the lists of these kernels"
        return list_plan(mask.tiles(*tiles) if by_query else mask.tiles_by_key(*tiles))
    if by_query:
        return range_plan(mask.ranges(*tiles), pl.cdiv(mask.qfirst_RBS.shape[2], tiles[1]))
    return range_plan(mask.ranges_by_key(*tiles), pl.cdiv(mask.first_RBT.shape[2], tiles[0]))


@dataclass(frozen=True)
class _Call:
    """One of the kernels on one grid: its blocks, and what all kernels are given."""

    body: Body
    words: jax.Array
    shared: list[Block]
    """By query: bounds of the mask's terms and, with dropout, positions; then, with dropout, positions of keys."""
    batch: int
    kv_heads: int
    queries_padded: int
    keys_padded: int
    by_query: bool

    @classmethod
    def of(
        cls,
        mask: Visible,
        noise: Noise | None,
        scores: Scores,
        sizes: Sizes,
        tiles: tuple[int, int],
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        by_query: bool,
    ) -> "_Call":
        plan = _plan(mask, tiles, by_query)
        (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
        terms, dropout = mask.first_RBT.shape[0], scores.dropout
        rows, words = [row for pair in zip(mask.first_RBT, mask.last_RBT, strict=True) for row in pair], [plan.words]
        if dropout:
            assert noise is not None
            rows.append(jnp.broadcast_to(noise.query_T, rows[0].shape))
            words.append(_head_words(noise).reshape(-1))
        body = Body(
            scale=scores.scale,
            softcap=scores.softcap,
            dropout=dropout,
            terms=terms,
            tile_query=tiles[0],
            tile_key=tiles[1],
            group=N // K,
            heads=N,
            plan=plan,
            interpret=sizes.interpret,
        )
        T, S = (pl.cdiv(length, tile) * tile for length, tile in zip((T, S), tiles, strict=True))
        call = cls(body, jnp.concatenate(words), [], B, K, T, S, by_query)
        seen_BVT = jnp.stack([row.astype(jnp.int32) for row in rows], axis=1)
        one = seen_BVT.shape[0] == 1
        spec = call.spec((None, len(rows), tiles[0]), lambda at: (0 if one else at.b, 0, at.query))
        call.shared.append((pad_to(seen_BVT, 2, tiles[0]), spec))
        if dropout:
            assert noise is not None
            position_S1 = pad_to(noise.key_S.astype(jnp.int32)[:, None], 0, tiles[1])
            call.shared.append((position_S1, call.spec((tiles[1], 1), lambda at: (at.key, 0))))
        return call

    def place(self, *ids: Any) -> "_Place":
        """Which blocks a grid step is about."""
        *grid, words_ref = ids
        plan, group = self.body.plan, self.body.group
        if self.by_query:
            b, n, i, j = grid
            return _Place(b, n, n // group, i, plan.visit(words_ref, b, i, j)[1])
        b, kv, i, g, j = grid
        return _Place(b, kv * group + g, kv, plan.visit(words_ref, b, i, j)[1], i)

    def spec(self, shape: tuple[int | None, ...], index: Callable[["_Place"], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *ids: index(self.place(*ids)))

    def queries(self, x_BTNX: jax.Array) -> Block:
        tile, size = self.body.tile_query, x_BTNX.shape[3]
        x_BNTX = pad_to(jnp.swapaxes(x_BTNX, 1, 2), 2, tile)
        return x_BNTX, self.spec((None, None, tile, size), lambda at: (at.b, at.head, at.query, 0))

    def keys(self, x_BSKX: jax.Array) -> Block:
        tile, size = self.body.tile_key, x_BSKX.shape[3]
        x_BKSX = pad_to(jnp.swapaxes(x_BSKX, 1, 2), 2, tile)
        return x_BKSX, self.spec((None, None, tile, size), lambda at: (at.b, at.kv, at.key, 0))

    def rows(self, x_BNXT: jax.Array) -> Block:
        return pad_to(x_BNXT, 3, self.body.tile_query), self._row_spec(x_BNXT.shape[2])

    def _row_spec(self, size: int) -> pl.BlockSpec:
        return self.spec((None, None, size, self.body.tile_query), lambda at: (at.b, at.head, 0, at.query))

    def rows_out(self, size: int, dtype: Any) -> tuple[Any, pl.BlockSpec]:
        shape = (self.batch, self.body.heads, size, self.queries_padded)
        return (shape, dtype), self._row_spec(size)

    def keys_out(self, size: int, dtype: Any) -> tuple[Any, pl.BlockSpec]:
        spec = self.spec((None, None, self.body.tile_key, size), lambda at: (at.b, at.kv, at.key, 0))
        return ((self.batch, self.kv_heads, self.keys_padded, size), dtype), spec

    def __call__(
        self, kernel: Callable[..., None], inputs: Sequence[Block], outputs: Sequence[Any], scratch: Sequence[Any]
    ) -> tuple[jax.Array, ...]:
        body, plan = self.body, self.body.plan
        if self.by_query:
            grid, parallel = (self.batch, body.heads, plan.outer, plan.steps), 3
        else:
            grid, parallel = (self.batch, self.kv_heads, plan.outer, body.group, plan.steps), 3
        arrays, specs = zip(*self.shared, *inputs, strict=True)
        arrays = shim.varying_alike(self.words, *arrays)
        shared = len(self.shared)
        run = pl.pallas_call(
            functools.partial(kernel, body),
            tuple(shim.out_shape(*what, *arrays) for what, _ in outputs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=[specs[:shared], *specs[shared:]],
                out_specs=tuple(spec for _, spec in outputs),
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
            ),
            interpret=body.interpret,
            name=f"flash_{kernel.__name__}",
        )
        return run(arrays[0], arrays[1 : 1 + shared], *arrays[1 + shared :])


@dataclass(frozen=True)
class _Place:
    b: Any
    head: Any
    kv: Any
    query: Any
    key: Any


def _head_words(noise: Noise) -> jax.Array:
    """Both words of each sequence's and head's key, [B, N, 2] as int32: scalar memory holds no other."""
    k0, k1 = (word_B[:, None] for word_B in noise.words_2B)
    head = noise.head_N.astype(jnp.uint32)[None]
    return lax.bitcast_convert_type(jnp.stack(threefry2x32((k0, k1), (head, jnp.zeros_like(head))), -1), jnp.int32)
