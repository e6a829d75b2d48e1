"""Attention in plain JAX, with all T x S scores: exact, differentiable, anywhere; the twin of every kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.flash import Noise, Scores, capped
from pallas_kernels.masks import BoundMask

HIDDEN = -1e30  # finite, so that no row is NaN


def plain_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, mask: BoundMask, noise: Noise | None, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNU in q's dtype, lse_BNT): softmax(scale q k + mask) v in float32, from the mask's definition.

    Grouped keys and values are not repeated. A query that sees nothing gets 0, and lse = -inf.
    """
    B, T, N, _ = q_BTNH.shape
    s_BKGTS = _scores(q_BTNH, k_BSKH, scores)
    seen_BTS = mask.dense()
    p_BKGTS, lse_BKGT = _probabilities(s_BKGTS, seen_BTS, mask.may_be_blind())
    if noise is not None:
        keep = noise.keep(scores.dropout, noise.query_T, noise.key_S, p_BKGTS.shape[2])
        p_BKGTS = jnp.where(keep, p_BKGTS / (1.0 - scores.dropout), 0.0)
    return _mix(p_BKGTS, v_BSKU), lse_BKGT.reshape(B, N, T)


def cached_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, seen_BTS: jax.Array, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """`plain_attention` of queries to the slots of a cache: `seen_BTS` says which of them each query sees."""
    B, T, N, _ = q_BTNH.shape
    p_BKGTS, lse_BKGT = _probabilities(_scores(q_BTNH, k_BSKH, scores), seen_BTS, True)
    return _mix(p_BKGTS, v_BSKU), lse_BKGT.reshape(B, N, T)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array, scores: Scores) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    return capped(scores, jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32))[0]


def _probabilities(s_BKGTS: jax.Array, seen_BTS: jax.Array | None, may_be_blind: bool) -> tuple[jax.Array, jax.Array]:
    if seen_BTS is not None:
        s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, HIDDEN)
    p_BKGTS, lse_BKGT = jax.nn.softmax(s_BKGTS, axis=-1), jax.nn.logsumexp(s_BKGTS, axis=-1)
    if seen_BTS is not None and may_be_blind:
        sees_B11T = jnp.any(seen_BTS, -1)[:, None, None]
        p_BKGTS, lse_BKGT = jnp.where(sees_B11T[..., None], p_BKGTS, 0.0), jnp.where(sees_B11T, lse_BKGT, -jnp.inf)
    return p_BKGTS, lse_BKGT


def _mix(p_BKGTS: jax.Array, v_BSKU: jax.Array) -> jax.Array:
    out_BTKGU = jnp.einsum("BKGTS,BSKU->BTKGU", p_BKGTS.astype(v_BSKU.dtype), v_BSKU)
    B, T, K, G, U = out_BTKGU.shape
    return out_BTKGU.reshape(B, T, K * G, U)
