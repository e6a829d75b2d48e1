"""Attention in plain JAX: exact, differentiable, on every platform; the twin of every kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.masks import Mask
from pallas_kernels.threefry import Words, keep_mask, threefry2x32

HIDDEN = -1e30  # finite, so that a row that sees nothing gives a mean and never NaN


def plain_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    segments_BT: jax.Array,
    *,
    scale: float,
    dropout: float = 0.0,
    key_B: Words | None = None,
    head_N: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k + mask) v in float32, without repeating grouped keys and values.

    Shapes: N is a multiple of K; returns out_BTNH in q's dtype. With dropout, `key_B` holds two uint32
    words per sequence and `head_N` the global head indices, so that the bits do not depend on sharding.
    """
    T, N, K = *q_BTNH.shape[1:3], k_BSKH.shape[2]
    scores_BKGTS = _scores(q_BTNH, k_BSKH, scale)
    p_BKGTS = _probabilities(scores_BKGTS, mask.visible(segments_BT, T))
    if dropout > 0.0:
        assert key_B is not None and head_N is not None
        keep = attention_keep_mask(dropout, key_B, head_N.reshape(K, N // K), T)
        p_BKGTS = jnp.where(keep, p_BKGTS / (1.0 - dropout), 0.0)
    return _mix(p_BKGTS, v_BSKH)


def cached_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen_BTS: jax.Array, *, scale: float
) -> jax.Array:
    """`plain_attention` of queries to the slots of a cache: `seen_BTS` says which of them each query sees."""
    return _mix(_probabilities(_scores(q_BTNH, k_BSKH, scale), seen_BTS), v_BSKH)


def _scores(q_BTNH: jax.Array, k_BSKH: jax.Array, scale: float) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    return jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale


def _probabilities(scores_BKGTS: jax.Array, seen_BTS: jax.Array | None) -> jax.Array:
    if seen_BTS is not None:
        scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, HIDDEN)
    return jax.nn.softmax(scores_BKGTS, axis=-1)


def _mix(p_BKGTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    B, T, K, G, H = out_BTKGH.shape
    return out_BTKGH.reshape(B, T, K * G, H)


def attention_keep_mask(rate: float, key_B: Words, head_KG: jax.Array, time: int) -> jax.Array:
    """keep_BKGTS: a pure function of the sequence's key and the global head, query and key indices."""
    k0, k1 = (word[:, None, None, None, None] for word in key_B)
    head = head_KG.astype(jnp.uint32)[None, :, :, None, None]
    head_key = threefry2x32((k0, k1), (head, jnp.zeros_like(head)))
    i = jnp.arange(time, dtype=jnp.uint32)
    return keep_mask(rate, head_key, (i[:, None], i[None, :]))
