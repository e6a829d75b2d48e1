"""Flash attention without a kernel: loops over tiles in plain JAX, on every platform, with every feature.

Memory is that of a tile of scores, and tiles that no query sees are not visited. XLA keeps a tile's scores in memory,
so a real kernel is quicker where there is one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.flash import Grads, Noise, Scores, capped
from pallas_kernels.attention.question import Question
from pallas_kernels.masks import Visible

_HIDDEN = -1e30


class Sizes(NamedTuple):
    """Queries and keys of a tile."""

    q: int = 512
    k: int = 512


def default_sizes(asked: Question) -> Sizes:
    return Sizes()


class _Tiled(NamedTuple):
    """One call's arrays, padded to whole tiles, and how to read tiles of them."""

    q_BTKGH: jax.Array
    k_BSKH: jax.Array
    v_BSKU: jax.Array
    mask: Visible
    noise: Noise | None
    scores: Scores
    sizes: Sizes

    @classmethod
    def of(cls, q_BTNH, k_BSKH, v_BSKU, mask: Visible, noise: Noise | None, scores: Scores, sizes: Sizes) -> "_Tiled":
        B, T, N, H = q_BTNH.shape
        S, K = k_BSKH.shape[1:3]
        sizes = Sizes(min(sizes.q, T), min(sizes.k, S))
        q_BTKGH = padded(q_BTNH, sizes.q).reshape(B, -1, K, N // K, H)
        if noise is not None:
            query_T, key_S = padded(noise.query_T, sizes.q, 0), padded(noise.key_S, sizes.k, 0)
            noise = noise._replace(query_T=query_T, key_S=key_S)
        return cls(q_BTKGH, padded(k_BSKH, sizes.k), padded(v_BSKU, sizes.k), mask, noise, scores, sizes)

    def rows(self, x: jax.Array, i: jax.Array, axis: int = 1) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, i * self.sizes.q, self.sizes.q, axis)

    def columns(self, x: jax.Array, j: jax.Array, axis: int = 1) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, j * self.sizes.k, self.sizes.k, axis)

    def score(self, i: jax.Array, j: jax.Array):
        """(s_BKGts with the mask in it, the map from its gradient to that of q k)."""
        raw = jnp.einsum(
            "BtKGH,BsKH->BKGts",
            self.rows(self.q_BTKGH, i),
            self.columns(self.k_BSKH, j),
            preferred_element_type=jnp.float32,
        )
        s_BKGts, back = capped(self.scores, raw)
        t, s = i * self.sizes.q + jnp.arange(self.sizes.q), j * self.sizes.k + jnp.arange(self.sizes.k)
        return jnp.where(self.mask.seen(t, s)[:, None, None], s_BKGts, _HIDDEN), back

    def dropped(self, p_BKGts: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        if self.noise is None:
            return p_BKGts
        t, s = self.rows(self.noise.query_T, i, 0), self.columns(self.noise.key_S, j, 0)
        keep = self.noise.keep(self.scores.dropout, t, s, self.q_BTKGH.shape[3])
        return jnp.where(keep, p_BKGts / (1.0 - self.scores.dropout), 0.0)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Visible, noise: Noise | None, scores: Scores, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """See `flash.Kernel`."""
    B, T, N, _ = q.shape
    K, U = v.shape[2:]
    x = _Tiled.of(q, k, v, mask, noise, scores, sizes)
    visits = mask.span(x.sizes.q, x.sizes.k)

    def tile(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def visit(j: jax.Array, carry):
            out_BKGtU, total_BKGt, top_BKGt = carry
            s_BKGts, _ = x.score(i, j)
            top = jnp.maximum(top_BKGt, jnp.max(s_BKGts, -1))
            p_BKGts = jnp.where(s_BKGts > _HIDDEN, jnp.exp(s_BKGts - top[..., None]), 0.0)
            shrink = jnp.exp(top_BKGt - top)
            new = jnp.einsum(
                "BKGts,BsKU->BKGtU",
                x.dropped(p_BKGts, i, j).astype(v.dtype),
                x.columns(x.v_BSKU, j),
                preferred_element_type=jnp.float32,
            )
            return out_BKGtU * shrink[..., None] + new, total_BKGt * shrink + jnp.sum(p_BKGts, -1), top

        shape = (B, K, N // K, x.sizes.q)
        start = (jnp.zeros((*shape, U), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, _HIDDEN))
        out_BKGtU, total, top = lax.fori_loop(visits.start[0, i], visits.stop[0, i], visit, start)
        blind = total == 0.0
        total = jnp.where(blind, 1.0, total)
        lse_BKGt = jnp.where(blind, -jnp.inf, top + jnp.log(total))
        return jnp.einsum("BKGtU->BtKGU", out_BKGtU / total[..., None]).astype(q.dtype), lse_BKGt

    out_IBtKGU, lse_IBKGt = lax.map(tile, jnp.arange(x.q_BTKGH.shape[1] // x.sizes.q))
    out_BTNU = jnp.moveaxis(out_IBtKGU, 0, 1).reshape(B, -1, N, U)[:, :T]
    lse_BNT = jnp.moveaxis(lse_IBKGt, 0, 3).reshape(B, N, -1)[:, :, :T]
    return out_BTNU, lse_BNT


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
    K, U = v.shape[2:]
    x = _Tiled.of(q, k, v, mask, noise, scores, sizes)
    visits = mask.span(x.sizes.q, x.sizes.k)
    dout_BTKGU = padded(dout_BTNU, x.sizes.q).reshape(B, -1, K, N // K, U)
    lse, delta = (padded(y, x.sizes.q, 2).reshape(B, K, N // K, -1) for y in (lse_BNT, delta_BNT))

    def tile(sums, i: jax.Array):
        dout_BtKGU, q_BtKGH = x.rows(dout_BTKGU, i), x.rows(x.q_BTKGH, i)
        lse_BKGt, delta_BKGt = x.rows(lse, i, 3), x.rows(delta, i, 3)
        finite_BKGt = jnp.where(lse_BKGt == -jnp.inf, 0.0, lse_BKGt)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)

        def visit(j: jax.Array, carry):
            dq_BtKGH, dk_BSKH, dv_BSKU = carry
            s_BKGts, back = x.score(i, j)
            p_BKGts = jnp.where(s_BKGts > _HIDDEN, jnp.exp(s_BKGts - finite_BKGt[..., None]), 0.0)
            dv = product("BKGts,BtKGU->BsKU", x.dropped(p_BKGts, i, j).astype(v.dtype), dout_BtKGU)
            dp_BKGts = x.dropped(product("BtKGU,BsKU->BKGts", dout_BtKGU, x.columns(x.v_BSKU, j)), i, j)
            ds_BKGts = back(p_BKGts * (dp_BKGts - delta_BKGt[..., None])).astype(q.dtype)
            dk = product("BKGts,BtKGH->BsKH", ds_BKGts, q_BtKGH)
            dq_BtKGH += product("BKGts,BsKH->BtKGH", ds_BKGts, x.columns(x.k_BSKH, j))
            return dq_BtKGH, *(
                lax.dynamic_update_slice_in_dim(y, x.columns(y, j) + new, j * x.sizes.k, 1)
                for y, new in ((dk_BSKH, dk), (dv_BSKU, dv))
            )

        dq = jnp.zeros(q_BtKGH.shape, jnp.float32)
        dq, *sums = lax.fori_loop(visits.start[0, i], visits.stop[0, i], visit, (dq, *sums))
        return tuple(sums), dq.astype(q.dtype)

    zeros = tuple(jnp.zeros(y.shape, jnp.float32) for y in (x.k_BSKH, x.v_BSKU))
    (dk, dv), dq_IBtKGH = lax.scan(tile, zeros, jnp.arange(x.q_BTKGH.shape[1] // x.sizes.q))
    dq = jnp.moveaxis(dq_IBtKGH, 0, 1).reshape(B, -1, N, H)[:, :T]
    return dq, dk[:, : k.shape[1]].astype(k.dtype), dv[:, : v.shape[1]].astype(v.dtype)


def padded(x: jax.Array, multiple: int, axis: int = 1) -> jax.Array:
    """Zeros behind, so that an axis is a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
