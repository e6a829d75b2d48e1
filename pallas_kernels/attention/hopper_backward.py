"""Flash attention backward on Hopper, split in two kernels that write every number once: deterministic.

One kernel owns queries and makes dq, the other owns keys and makes dk and dv, which it sums over the query heads of a
kv head. Both have two warpgroups and no third that copies: the first of them starts the copies, and each thread may
have 255 registers without `setmaxnreg`, which some versions of the CUDA compiler ignore. Every step makes
    p = exp(s - lse),  ds = p (dp - delta)        (Dao 2023, "FlashAttention-2", algorithm 2)
the kernel of the keys with all matrices transposed, so that its rows are keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import shim
from pallas_kernels.attention import hopper_tiles as ht
from pallas_kernels.attention.hopper_tiles import GROUP, GROUPS, LOG2E, TILE, Steps, Walk


@dataclass(frozen=True, kw_only=True)
class Backward:
    """What is static in a backward kernel."""

    scale: float
    softcap: float | None
    dropout: float
    listed: bool
    columns: int
    """Keys of one step of the dq kernel, queries of one step of the dkv kernel."""
    stages: int
    staged: bool
    """P and dS go through shared memory: the form that the interpreter of jax 0.12 can run."""
    interpret: Any

    @property
    def base(self) -> float:
        return LOG2E * (self.scale if self.softcap is None else 1.0)


def statistics(lse_BNT: jax.Array, delta_BNT: jax.Array) -> jax.Array:
    """float32_BN2P of whole tiles: lse in base 2, inf where a query sees nothing or is none (p = 0), and delta."""
    extra = ((0, 0), (0, 0), (0, -lse_BNT.shape[2] % TILE))
    lse2 = jnp.where(lse_BNT == -jnp.inf, jnp.inf, lse_BNT * LOG2E)
    return jnp.stack([jnp.pad(lse2, extra, constant_values=jnp.inf), jnp.pad(delta_BNT, extra)], axis=2)


def run_queries(q_BTNH, k_BSKH, v_BSKU, dout_BTNU, stats_BN2P, walk: Walk, how: Backward) -> jax.Array:
    """dq_BTNH. T >= 64, S >= how.columns."""
    B, T, N, H = q_BTNH.shape
    U, dtype = v_BSKU.shape[-1], q_BTNH.dtype
    how = replace(how, stages=ht.fitting(how.stages, 2 * TILE * (H + U), 2 * how.columns * (H + U)))
    smem = [
        ht.swizzled((GROUPS, GROUP, H), dtype),
        ht.swizzled((GROUPS, GROUP, U), dtype),
        plgpu.SMEM((GROUPS, walk.rows_BLR.shape[1], GROUP), jnp.int32),
        plgpu.SMEM((GROUPS, 2, GROUP), jnp.float32),
        ht.swizzled((how.stages, how.columns, H), dtype),
        ht.swizzled((how.stages, how.columns, U), dtype),
        ht.swizzled((GROUPS, GROUP, how.columns), dtype) if how.staged else None,
        plgpu.SMEM((how.stages, how.columns), jnp.int32) if how.dropout else None,
    ]
    run = kernel(
        "mtx_attention_backward_dq",
        lambda *refs: _queries(refs, how),
        out_type=[jax.ShapeDtypeStruct((B, T, N, H), dtype)],
        scratch_types=[smem, barriers(how, owned=4, ringed=2)],
        grid=(pl.cdiv(T, TILE), B, N),
        interpret=how.interpret,
    )
    return run(q_BTNH, k_BSKH, v_BSKU, dout_BTNU, stats_BN2P, *walk)[0]


def run_keys(
    q_BTNH, k_BSKH, v_BSKU, dout_BTNU, stats_BN2P, walk: Walk, how: Backward, parts: tuple[str, ...] = ("dk", "dv")
) -> list[jax.Array]:
    """`parts` of dk_BSKH, dv_BSKU; sums of wide heads take too many registers for both. T >= how.columns, S >= 64."""
    B, S, K, H = k_BSKH.shape
    U, dtype = v_BSKU.shape[-1], k_BSKH.dtype
    owned = ("dk" in parts) * U + H
    how = replace(how, stages=ht.fitting(how.stages, 2 * TILE * owned, 2 * how.columns * (H + U)))
    out_type = {"dk": jax.ShapeDtypeStruct((B, S, K, H), dtype), "dv": jax.ShapeDtypeStruct((B, S, K, U), dtype)}
    smem = [
        ht.swizzled((GROUPS, GROUP, H), dtype),
        ht.swizzled((GROUPS, GROUP, U), dtype) if "dk" in parts or H != U else None,
        plgpu.SMEM((GROUPS, walk.rows_BLR.shape[1], GROUP), jnp.int32),
        ht.swizzled((how.stages, how.columns, H), dtype),
        ht.swizzled((how.stages, how.columns, U), dtype),
        plgpu.SMEM((how.stages, 2, how.columns), jnp.float32),
        ht.swizzled((GROUPS, GROUP, how.columns), dtype) if how.staged else None,
        plgpu.SMEM((how.stages, how.columns), jnp.int32) if how.dropout else None,
    ]
    run = kernel(
        "mtx_attention_backward_" + "".join(parts).replace("dkdv", "dkv"),
        lambda *refs: _keys(refs, how, parts),
        out_type=[out_type[part] for part in parts],
        scratch_types=[smem, barriers(how, owned=2 + ("dk" in parts), ringed=3)],
        grid=(pl.cdiv(S, TILE), B, K),
        interpret=how.interpret,
    )
    return run(q_BTNH, k_BSKH, v_BSKU, dout_BTNU, stats_BN2P, *walk)


def kernel(name: str, body: Callable[..., None], **how: Any) -> Any:
    return plgpu.kernel(
        body,
        **how,
        grid_names=("tile", "batch", "head"),  # heads fastest: those that share keys run together
        num_threads=GROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )


def barriers(how: Backward, owned: int, ringed: int) -> list[Any]:
    return [
        plgpu.Barrier(num_arrivals=owned, num_barriers=GROUPS),  # what a group owns has come
        plgpu.Barrier(num_arrivals=ringed + (how.dropout > 0), num_barriers=how.stages),  # what a step needs has come
        plgpu.Barrier(num_arrivals=GROUPS, num_barriers=how.stages),  # it may go
    ]


def ring(fetch: Callable[..., None], total: jax.Array, free: Any, how: Backward) -> Callable[[jax.Array], None]:
    """Starts the first copies; returns what step i must call to refill the slot that step i - 1 left."""
    first = lax.axis_index("wg") == 0
    stages = jnp.int32(how.stages)

    for i in range(how.stages):
        pl.when(first & (i < total))(lambda i=i: fetch(jnp.int32(i), jnp.int32(i)))

    def refill(i):
        @pl.when(first & (i >= 1) & (i - 1 + how.stages < total))
        def _():
            slot = lax.rem(i - 1, stages)
            plgpu.barrier_wait(free.at[slot])
            fetch(i - 1 + how.stages, slot)

    return refill


def weights(s: jax.Array, lse2: jax.Array, seen: jax.Array | None, how: Backward) -> tuple[jax.Array, jax.Array | None]:
    """p, and what ds is to be multiplied by for the soft-cap."""
    slope = None
    if how.softcap is not None:
        s = ht.capped(s, how.scale, how.softcap)
        slope = 1.0 - s * s * (1.0 / how.softcap**2)
    p = jnp.exp2(s * how.base - lse2)
    return (p if seen is None else jnp.where(seen, p, 0.0)), slope


def products(left1: Any, right1: Any, left2: Any, right2: Any, columns: int) -> tuple[jax.Array, jax.Array]:
    """left1 right1 and left2 right2, both under way at once."""

    def run(acc1_ref, acc2_ref):
        plgpu.wgmma(acc1_ref, left1, right1)
        plgpu.wgmma(acc2_ref, left2, right2)
        return acc1_ref[...], acc2_ref[...]

    acc = plgpu.ACC((GROUP, columns), jnp.float32)
    return pl.run_scoped(run, acc, acc)


def add_products(sums: list[tuple[jax.Array, Callable[[], jax.Array], Any]], stage: Any | None) -> list[jax.Array]:
    """acc + make_left() right of each; a left side is made while the products before it are under way."""
    if stage is not None:
        return [ht.add_product(acc, make_left(), right, stage) for acc, make_left, right in sums]

    def run(refs):
        for ref, (_, make_left, right) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, make_left(), right)

    totals: Any = pl.run_state(run)([plgpu.ACC.init(acc) for acc, _, _ in sums])
    return totals


def _queries(refs: tuple[Any, ...], how: Backward) -> None:
    q_ref, k_ref, v_ref, dout_ref, stats_ref, *walk_refs, dq_ref, smem, (owned, came, free) = refs
    q_smem2, dout_smem2, rows_smem2, stats_smem2, k_smem, v_smem, stage2, key_smem = smem
    walk = Walk(*walk_refs)
    batch, head, group = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    tile = pl.cdiv(q_ref.shape[1], TILE) - 1 - lax.axis_index("tile")
    steps = Steps.of(walk, batch, tile, how.listed)
    kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))
    columns, shape = how.columns, (GROUP, how.columns)

    def fetch(i, slot):
        keys = (batch, pl.ds(steps.tile(i) * columns, columns), kv_head)
        plgpu.copy_gmem_to_smem(k_ref.at[keys], k_smem.at[slot], came.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[keys], v_smem.at[slot], came.at[slot])
        if how.dropout:
            plgpu.copy_gmem_to_smem(walk.columns_C.at[keys[1]], key_smem.at[slot], came.at[slot])

    rows = pl.ds(tile * TILE + group * GROUP, GROUP)
    q_smem, dout_smem, rows_smem, stats_smem = (ref.at[group] for ref in (q_smem2, dout_smem2, rows_smem2, stats_smem2))
    stage = None if stage2 is None else stage2.at[group]
    plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, owned.at[group])
    plgpu.copy_gmem_to_smem(dout_ref.at[batch, rows, head], dout_smem, owned.at[group])
    plgpu.copy_gmem_to_smem(walk.rows_BLR.at[steps.at[0], :, rows], rows_smem, owned.at[group])
    plgpu.copy_gmem_to_smem(stats_ref.at[batch, head, :, rows], stats_smem, owned.at[group])
    refill = ring(fetch, steps.total, free, how)
    plgpu.barrier_wait(owned.at[group])
    bounds = ht.load_bounds(rows_smem)
    lse2, delta = (shim.load_rows(stats_smem.at[i], plgpu.Layout.WGMMA.reduce(1)) for i in range(2))

    def step(i, dq, masked):
        slot = ht.opaque(lax.rem(i, jnp.int32(how.stages)))
        if how.stages == 1:
            refill(i)
        plgpu.barrier_wait(came.at[slot])
        q_smem, dout_smem = (ref.at[ht.opaque(group)] for ref in (q_smem2, dout_smem2))
        s, dp = products(q_smem, shim.transposed(k_smem.at[slot]), dout_smem, shim.transposed(v_smem.at[slot]), columns)
        if how.stages > 1:
            refill(i)
        seen = ht.seen(bounds, steps.code(i), steps.tile(i) * columns, columns) if masked else None
        p, slope = weights(s, lax.broadcast_in_dim(lse2, shape, [0]), seen, how)
        if how.dropout:
            dp = ht.dropped(dp, how.dropout, walk, (batch, head), rows_smem, key_smem.at[slot], by_key=False)
        ds = p * (dp - lax.broadcast_in_dim(delta, shape, [0]))
        ds = ds if slope is None else ds * slope
        dq = ht.add_product(dq, ds.astype(q_smem.dtype), k_smem.at[slot], stage)
        plgpu.barrier_arrive(free.at[slot])
        return dq

    dq = ht.zeros((GROUP, q_smem.shape[-1]))
    dq = lax.fori_loop(0, steps.free, lambda i, c: step(i, c, masked=False), dq)
    dq = lax.fori_loop(steps.free, steps.total, lambda i, c: step(i, c, masked=True), dq)
    q_smem[...] = (dq * how.scale).astype(q_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, rows, head])
    plgpu.wait_smem_to_gmem(0)


def _keys(refs: tuple[Any, ...], how: Backward, parts: tuple[str, ...]) -> None:
    q_ref, k_ref, v_ref, dout_ref, stats_ref, *more, smem, (owned, came, free) = refs
    k_smem2, v_smem2, rows_smem2, q_smem, dout_smem, stats_smem, stage2, query_smem = smem
    walk, out_refs = Walk(*more[:6]), more[6:]
    batch, kv_head, group = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    tile = lax.axis_index("tile")  # under a causal mask the first keys have most queries
    steps = Steps.of(walk, batch, tile, how.listed)
    heads = q_ref.shape[2] // k_ref.shape[2]
    columns, shape = how.columns, (GROUP, how.columns)

    def fetch(i, slot):
        """Steps go through the query heads of a tile before the next tile."""
        head = kv_head * heads + lax.rem(i, jnp.int32(heads))
        queries = pl.ds(steps.tile(lax.div(i, jnp.int32(heads))) * columns, columns)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem.at[slot], came.at[slot])
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, queries, head], dout_smem.at[slot], came.at[slot])
        plgpu.copy_gmem_to_smem(stats_ref.at[batch, head, :, queries], stats_smem.at[slot], came.at[slot])
        if how.dropout:
            plgpu.copy_gmem_to_smem(walk.columns_C.at[queries], query_smem.at[slot], came.at[slot])

    rows = pl.ds(tile * TILE + group * GROUP, GROUP)
    k_smem, rows_smem = k_smem2.at[group], rows_smem2.at[group]
    v_smem = k_smem if v_smem2 is None else v_smem2.at[group]
    stage = None if stage2 is None else stage2.at[group]
    plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem, owned.at[group])
    if "dk" in parts:
        plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem, owned.at[group])
    plgpu.copy_gmem_to_smem(walk.rows_BLR.at[steps.at[0], :, rows], rows_smem, owned.at[group])
    refill = ring(fetch, steps.total * heads, free, how)
    plgpu.barrier_wait(owned.at[group])
    bounds = ht.load_bounds(rows_smem)

    def step(i, carry, masked):
        slot = lax.rem(i, jnp.int32(how.stages))
        q, dout, keys = q_smem.at[slot], dout_smem.at[slot], k_smem2.at[ht.opaque(group)]
        if how.stages == 1:
            refill(i)
        plgpu.barrier_wait(came.at[slot])
        if "dk" in parts:
            s, dp = products(keys, shim.transposed(q), v_smem2.at[ht.opaque(group)], shim.transposed(dout), columns)
        else:
            s, dp = ht.product(keys, shim.transposed(q), columns), None
        if how.stages > 1:
            refill(i)
        lse2 = shim.load_rows(stats_smem.at[slot, 0], plgpu.Layout.WGMMA.reduce(0))
        walked = lax.div(i, jnp.int32(heads))
        seen = ht.seen(bounds, steps.code(walked), steps.tile(walked) * columns, columns) if masked else None
        p, slope = weights(s, lax.broadcast_in_dim(lse2, shape, [1]), seen, how)

        def dropped(x):
            if not how.dropout:
                return x
            at = (batch, kv_head * heads + lax.rem(i, jnp.int32(heads)))
            return ht.dropped(x, how.dropout, walk, at, rows_smem, query_smem.at[slot], by_key=True)

        def make_ds():
            delta = shim.load_rows(stats_smem.at[slot, 1], plgpu.Layout.WGMMA.reduce(0))
            ds = p * (dropped(dp) - lax.broadcast_in_dim(delta, shape, [1]))
            return (ds if slope is None else ds * slope).astype(k_smem.dtype)

        lefts = {"dk": make_ds, "dv": lambda: dropped(p).astype(k_smem.dtype)}
        rights = {"dk": q, "dv": dout}
        was = dict(zip(parts, carry, strict=True))
        # dv first: ds is made while p dout is under way.
        sums = add_products([(was[part], lefts[part], rights[part]) for part in reversed(parts)], stage)
        plgpu.barrier_arrive(free.at[slot])
        return tuple(reversed(sums))

    ends = {"dk": (k_smem, how.scale), "dv": (v_smem, 1.0)}
    carry = tuple(ht.zeros((GROUP, ends[part][0].shape[-1])) for part in parts)
    carry = lax.fori_loop(0, steps.free * heads, lambda i, c: step(i, c, masked=False), carry)
    carry = lax.fori_loop(steps.free * heads, steps.total * heads, lambda i, c: step(i, c, masked=True), carry)
    for part, total in zip(parts, carry, strict=True):
        smem_ref, scale = ends[part]
        smem_ref[...] = (total * scale).astype(smem_ref.dtype)
    plgpu.commit_smem()
    for part, out_ref in zip(parts, out_refs, strict=True):
        plgpu.copy_smem_to_gmem(ends[part][0], out_ref.at[batch, rows, kv_head])
    plgpu.wait_smem_to_gmem(0)
