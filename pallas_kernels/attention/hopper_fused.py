"""Flash attention backward on Hopper with five matrix products per tile: dk, dv and dq in one kernel.

It owns keys, as the kernel of dk and dv does, and adds every tile's part of dq to global memory by TMA, in float32
and in whatever order blocks come: dq is not the same to the bit from call to call (Shah et al. 2024, section 3). Only
for heads of 128; not run on a device yet, so nobody gets it who does not ask for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import shim
from pallas_kernels.attention import hopper_backward as hb
from pallas_kernels.attention import hopper_tiles as ht
from pallas_kernels.attention.hopper_backward import Backward
from pallas_kernels.attention.hopper_tiles import GROUP, GROUPS, TILE, Steps, Walk

HEAD = 128
HALF = HEAD // GROUPS  # columns of dq that one warpgroup makes
COLUMNS = GROUP  # queries of one step


def run(
    q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2P, walk: Walk, how: Backward
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq_BTNH, dk_BSKH, dv_BSKH; the walk must be one whose missing rows see nothing. T, S >= 64."""
    B, S, K, H = k_BSKH.shape
    dtype, tiles = k_BSKH.dtype, pl.cdiv(S, TILE)
    assert H == v_BSKH.shape[3] == HEAD and not how.dropout and how.columns == COLUMNS and how.stages >= 2
    smem = [
        ht.swizzled((TILE, H), dtype),
        ht.swizzled((GROUPS, GROUP, H), dtype),
        plgpu.SMEM((GROUPS, walk.rows_BLR.shape[1], GROUP), jnp.int32),
        ht.swizzled((how.stages, COLUMNS, H), dtype),
        ht.swizzled((how.stages, COLUMNS, H), dtype),
        plgpu.SMEM((how.stages, 2, COLUMNS), jnp.float32),
        ht.swizzled((2, TILE, COLUMNS), dtype),  # dS of two steps
        ht.swizzled((GROUPS, COLUMNS, HALF), jnp.float32),  # dq
        ht.swizzled((GROUPS, GROUP, COLUMNS), dtype) if how.staged else None,
    ]
    # The interpreter cannot add by TMA: with `staged` every key tile has its own dq.
    sums_ref = jax.new_ref(jnp.zeros((tiles if how.staged else 1, *q_BTNH.shape), jnp.float32))
    kernel = hb.kernel(
        "mtx_attention_backward_fused",
        lambda *refs: _kernel(refs, how),
        out_type=[jax.ShapeDtypeStruct(k_BSKH.shape, dtype), jax.ShapeDtypeStruct(v_BSKH.shape, dtype)],
        scratch_types=[smem, [*hb.barriers(how, owned=3, ringed=3), plgpu.Barrier(num_arrivals=GROUPS)]],
        grid=(tiles, B, K),
        interpret=how.interpret,
    )
    dk_BSKH, dv_BSKH = kernel(q_BTNH, k_BSKH, v_BSKH, dout_BTNH, stats_BN2P, *walk, sums_ref)
    dq_BTNH = (sums_ref[...].sum(0) * how.scale).astype(dtype)
    return dq_BTNH, dk_BSKH, dv_BSKH


def _kernel(refs: tuple[Any, ...], how: Backward) -> None:
    q_ref, k_ref, v_ref, dout_ref, stats_ref, *walk_refs, sums_ref, dk_ref, dv_ref, smem, barriers = refs
    k_smem, v_smem2, rows_smem2, q_smem, dout_smem, stats_smem, ds_smem, dq_smem2, stage2 = smem
    owned, came, free, ds_made = barriers
    batch, kv_head, group = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    tile = lax.axis_index("tile")
    walk = Walk(*walk_refs)
    steps = Steps.of(walk, batch, tile, how.listed)
    heads = q_ref.shape[2] // k_ref.shape[2]
    shape = (GROUP, COLUMNS)

    def queries_of(i):
        """Steps go through the query heads of a tile before the next tile."""
        head = kv_head * heads + lax.rem(i, jnp.int32(heads))
        return pl.ds(steps.tile(lax.div(i, jnp.int32(heads))) * COLUMNS, COLUMNS), head

    def fetch(i, slot):
        queries, head = queries_of(i)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem.at[slot], came.at[slot])
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, queries, head], dout_smem.at[slot], came.at[slot])
        plgpu.copy_gmem_to_smem(stats_ref.at[batch, head, :, queries], stats_smem.at[slot], came.at[slot])

    mine = pl.ds(group * GROUP, GROUP)
    rows = pl.ds(tile * TILE + group * GROUP, GROUP)
    v_smem, rows_smem = v_smem2.at[group], rows_smem2.at[group]
    stage = None if stage2 is None else stage2.at[group]
    plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem.at[mine], owned.at[group])
    plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem, owned.at[group])
    plgpu.copy_gmem_to_smem(walk.rows_BLR.at[steps.at[0], :, rows], rows_smem, owned.at[group])
    refill = hb.ring(fetch, steps.total * heads, free, how)
    for i in range(GROUPS):  # a group also needs the other's keys, for dq
        plgpu.barrier_wait(owned.at[i])
    bounds = ht.load_bounds(rows_smem)

    def step(i, carry, masked):
        dk, dv = carry
        slot, half = ht.opaque(lax.rem(i, jnp.int32(how.stages))), lax.rem(i, jnp.int32(2))
        q, dout = q_smem.at[slot], dout_smem.at[slot]
        plgpu.barrier_wait(came.at[slot])
        keys, values = k_smem.at[pl.ds(ht.opaque(group) * GROUP, GROUP)], v_smem2.at[ht.opaque(group)]
        s, dp = hb.products(keys, shim.transposed(q), values, shim.transposed(dout), COLUMNS)
        refill(i)
        lse2 = shim.load_rows(stats_smem.at[slot, 0], plgpu.Layout.WGMMA.reduce(0))
        walked = lax.div(i, jnp.int32(heads))
        seen = ht.seen(bounds, steps.code(walked), steps.tile(walked) * COLUMNS, COLUMNS) if masked else None
        p, slope = hb.weights(s, lax.broadcast_in_dim(lse2, shape, [1]), seen, how)
        delta = shim.load_rows(stats_smem.at[slot, 1], plgpu.Layout.WGMMA.reduce(0))
        ds = p * (dp - lax.broadcast_in_dim(delta, shape, [1]))
        ds16 = (ds if slope is None else ds * slope).astype(k_smem.dtype)
        p16 = p.astype(k_smem.dtype)
        ds_smem[half, mine] = ds16
        plgpu.commit_smem()
        plgpu.barrier_arrive(ds_made)
        dv, dk = hb.add_products([(dv, lambda: p16, dout), (dk, lambda: ds16, q)], stage)
        plgpu.barrier_arrive(free.at[slot])

        # Both groups' dS are there; each makes half of dq's columns. What the other does two steps on with this half
        # of ds_smem it does after the next arrival here, which comes after the product.
        plgpu.barrier_wait(ds_made)
        queries, head = queries_of(i)
        for g in range(GROUPS):

            @pl.when(group == g)
            def _(g=g):
                columns = slice(g * HALF, (g + 1) * HALF)
                dq = ht.product(shim.transposed(ds_smem.at[half]), k_smem.at[:, columns], HALF)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem2[g] = dq
                plgpu.commit_smem()
                sums = sums_ref.at[tile if how.staged else 0, batch, queries, head, columns]
                plgpu.copy_smem_to_gmem(dq_smem2.at[g], sums, reduction_op=None if how.staged else "add")

        return dk, dv

    carry = (ht.zeros((GROUP, HEAD)), ht.zeros((GROUP, HEAD)))
    carry = lax.fori_loop(0, steps.free * heads, lambda i, c: step(i, c, masked=False), carry)
    dk, dv = lax.fori_loop(steps.free * heads, steps.total * heads, lambda i, c: step(i, c, masked=True), carry)
    # The other group may still read these keys, but not the values: both results leave through them.
    for result, out_ref in ((dk * how.scale, dk_ref), (dv, dv_ref)):
        v_smem[...] = result.astype(v_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v_smem, out_ref.at[batch, rows, kv_head])
        plgpu.wait_smem_to_gmem(0)
