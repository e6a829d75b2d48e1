"""Norms, dense projections, embeddings, rotary positions, dropout: modules whose weights name their dimensions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn import initializers

from mtx.errors import Problem
from mtx.layout import Role, Weight
from mtx.spmd import Activations
from mtx.sums import Statistics, Sums
from pallas_kernels.masks import Mask
from pallas_kernels.threefry import Words, keep_mask, threefry2x32


@dataclass(frozen=True)
class Slots:
    """Slots of a layer's cache that take T more tokens, and what these see."""

    seen_BTS: jax.Array
    """Which slots each token sees; where they are `alone`, which of the T tokens."""
    first: jax.Array | int = 0
    """In a cache of all tokens: the slot of the first one; the others' follow."""
    token_BS: jax.Array | None = None
    """In a cache of each row's last tokens: which of the T tokens a slot takes; -1 keeps what it has."""
    alone: bool = False
    """The tokens see one another alone, and the cache is empty."""


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares."""

    doors: Activations
    mask: Mask
    segment_BT: jax.Array
    position_BT: jax.Array
    key_B: Words | None
    """Two uint32 words per sequence, from (seed, global sample index); None without dropout."""
    prefix_BT: jax.Array | None = None
    """Where each token's prefix ends, for objectives that have one."""
    type_BT: jax.Array | None = None
    """Which of two texts each token is of, for models that read pairs."""
    layer: jax.Array | int = 0
    row: jax.Array | int = 0
    """With a cache: which of its rows is this layer's."""
    slots: Slots | None = None
    """With a cache: where tokens go, and which each sees, instead of what mask and segments say."""

    def key(self, purpose: Literal["embedding", "attention", "attention_out", "mlp_out"]) -> Words:
        """Words per sequence for one use of randomness in this layer."""
        assert self.key_B is not None
        number = ("embedding", "attention", "attention_out", "mlp_out").index(purpose)
        return threefry2x32(self.key_B, (jnp.asarray(self.layer, jnp.uint32), np.uint32(number)))


def weight(
    rngs: nnx.Rngs,
    dims: str,
    shape: tuple[int, ...],
    init: initializers.Initializer,
    *,
    meets: str = "BTD",
    role: Role = "matrix",
    trainable: bool = True,
) -> nnx.Param:
    """Declare a weight, once: its dimensions' letters, its global shape, its initial distribution, its role.

    `meets` are the letters of the activation that it is used with: in an einsum those of the other operand.
    """
    declared = Weight(dims, shape, role, trainable, meets=meets)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), weight=declared)


def vector(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], value: float, *, meets: str) -> nnx.Param:
    """Declare a gain or a bias: float32, never cast, decayed or split by ZeRO."""
    return weight(rngs, dims, shape, initializers.constant(value), meets=meets, role="vector")


def dropout(x_BTD: jax.Array, rate: float, context: Context, purpose) -> jax.Array:
    """Zero elements of the residual stream and scale the rest; the same elements on every mesh."""
    if context.key_B is None or rate == 0.0:
        return x_BTD
    k0, k1 = (word[:, None, None] for word in context.key(purpose))
    time = context.doors.index("BTD", "T", x_BTD).astype(jnp.uint32)[:, None]
    feature = jnp.arange(x_BTD.shape[-1], dtype=jnp.uint32)
    keep = keep_mask(rate, (k0, k1), (time, feature))
    return jnp.where(keep, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Layer normalisation with gain and bias (Ba et al. 2016)."""

    epsilon: float = 1e-5
    """Added to the variance before the root."""

    def check(self) -> Iterator[Problem]:
        if self.epsilon <= 0:
            yield "epsilon", "must be positive"

    def build(self, width: int, rngs: nnx.Rngs) -> "Norm":
        return Norm(self.epsilon, width, True, rngs)


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """Root-mean-square normalisation with gain (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-5
    """Added to the mean square before the root."""

    def check(self) -> Iterator[Problem]:
        if self.epsilon <= 0:
            yield "epsilon", "must be positive"

    def build(self, width: int, rngs: nnx.Rngs) -> "Norm":
        return Norm(self.epsilon, width, False, rngs)


class Norm(nnx.Module):
    """Normalises x_BTD over D in float32; centred and with a bias, or not."""

    def __init__(self, epsilon: float, width: int, centred: bool, rngs: nnx.Rngs):
        self.epsilon, self.centred = epsilon, centred
        self.gain_D = vector(rngs, "D", (width,), 1.0, meets="BTD")
        if centred:
            self.bias_D = vector(rngs, "D", (width,), 0.0, meets="BTD")

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * self.gain_D[...]
        if self.centred:
            x = x + self.bias_D[...]
        return x.astype(x_BTD.dtype)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned table of positions, added to the token embedding."""

    length: int = 1024
    """Rows of the table: the longest sequence."""

    def check(self) -> Iterator[Problem]:
        if self.length < 1:
            yield "length", "must be at least 1"


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of rotary frequencies for long contexts."""

    factor: float = 8.0
    """How many times longer the slowest waves are stretched."""
    low_frequency_factor: float = 1.0
    """Waves with fewer turns than this in original_length are stretched by the whole factor."""
    high_frequency_factor: float = 4.0
    """Waves with more turns than this are kept; between the two they are blended."""
    original_length: int = 8192
    """Tokens per sequence that the model was first trained with."""

    def check(self) -> Iterator[Problem]:
        if self.factor < 1:
            yield "factor", "must be at least 1"
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            yield "low_frequency_factor", "must be positive and below high_frequency_factor"
        if self.original_length < 1:
            yield "original_length", "must be at least 1"


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions (Su et al. 2021), halves rotated against each other as Llama's weights expect."""

    theta: float = 10_000.0
    """Base of the wavelengths; a larger one reaches further."""
    scaling: Llama3Scaling | None = None
    """None: frequencies as they are."""

    def check(self) -> Iterator[Problem]:
        if self.theta <= 1:
            yield "theta", "must be above 1"

    def frequencies(self, head_size: int) -> jax.Array:
        """Radians per position of each of the H/2 planes."""
        rate = self.theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
        if (s := self.scaling) is None:
            return rate
        turns = s.original_length * rate / (2 * math.pi)
        keep = (turns - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * rate + (1 - keep) * rate / s.factor

    def rotate(self, x_BTNH: jax.Array, position_BT: jax.Array) -> jax.Array:
        angle = position_BT[..., None, None].astype(jnp.float32) * self.frequencies(x_BTNH.shape[-1])
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


@dataclass(frozen=True, kw_only=True)
class Gelu:
    """Two projections with a GELU between (GPT-2)."""

    width: int
    """Feed-forward width F."""
    approximate: bool = True
    """The tanh form, which GPT-2 uses; else the exact one."""

    def check(self) -> Iterator[Problem]:
        if self.width < 1:
            yield "width", "must be at least 1"

    def build(self, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs) -> "Mlp":
        return Mlp(self, width, bias, std, out_std, rngs)


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """A gated feed-forward layer: silu(gate) * up (Shazeer 2020)."""

    width: int
    """Feed-forward width F."""

    def check(self) -> Iterator[Problem]:
        if self.width < 1:
            yield "width", "must be at least 1"

    def build(self, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs) -> "Mlp":
        return Mlp(self, width, bias, std, out_std, rngs)


class Mlp(nnx.Module):
    """x_BTD -> F -> x_BTD: one column projection (gate and up in one), one row projection."""

    def __init__(self, config: Gelu | SwiGLU, width: int, bias: bool, std: float, out_std: float, rngs: nnx.Rngs):
        F, D = config.width, width
        self.config, self.bias = config, bias
        init, out_init = initializers.normal(std), initializers.normal(out_std)
        if isinstance(config, SwiGLU):
            self.in_DJF = weight(rngs, "DJF", (D, 2, F), init)
            self.bias_JF = vector(rngs, "JF", (2, F), 0.0, meets="BTJF") if bias else None
        else:
            self.in_DF = weight(rngs, "DF", (D, F), init)
            self.bias_F = vector(rngs, "F", (F,), 0.0, meets="BTF") if bias else None
        self.out_FD = weight(rngs, "FD", (F, D), out_init, meets="BTF")
        self.out_bias_D = vector(rngs, "D", (D,), 0.0, meets="BTD") if bias else None

    @property
    def statistics(self) -> Statistics:
        """Declarations of the sums that a feed-forward part returns beside x_BTD."""
        return {}

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        project = context.doors.project
        if isinstance(self.config, SwiGLU):
            h_BTJF = add_bias(project("BTD,DJF->BTJF", x_BTD, self.in_DJF), self.bias_JF)
            h_BTF = jax.nn.silu(h_BTJF[:, :, 0]) * h_BTJF[:, :, 1]
        else:
            h_BTF = add_bias(project("BTD,DF->BTF", x_BTD, self.in_DF), self.bias_F)
            h_BTF = jax.nn.gelu(h_BTF, approximate=self.config.approximate)
        return add_bias(project("BTF,FD->BTD", h_BTF, self.out_FD), self.out_bias_D), {}


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    return x if bias is None else x + bias[...].astype(x.dtype)
