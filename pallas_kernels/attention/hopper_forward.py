"""Flash attention forward on Hopper: two warpgroups of 64 queries each, a third that only copies.

The design of FlashAttention-3 (Shah et al. 2024) without its overlap inside a warpgroup, after the example in
jax.experimental.pallas.ops.gpu.attention_mgpu: K and V arrive by TMA in a ring, the two groups take turns, so that the
softmax of one runs beside the matrix products of the other.
"""

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

LOWEST = -1e30  # a finite start of the running maximum, so that a row that sees nothing never meets inf - inf


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What is static in the forward kernel."""

    scale: float
    softcap: float | None
    dropout: float
    listed: bool
    tile_k: int
    stages: int
    staged: bool
    """P goes through shared memory: the form that the interpreter of jax 0.12 can run."""
    interpret: Any


def run(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, walk: Walk, how: Forward
) -> tuple[jax.Array, jax.Array]:
    """out_BTNU in q's dtype and lse_BNT (natural; T rounded up to whole tiles). T >= TILE, S >= tile_k."""
    B, T, N, H = q_BTNH.shape
    U, tiles, dtype = v_BSKU.shape[-1], pl.cdiv(T, TILE), q_BTNH.dtype
    rows = walk.rows_BLR.shape[1]
    how = replace(how, stages=ht.fitting(how.stages, 2 * TILE * (H + (U if U != H else 0)), 2 * how.tile_k * (H + U)))
    smem = [
        ht.swizzled((GROUPS, GROUP, H), dtype),
        ht.swizzled((how.stages, how.tile_k, H), dtype),
        ht.swizzled((how.stages, how.tile_k, U), dtype),
        plgpu.SMEM((GROUPS, rows, GROUP), jnp.int32),
        plgpu.SMEM((GROUPS, GROUP), jnp.float32),
        ht.swizzled((GROUPS, GROUP, U), dtype) if U != H else None,
        ht.swizzled((GROUPS, GROUP, how.tile_k), dtype) if how.staged else None,
        plgpu.SMEM((how.stages, how.tile_k), jnp.int32) if how.dropout else None,
    ]
    ring = {"num_barriers": how.stages}
    barriers = [
        plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),  # queries, bounds
        plgpu.Barrier(**ring),  # K has come
        plgpu.Barrier(num_arrivals=1 + (how.dropout > 0), **ring),  # V, and with dropout the keys' positions
        *(plgpu.Barrier(num_arrivals=GROUPS, **ring) for _ in range(2)),  # K, V may go
        plgpu.Barrier(num_arrivals=GROUPS),  # whose turn it is
    ]
    kernel = plgpu.kernel(
        lambda *refs: _kernel(refs, how),
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, U), dtype),
            jax.ShapeDtypeStruct((B, N, tiles * TILE), jnp.float32),
        ],
        scratch_types=[smem, barriers],
        grid=(tiles, B, N),  # heads fastest: those that share keys run together
        grid_names=("tile", "batch", "head"),
        num_threads=GROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="mtx_attention_forward",
        interpret=how.interpret,
    )
    return kernel(q_BTNH, k_BSKH, v_BSKU, *walk)


def _kernel(refs: tuple[Any, ...], how: Forward) -> None:
    q_ref, k_ref, v_ref, *walk_refs, out_ref, lse_ref, smem, barriers = refs
    batch, head, group = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    tile = pl.cdiv(q_ref.shape[1], TILE) - 1 - lax.axis_index("tile")  # under a causal mask the long ones first
    steps = Steps.of(Walk(*walk_refs), batch, tile, how.listed)

    @pl.when(group < GROUPS)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")
        _consume(q_ref, Walk(*walk_refs), out_ref, lse_ref, smem, barriers, steps, how)

    @pl.when(group == GROUPS)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")
        (k_smem, v_smem), key_smem = smem[1:3], smem[-1]
        k_came, v_came, k_free, v_free = barriers[1:5]
        kv_head = lax.div(head, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        def copy(step, _):
            slot = lax.rem(step, jnp.int32(how.stages))
            keys = (batch, pl.ds(steps.tile(step) * how.tile_k, how.tile_k), kv_head)
            for ref, ring, came, free in ((k_ref, k_smem, k_came, k_free), (v_ref, v_smem, v_came, v_free)):
                pl.when(step >= how.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(ref.at[keys], ring.at[slot], came.at[slot])
            if how.dropout:
                plgpu.copy_gmem_to_smem(steps.refs.columns_C.at[keys[1]], key_smem.at[slot], v_came.at[slot])

        lax.fori_loop(0, steps.total, copy, None)


def _consume(q_ref, walk, out_ref, lse_ref, smem, barriers, steps: Steps, how: Forward) -> None:
    q_smem2, k_smem, v_smem, rows_smem2, lse_smem2, out_smem2, p_smem2, key_smem = smem
    q_came, k_came, v_came, k_free, v_free, turn = barriers
    batch, head, group = (lax.axis_index(name) for name in ("batch", "head", "wg"))
    q_smem, lse_smem = q_smem2.at[group], lse_smem2.at[group]
    out_smem = q_smem if out_smem2 is None else out_smem2.at[group]
    p_smem = None if p_smem2 is None else p_smem2.at[group]
    U, tile_k = v_smem.shape[-1], how.tile_k
    rows = pl.ds(steps.at[1] * TILE + group * GROUP, GROUP)
    base = LOG2E * (how.scale if how.softcap is None else 1.0)

    plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem, q_came.at[group])
    plgpu.copy_gmem_to_smem(walk.rows_BLR.at[steps.at[0], :, rows], rows_smem2.at[group], q_came.at[group])
    plgpu.barrier_wait(q_came.at[group])
    bounds = ht.load_bounds(rows_smem2.at[group])
    total = steps.total

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def step(i, carry, masked):
        acc, top, mass = carry
        slot = ht.opaque(lax.rem(i, jnp.int32(how.stages)))

        def scores(acc_ref):
            plgpu.wgmma(acc_ref, q_smem2.at[ht.opaque(group)], shim.transposed(k_smem.at[slot]))
            take_turns()
            return acc_ref[...]

        s = pl.run_scoped(scores, plgpu.ACC((GROUP, tile_k), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        if how.softcap is not None:
            s = ht.capped(s, how.scale, how.softcap)
        if masked:
            s = jnp.where(ht.seen(bounds, steps.code(i), steps.tile(i) * tile_k, tile_k), s, -jnp.inf)

        # The maximum is kept times log2 e, so that p costs one multiply-add and one exp2.
        higher = jnp.maximum(top, s.max(axis=1) * base)
        shrink = jnp.exp2(top - higher)
        p = jnp.exp2(s * base - lax.broadcast_in_dim(higher, s.shape, [0]))
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        mass = mass * shrink + p.sum(axis=1)
        if how.dropout:
            plgpu.barrier_wait(v_came.at[slot])
            rows_smem = rows_smem2.at[group]
            p = ht.dropped(p, how.dropout, walk, (batch, head), rows_smem, key_smem.at[slot], by_key=False)
        p16 = p.astype(q_smem.dtype)
        acc, mass, higher, p16 = lax.optimization_barrier((acc, mass, higher, p16))
        plgpu.barrier_arrive(turn)
        if not how.dropout:
            plgpu.barrier_wait(v_came.at[slot])
        plgpu.barrier_wait(turn)

        def next_keys():
            pl.when(i + 1 < total)(lambda: plgpu.barrier_wait(k_came.at[lax.rem(i + 1, jnp.int32(how.stages))]))

        acc = ht.add_product(acc, p16, v_smem.at[slot], p_smem, next_keys)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, higher, mass

    pl.when(total > 0)(lambda: plgpu.barrier_wait(k_came.at[0]))
    pl.when(group == 1)(take_turns)
    carry = (ht.zeros((GROUP, U)), ht.zeros((GROUP,), LOWEST), ht.zeros((GROUP,)))
    carry = lax.fori_loop(0, steps.free, lambda i, c: step(i, c, masked=False), carry)
    acc, top, mass = lax.fori_loop(steps.free, total, lambda i, c: step(i, c, masked=True), carry)
    pl.when(group == 0)(take_turns)

    saw = mass > 0.0
    mass = jnp.where(saw, mass, 1.0)
    out_smem[...] = (acc * lax.broadcast_in_dim(1.0 / mass, acc.shape, [0])).astype(out_smem.dtype)
    lse_smem[...] = jnp.where(saw, top * (1.0 / LOG2E) + jnp.log(mass), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_ref.at[batch, rows, head])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[batch, head, rows])
    plgpu.wait_smem_to_gmem(0)
