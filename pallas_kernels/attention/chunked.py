"""Flash attention without a kernel: loops over tiles in plain JAX, on every platform, with every feature.

Memory is that of a tile of scores. A query tile visits the key tiles that some row of the batch shows it. XLA keeps a
tile's scores in memory, so a real kernel is quicker where there is one.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.flash import Grads, Noise, Scores, capped
from pallas_kernels.attention.question import Question
from pallas_kernels.visible import Visible

_HIDDEN = -1e30


@dataclass(frozen=True)
class Sizes:
    """Queries and keys of a tile."""

    q: int
    k: int


def default_sizes(asked: Question) -> Sizes:
    """On a CPU what stays in its cache; elsewhere, unmeasured, what keeps a chip busy."""
    return Sizes(256, 256) if asked.chip.platform == "cpu" else Sizes(512, 512)


def candidates(asked: Question) -> list[Sizes]:
    """What `benchmarks.tune_attention` tries."""
    return [Sizes(q, k) for q in (128, 256, 512, 1024) for k in (128, 256, 512, 1024) if q <= asked.queries]


class _Tiled(NamedTuple):
    """One call's arrays, heads before time and padded to whole tiles, and how to read tiles of them."""

    q_BKGTH: jax.Array
    k_BKSH: jax.Array
    v_BKSU: jax.Array
    mask: Visible
    noise: Noise | None
    scores: Scores
    sizes: Sizes

    @classmethod
    def of(cls, q_BTNH, k_BSKH, v_BSKU, mask: Visible, noise: Noise | None, scores: Scores, sizes: Sizes) -> "_Tiled":
        sizes = Sizes(min(sizes.q, q_BTNH.shape[1]), min(sizes.k, k_BSKH.shape[1]))
        if noise is not None:
            query_T, key_S = padded(noise.query_T, sizes.q, 0), padded(noise.key_S, sizes.k, 0)
            noise = noise._replace(query_T=query_T, key_S=key_S)
        k_BKSH, v_BKSU = (jnp.swapaxes(padded(x, sizes.k), 1, 2) for x in (k_BSKH, v_BSKU))
        return cls(grouped(padded(q_BTNH, sizes.q), k_BSKH.shape[2]), k_BKSH, v_BKSU, mask, noise, scores, sizes)

    def rows(self, x: jax.Array, i: jax.Array, axis: int = 3) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * self.sizes.q, self.sizes.q, axis)

    def columns(self, x: jax.Array, j: jax.Array, axis: int = 2) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, j * self.sizes.k, self.sizes.k, axis)

    def score(self, i: jax.Array, j: jax.Array):
        """(s_BKGts with the mask in it, the map from its gradient to that of q k)."""
        q_BKGtH, k_BKsH = self.rows(self.q_BKGTH, i), self.columns(self.k_BKSH, j)
        raw = jnp.einsum("BKGtH,BKsH->BKGts", q_BKGtH, k_BKsH, preferred_element_type=jnp.float32)
        s_BKGts, back = capped(self.scores, raw)
        t, s = i * self.sizes.q + jnp.arange(self.sizes.q), j * self.sizes.k + jnp.arange(self.sizes.k)
        return jnp.where(self.mask.seen(t, s)[:, None, None], s_BKGts, _HIDDEN), back

    def dropped(self, p_BKGts: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        if self.noise is None:
            return p_BKGts
        t, s = self.rows(self.noise.query_T, i, 0), self.columns(self.noise.key_S, j, 0)
        keep = self.noise.keep(self.scores.dropout, t, s, self.q_BKGTH.shape[2])
        return jnp.where(keep, p_BKGts / (1.0 - self.scores.dropout), 0.0)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Visible, noise: Noise | None, scores: Scores, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """See `flash.Kernel`."""
    B, T, N, _ = q.shape
    x = _Tiled.of(q, k, v, mask, noise, scores, sizes)
    visited = mask.shown(x.sizes.q, x.sizes.k)
    index, count = jnp.argsort(~visited, axis=1, stable=True), jnp.sum(visited, axis=1)
    shape = (*x.q_BKGTH.shape[:3], x.sizes.q)

    def tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def visit(n: jax.Array, carry):
            j, (out_BKGtU, total_BKGt, top_BKGt) = index[i, n], carry
            s_BKGts, _ = x.score(i, j)
            top = jnp.maximum(top_BKGt, jnp.max(s_BKGts, -1))
            p_BKGts = jnp.where(s_BKGts > _HIDDEN, jnp.exp(s_BKGts - top[..., None]), 0.0)
            shrink = jnp.exp(top_BKGt - top)
            new = jnp.einsum(
                "BKGts,BKsU->BKGtU",
                x.dropped(p_BKGts, i, j).astype(v.dtype),
                x.columns(x.v_BKSU, j),
                preferred_element_type=jnp.float32,
            )
            return out_BKGtU * shrink[..., None] + new, total_BKGt * shrink + jnp.sum(p_BKGts, -1), top

        start = (jnp.zeros((*shape, v.shape[3]), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _HIDDEN))
        out_BKGtU, total, top = lax.fori_loop(0, count[i], visit, start)
        blind = total == 0.0
        total = jnp.where(blind, 1.0, total)
        lse_BKGt = jnp.where(blind, -jnp.inf, top + jnp.log(total))
        return (out_BKGtU / total[..., None]).astype(q.dtype), lse_BKGt

    out_IBKGtU, lse_IBKGt = lax.map(tile, jnp.arange(x.q_BKGTH.shape[3] // x.sizes.q))
    out_BTNU = jnp.einsum("IBKGtU->BItKGU", out_IBKGtU).reshape(B, -1, N, v.shape[3])[:, :T]
    return out_BTNU, jnp.moveaxis(lse_IBKGt, 0, 3).reshape(B, N, -1)[:, :, :T]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Visible,
    noise: Noise | None,
    scores: Scores,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    dout_BTNU: jax.Array,
    sizes: Sizes,
) -> Grads:
    """See `flash.Kernel`. Five products per tile; keys' and values' gradients add up in the order of the queries."""
    B, T, N, H = q.shape
    x = _Tiled.of(q, k, v, mask, noise, scores, sizes)
    visited = mask.shown(x.sizes.q, x.sizes.k)
    index, count = jnp.argsort(~visited, axis=1, stable=True), jnp.sum(visited, axis=1)
    dout_BKGTU = grouped(padded(dout_BTNU, x.sizes.q), k.shape[2])
    lse, delta = (padded(y, x.sizes.q, 2).reshape(*x.q_BKGTH.shape[:4]) for y in (lse_BNT, delta_BNT))
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def tile(sums, i: jax.Array):
        dout_BKGtU, q_BKGtH = x.rows(dout_BKGTU, i), x.rows(x.q_BKGTH, i)
        lse_BKGt, delta_BKGt = x.rows(lse, i), x.rows(delta, i)
        finite_BKGt = jnp.where(lse_BKGt == -jnp.inf, 0.0, lse_BKGt)

        def visit(n: jax.Array, carry):
            j, (dq_BKGtH, dk_BKSH, dv_BKSU) = index[i, n], carry
            s_BKGts, back = x.score(i, j)
            p_BKGts = jnp.where(s_BKGts > _HIDDEN, jnp.exp(s_BKGts - finite_BKGt[..., None]), 0.0)
            dv = product("BKGts,BKGtU->BKsU", x.dropped(p_BKGts, i, j).astype(v.dtype), dout_BKGtU)
            dp_BKGts = x.dropped(product("BKGtU,BKsU->BKGts", dout_BKGtU, x.columns(x.v_BKSU, j)), i, j)
            ds_BKGts = back(p_BKGts * (dp_BKGts - delta_BKGt[..., None])).astype(q.dtype)
            dk = product("BKGts,BKGtH->BKsH", ds_BKGts, q_BKGtH)
            dq_BKGtH += product("BKGts,BKsH->BKGtH", ds_BKGts, x.columns(x.k_BKSH, j))
            return dq_BKGtH, *(
                lax.dynamic_update_slice_in_dim(y, x.columns(y, j) + new, j * x.sizes.k, 2)
                for y, new in ((dk_BKSH, dk), (dv_BKSU, dv))
            )

        dq = jnp.zeros(q_BKGtH.shape, jnp.float32)
        dq, *sums = lax.fori_loop(0, count[i], visit, (dq, *sums))
        return tuple(sums), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(y.shape, jnp.float32) for y in (x.k_BKSH, x.v_BKSU))
    (dk, dv), dq_IBKGtH = lax.scan(tile, zeros, jnp.arange(x.q_BKGTH.shape[3] // x.sizes.q))
    dq = jnp.einsum("IBKGtH->BItKGH", dq_IBKGtH).reshape(B, -1, N, H)[:, :T]
    dk, dv = (jnp.swapaxes(y, 1, 2)[:, : k.shape[1]].astype(k.dtype) for y in (dk, dv))
    return dq, dk, dv


def grouped(x_BTNH: jax.Array, kv_heads: int) -> jax.Array:
    """x_BKGTH"""
    B, T, N, H = x_BTNH.shape
    return jnp.einsum("BTKGH->BKGTH", x_BTNH.reshape(B, T, kv_heads, N // kv_heads, H))


def padded(x: jax.Array, multiple: int, axis: int = 1) -> jax.Array:
    """Zeros behind, so that an axis is a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
