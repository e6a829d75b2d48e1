"""Ring attention: each device holds part of the sequence, keys and values go round, partial results are merged.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers"; the zig-zag order, which gives every device the
same work under a causal mask, is that of Llama 3's context parallelism (Grattafiori et al. 2024, section 3.3.2).
Call it inside a `shard_map` that is manual over the ring's axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.flash import LSE, OUT, Kernel, Noise, Scores
from pallas_kernels.masks import Mask, bind


class Shard(NamedTuple):
    """Keys and values on their way round, and the segments that go with them."""

    k_BSKH: jax.Array
    v_BSKU: jax.Array
    segment_BS: jax.Array | None


class Fixed(NamedTuple):
    """What stays where it is, beside the queries."""

    segment_BT: jax.Array | None
    prefix_BT: jax.Array | None
    noise: Noise | None
    """Its positions are replaced by those of each step."""


def zigzag_positions(rank: jax.Array | int, ranks: int, length: int) -> jax.Array:
    """int32_T, rising: of 2 x ranks chunks device r holds chunks r and 2 ranks - 1 - r. Length: of one device, even."""
    if length % 2:
        raise ValueError(f"a zig-zag ring needs an even length per device, not {length}")
    half = jnp.arange(length // 2, dtype=jnp.int32)
    return jnp.concatenate([rank * half.size + half, (2 * ranks - 1 - rank) * half.size + half])


def straight_positions(rank: jax.Array | int, ranks: int, length: int) -> jax.Array:
    """int32_T: device r holds the r-th part of the sequence."""
    return rank * length + jnp.arange(length, dtype=jnp.int32)


@dataclass(frozen=True)
class Ring:
    """What is static in a ring."""

    axis: str
    """The mesh axis over which the sequence is sharded."""
    mask: Mask
    """Speaks of positions in the whole sequence; no `Blocks`, which go by index."""
    scores: Scores
    kernel: Kernel
    sizes: Any = None
    positions: Callable[[jax.Array | int, int, int], jax.Array] = field(default=zigzag_positions)
    """(rank, ranks, length of one device) -> int32_T, rising: what part of the sequence a device holds."""

    @property
    def ranks(self) -> int:
        return lax.axis_size(self.axis)

    def owner(self, step: jax.Array | int) -> jax.Array:
        """The device whose keys are here at a step."""
        return (lax.axis_index(self.axis) - step) % self.ranks

    def onward(self, tree: Any) -> Any:
        """Everything to the next device."""
        pairs = [(i, (i + 1) % self.ranks) for i in range(self.ranks)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), tree)

    def step(self, q_BTNH: jax.Array, shard: Shard, fixed: Fixed, step: jax.Array | int) -> tuple[Any, Noise | None]:
        """The mask, lowered, and the noise between the queries here and the keys that are here at a step."""
        T, S = q_BTNH.shape[1], shard.k_BSKH.shape[1]
        query_T = self.positions(lax.axis_index(self.axis), self.ranks, T)
        key_S = self.positions(self.owner(step), self.ranks, S)
        bound = bind(
            self.mask,
            T,
            S,
            segments=fixed.segment_BT,
            key_segments=shard.segment_BS,
            positions=query_T,
            key_positions=key_S,
            prefix=fixed.prefix_BT,
        )
        noise = None if fixed.noise is None else fixed.noise._replace(query_T=query_T, key_S=key_S)
        return bound.visible(), noise


def ring_attention(
    ring: Ring,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    *,
    segment_BT: jax.Array | None = None,
    prefix_BT: jax.Array | None = None,
    noise: Noise | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNU in q's dtype, lse_BNT) of the queries here over the keys of all devices, differentiable through both.

    Args:
        q_BTNH, k_BSKH, v_BSKU: this device's part of the sequence, in the order of `ring.positions`.
        segment_BT: of the tokens here, for `Documents`; they never decrease along positions.
        prefix_BT: as in `masks.bind`.
        noise: of dropout; its positions do not matter, the ring's are taken.

    Source of the backward ring: Liu et al. 2023, appendix A; it needs only the lse of the whole row.
    """
    return _ring(ring, q_BTNH, Shard(k_BSKH, v_BSKU, segment_BT), Fixed(segment_BT, prefix_BT, noise))


def ring_step(
    ring: Ring, q_BTNH: jax.Array, shard: Shard, fixed: Fixed, step: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNU, lse_BNT) of the queries here over the keys that are here at a step; not differentiable."""
    visible, noise = ring.step(q_BTNH, shard, fixed, step)
    return ring.kernel.forward(q_BTNH, shard.k_BSKH, shard.v_BSKU, visible, noise, ring.scores, ring.sizes)


def merge(
    out_BTNU: jax.Array, lse_BNT: jax.Array, other_out_BTNU: jax.Array, other_lse_BNT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over two disjoint sets of keys from that over each, in float32; lse is -inf where nothing is seen."""
    top_BNT = lax.stop_gradient(jnp.maximum(lse_BNT, other_lse_BNT))
    top_BNT = jnp.where(jnp.isneginf(top_BNT), 0.0, top_BNT)
    mine_BNT, other_BNT = jnp.exp(lse_BNT - top_BNT), jnp.exp(other_lse_BNT - top_BNT)
    total_BNT = mine_BNT + other_BNT
    nothing_BNT = total_BNT == 0.0
    total_BNT = jnp.where(nothing_BNT, 1.0, total_BNT)
    mine_BTN1, other_BTN1 = (jnp.swapaxes(x / total_BNT, 1, 2)[..., None] for x in (mine_BNT, other_BNT))
    out = mine_BTN1 * out_BTNU.astype(jnp.float32) + other_BTN1 * other_out_BTNU.astype(jnp.float32)
    return out, jnp.where(nothing_BNT, -jnp.inf, top_BNT + jnp.log(total_BNT))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q_BTNH: jax.Array, shard: Shard, fixed: Fixed) -> tuple[jax.Array, jax.Array]:
    out, lse = ring_step(ring, q_BTNH, shard, fixed, 0)
    ranks = ring.ranks

    def one(carry, step):
        shard, out, lse = carry
        following = ring.onward(shard)  # depends on nothing below: it travels while this step computes
        return (following, *merge(out, lse, *ring_step(ring, q_BTNH, shard, fixed, step))), None

    if ranks > 1:
        carry = ring.onward(shard), out.astype(jnp.float32), lse
        (shard, out, lse), _ = lax.scan(one, carry, jnp.arange(1, ranks - 1))
        out, lse = merge(out, lse, *ring_step(ring, q_BTNH, shard, fixed, ranks - 1))
    return out.astype(q_BTNH.dtype), lse


def _forward(ring: Ring, q_BTNH: jax.Array, shard: Shard, fixed: Fixed):
    out, lse = _ring(ring, q_BTNH, shard, fixed)
    # Named in here: outside, a policy that saves them would still run the ring again for its residuals.
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return (out, lse), (q_BTNH, shard, fixed, out, lse)


def _backward(ring: Ring, saved, cotangents):
    """Gradients of keys and values go round with them, and arrive at home after as many steps as there are devices."""
    q_BTNH, shard, fixed, out, lse = saved
    dout, dlse = cotangents
    delta_BNT = jnp.einsum("BTNU,BTNU->BNT", out, dout, preferred_element_type=jnp.float32) - dlse

    def gradients(shard: Shard, step):
        visible, noise = ring.step(q_BTNH, shard, fixed, step)
        operands = q_BTNH, shard.k_BSKH, shard.v_BSKU, visible, noise, ring.scores
        found = ring.kernel.backward(*operands, lse, delta_BNT, dout, ring.sizes)
        return tuple(x.astype(jnp.float32) for x in found)

    def one(carry, step):
        shard, dq, dk, dv = carry
        following = ring.onward(shard)
        new_dq, new_dk, new_dv = gradients(shard, step)
        return (following, dq + new_dq, *ring.onward((dk + new_dk, dv + new_dv))), None

    ranks, types = ring.ranks, (q_BTNH.dtype, shard.k_BSKH.dtype, shard.v_BSKU.dtype)
    dq, dk, dv = gradients(shard, 0)
    if ranks > 1:
        carry = ring.onward(shard), dq, *ring.onward((dk, dv))
        (last, dq, dk, dv), _ = lax.scan(one, carry, jnp.arange(1, ranks - 1))
        new_dq, new_dk, new_dv = gradients(last, ranks - 1)
        dq, (dk, dv) = dq + new_dq, ring.onward((dk + new_dk, dv + new_dv))
    dq, dk, dv = (x.astype(dtype) for x, dtype in zip((dq, dk, dv), types, strict=True))
    return dq, Shard(dk, dv, None), None


_ring.defvjp(_forward, _backward)
