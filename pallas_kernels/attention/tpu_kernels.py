"""Bodies of the TPU kernels: forward, dq, and dk with dv. Scores lie keys by queries (S^T), one column per query.

So every statistic of a query (maximum, sum, lse, delta, first and last visible key) is a row vector that broadcasts
along sublanes: reductions stay off the cross-lane unit and nothing is stored 128 times over. dq and out are summed and
returned transposed, [head size, queries], which the caller's own transposition undoes.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.tpu_tiles import TERM, Plan
from pallas_kernels.visible import FULL

LOG2_E = math.log2(math.e)
HIDDEN = -1e30
"""Score of a hidden pair."""
LOWEST = -1e29
"""The maximum of no scores: above HIDDEN, so that a query which sees nothing sums to 0, not to the number of keys."""


@dataclass(frozen=True)
class Body:
    """What is static in the kernels."""

    scale: float
    softcap: float | None
    dropout: float
    terms: int
    tile_query: int
    tile_key: int
    group: int
    heads: int
    plan: Plan
    """Only its static part is read here; the words are in scalar memory."""
    interpret: Any

    @property
    def visibility_rows(self) -> int:
        """Rows of the array that holds each query's bounds and, with dropout, its position."""
        return 2 * self.terms + (self.dropout > 0.0)

    def scores(self, q_TH: jax.Array, k_SH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scores in base 2, and the derivative of the soft-cap."""
        raw_ST = dot(k_SH, q_TH, (1, 1))
        if self.softcap is None:
            return raw_ST * (self.scale * LOG2_E), None
        capped_ST = jnp.tanh(raw_ST * (self.scale / self.softcap))
        return capped_ST * (self.softcap * LOG2_E), 1.0 - capped_ST * capped_ST

    def hide(self, scores_ST: jax.Array, code: jax.Array, key_tile: jax.Array, shared: Any) -> jax.Array:
        """Pairs that no active term of the mask lets through get HIDDEN."""
        s = lax.broadcasted_iota(jnp.int32, scores_ST.shape, 0)
        start = key_tile * self.tile_key
        seen: jax.Array | bool = False
        for r in range(self.terms):
            first, last = (shared[0][2 * r + end : 2 * r + end + 1, :] - start for end in (0, 1))
            if self.terms > 1:  # an inactive term ends before it begins
                last = last - (1 - ((code >> (TERM + r)) & 1)) * np.int32(1 << 30)
            term = (first <= s) & (s <= last)
            seen = seen | term if r else term
        return jnp.where(seen, scores_ST, HIDDEN)

    def keep(self, words_ref: Any, b: jax.Array, n: jax.Array, shared: Any) -> jax.Array:
        """Dropout's keep mask of this tile, [keys, queries]: the same counters as the plain twin's."""
        at = self.plan.size + 2 * (b * self.heads + n)
        key = tuple(words_ref[at + i].astype(jnp.uint32) for i in (0, 1))
        shape = (self.tile_key, self.tile_query)
        query = jnp.broadcast_to(shared[0][2 * self.terms : 2 * self.terms + 1, :], shape).astype(jnp.uint32)
        position = jnp.broadcast_to(shared[1][...], shape).astype(jnp.uint32)
        bits = random_bits(key, (query, position), rolled=bool(self.interpret))
        # Unsigned order by signed comparison: flip the sign bits.
        least = min(round(self.dropout * 2**32), 2**32 - 1) - 2**31
        return lax.bitcast_convert_type(bits ^ np.uint32(2**31), jnp.int32) >= np.int32(least)

    @property
    def grown(self) -> float:
        """What dropout multiplies by. Sums are, at their end: p itself would round to another value in bfloat16."""
        return 1.0 / (1.0 - self.dropout)

    def tile(self, active: jax.Array, code: jax.Array, step: Any) -> None:
        """Runs step(masked) where the tile is active, without the element mask where all of it is visible."""
        full = (code & FULL) != 0
        pl.when(active & full)(lambda: step(False))
        pl.when(active & ~full)(lambda: step(True))


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A matrix product in float32, exact in its operands' type."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def random_bits(key: tuple[Any, Any], counter: tuple[Any, Any], rolled: bool) -> jax.Array:
    """The first word of `threefry.threefry2x32`, which neither Mosaic nor a kernel without constant arrays can run.

    rolled: rounds in a loop, without which XLA's CPU compiler does not end.
    """
    keys = (key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA), key[0])

    def four_rounds(i, x0, x1, inject0, inject1, odd: Any):
        for even_bits, odd_bits in ((13, 17), (15, 29), (26, 16), (6, 24)):
            rotation = jnp.where(odd, np.uint32(odd_bits), np.uint32(even_bits))
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (np.uint32(32) - rotation)))
        return x0 + inject0, x1 + inject1 + i

    def rolled_rounds(i, carry):
        x0, x1, a, b, c = carry
        number = lax.convert_element_type(i, jnp.uint32) + np.uint32(1)
        return *four_rounds(number, x0, x1, a, b, i % 2 == 1), b, c, a

    x0, x1 = counter[0] + key[0], counter[1] + key[1]
    if rolled:
        return lax.fori_loop(0, 5, rolled_rounds, (x0, x1, *keys))[0]
    for i in range(5):
        x0, x1 = four_rounds(np.uint32(i + 1), x0, x1, keys[i % 3], keys[(i + 1) % 3], i % 2 == 1)
    return x0


def forward_kernel(body: Body, words_ref, shared, q_ref, k_ref, v_ref, out_ref, lse_ref, *scratch):
    """Grid: sequence, query head, query tile, visit. Writes out [U, queries] and lse [1, queries]."""
    sum_UT, max_T, total_T = scratch
    b, n, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _start():
        sum_UT[...] = jnp.zeros_like(sum_UT)
        max_T[...] = jnp.full_like(max_T, LOWEST)
        total_T[...] = jnp.zeros_like(total_T)

    active, tile, code = body.plan.visit(words_ref, b, i, j)

    def step(masked: bool) -> None:
        scores_ST, _ = body.scores(q_ref[...], k_ref[...])
        if masked:
            scores_ST = body.hide(scores_ST, code, tile, shared)
        before = max_T[...]
        now = jnp.maximum(before, scores_ST.max(axis=0, keepdims=True))
        p_ST = jnp.exp2(scores_ST - now)
        shrink = jnp.exp2(before - now)
        max_T[...] = now
        total_T[...] = total_T[...] * shrink + p_ST.sum(axis=0, keepdims=True)
        if body.dropout:
            p_ST = jnp.where(body.keep(words_ref, b, n, shared), p_ST, 0.0)
        v_SU = v_ref[...]
        sum_UT[...] = sum_UT[...] * shrink + dot(v_SU, p_ST.astype(v_SU.dtype), (0, 0))

    body.tile(active, code, step)

    @pl.when(j == pl.num_programs(3) - 1)
    def _end():
        total = total_T[...]
        nothing = total == 0.0
        out_ref[...] = (sum_UT[...] * (body.grown / jnp.where(nothing, 1.0, total))).astype(out_ref.dtype)
        lse = (max_T[...] + jnp.log2(jnp.where(nothing, 1.0, total))) * (1.0 / LOG2_E)
        lse_ref[...] = jnp.where(nothing, -jnp.inf, lse)


def _score_gradient(body: Body, masked, code, tile, b, n, words_ref, shared, q, k, v, dout, rows_ref):
    """(p of what dropout keeps, gradient by the scores before the scale), both [keys, queries] in float32."""
    scores_ST, slope_ST = body.scores(q, k)
    if masked:
        scores_ST = body.hide(scores_ST, code, tile, shared)
    p_ST = jnp.exp2(scores_ST - rows_ref[0:1, :])
    dp_ST = dot(v, dout, (1, 1))
    kept_ST = p_ST
    if body.dropout:
        keep_ST = body.keep(words_ref, b, n, shared)
        kept_ST, dp_ST = jnp.where(keep_ST, p_ST, 0.0), jnp.where(keep_ST, dp_ST * body.grown, 0.0)
    ds_ST = p_ST * (dp_ST - rows_ref[1:2, :])
    if slope_ST is not None:
        ds_ST = ds_ST * slope_ST
    return kept_ST, ds_ST


def dq_kernel(body: Body, words_ref, shared, q_ref, k_ref, v_ref, dout_ref, rows_ref, dq_ref, sum_HT):
    """Grid: sequence, query head, query tile, visit. rows: lse in base 2, delta. Writes dq [H, queries]."""
    b, n, i, j = (pl.program_id(axis) for axis in range(4))

    @pl.when(j == 0)
    def _start():
        sum_HT[...] = jnp.zeros_like(sum_HT)

    active, tile, code = body.plan.visit(words_ref, b, i, j)

    def step(masked: bool) -> None:
        q, k = q_ref[...], k_ref[...]
        place = (masked, code, tile, b, n, words_ref, shared)
        _, ds_ST = _score_gradient(body, *place, q, k, v_ref[...], dout_ref[...], rows_ref)
        sum_HT[...] += dot(k, ds_ST.astype(k.dtype), (0, 0))

    body.tile(active, code, step)

    @pl.when(j == pl.num_programs(3) - 1)
    def _end():
        dq_ref[...] = (sum_HT[...] * body.scale).astype(dq_ref.dtype)


def dkv_kernel(body: Body, words_ref, shared, q_ref, k_ref, v_ref, dout_ref, rows_ref, dk_ref, dv_ref, *scratch):
    """Grid: sequence, kv head, key tile, query head of the group, visit: the group is summed here, in this order."""
    sum_SH, sum_SU = scratch
    b, head, i, g, j = (pl.program_id(axis) for axis in range(5))

    @pl.when((g == 0) & (j == 0))
    def _start():
        sum_SH[...] = jnp.zeros_like(sum_SH)
        sum_SU[...] = jnp.zeros_like(sum_SU)

    active, _, code = body.plan.visit(words_ref, b, i, j)

    def step(masked: bool) -> None:
        q, dout = q_ref[...], dout_ref[...]
        place = (masked, code, i, b, head * body.group + g, words_ref, shared)
        p_ST, ds_ST = _score_gradient(body, *place, q, k_ref[...], v_ref[...], dout, rows_ref)
        sum_SU[...] += dot(p_ST.astype(dout.dtype), dout, (1, 0))
        sum_SH[...] += dot(ds_ST.astype(q.dtype), q, (1, 0))

    body.tile(active, code, step)

    @pl.when((g == body.group - 1) & (j == pl.num_programs(4) - 1))
    def _end():
        dk_ref[...] = (sum_SH[...] * body.scale).astype(dk_ref.dtype)
        dv_ref[...] = (sum_SU[...] * body.grown).astype(dv_ref.dtype)
