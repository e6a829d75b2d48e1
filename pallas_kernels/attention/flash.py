"""What every kernel of flash attention is given and gives back, and the one derivative rule around them all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.threefry import Words, keep_mask, threefry2x32
from pallas_kernels.visible import Visible

OUT, LSE = "attention_out", "attention_lse"
"""Names of the forward pass's results for `jax.checkpoint` policies: saved, both, no kernel runs twice."""


@dataclass(frozen=True)
class Scores:
    """How a query and a key make a probability. Static."""

    scale: float
    softcap: float | None = None
    """c: c tanh(s / c) in place of s (Gemma 2)."""
    dropout: float = 0.0


class Noise(NamedTuple):
    """Which random bits dropout takes: those of global sequence, head, query and key, whoever computes them."""

    words_2B: Words
    """Two uint32 words per sequence."""
    head_N: jax.Array
    query_T: jax.Array
    key_S: jax.Array

    def keep(self, rate: float, query_t: jax.Array, key_s: jax.Array, groups: int) -> jax.Array:
        """keep_BKGts of some of the queries and keys."""
        k0, k1 = (word[:, None, None, None, None] for word in self.words_2B)
        head = self.head_N.reshape(-1, groups).astype(jnp.uint32)[None, :, :, None, None]
        head_key = threefry2x32((k0, k1), (head, jnp.zeros_like(head)))
        t, s = query_t.astype(jnp.uint32), key_s.astype(jnp.uint32)
        return keep_mask(rate, head_key, (t[:, None], s[None, :]))


Grads: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


class Kernel(Protocol):
    """A module with two functions. Shapes: q_BTNH, k_BSKH, v_BSKU, out_BTNU, lse_BNT; N is a multiple of K."""

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Visible, noise: Noise | None, scores: Scores, sizes: Any
    ) -> tuple[jax.Array, jax.Array]:
        """(out in q's dtype, lse in float32, natural log). A query that sees nothing: out 0, lse -inf."""
        ...

    def backward(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: Visible,
        noise: Noise | None,
        scores: Scores,
        lse_BNT: jax.Array,
        delta_BNT: jax.Array,
        dout_BTNU: jax.Array,
        sizes: Any,
    ) -> Grads:
        """Gradients of q, k, v from ds = p (dp - delta), float32 inside."""
        ...


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def flash(
    kernel: Kernel,
    scores: Scores,
    sizes: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: Visible,
    noise: Noise | None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNU, lse_BNT), differentiable in q, k, v through both.

    Source: Dao et al. 2022, algorithms 1 and 2. That lse's own gradient only shifts delta: dlse/ds = p.
    """
    return kernel.forward(q_BTNH, k_BSKH, v_BSKU, mask, noise, scores, sizes)


def _forward(kernel, scores, sizes, q, k, v, mask, noise):
    out, lse = kernel.forward(q, k, v, mask, noise, scores, sizes)
    # Named in here: outside, a policy that saves them would still run the kernel again for its residuals.
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return (out, lse), (q, k, v, mask, noise, out, lse)


def _backward(kernel, scores, sizes, saved, cotangents):
    q, k, v, mask, noise, out, lse = saved
    dout, dlse = cotangents
    delta_BNT = jnp.einsum("BTNU,BTNU->BNT", out, dout, preferred_element_type=jnp.float32) - dlse
    grads = kernel.backward(q, k, v, mask, noise, scores, lse, delta_BNT, dout, sizes)
    return *grads, None, None


flash.defvjp(_forward, _backward)


def capped(scores: Scores, raw: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Scores of raw products q k, and the map from their gradient to that of the products."""
    s = raw * scores.scale
    if scores.softcap is None:
        return s, lambda ds: ds * scores.scale
    bent = jnp.tanh(s / scores.softcap)
    return bent * scores.softcap, lambda ds: ds * (1 - bent * bent) * scores.scale
