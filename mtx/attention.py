"""Attention: builds queries, keys and values and their mask; `pallas_kernels.attention` picks what runs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers

from mtx.errors import ConfigError, Problem
from mtx.layers import Context, Rotary, Slots, add_bias, vector, weight
from mtx.spmd import Activations
from pallas_kernels.attention import (
    BackendName,
    Chip,
    Dropout,
    Question,
    Scores,
    Unable,
    cached_attention,
    choose,
    flash_attention,
    refuse,
    with_sinks,
)
from pallas_kernels.masks import FAR, Blocks, Causal, Documents, Full, Mask, Prefix, Window, bind
from pallas_kernels.patterns import BigBird, Chosen, Fixed, LocalGlobal, Longformer, Strided


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention; fewer key and value heads than query heads make it grouped (GQA, MQA)."""

    heads: int
    """Query heads N."""
    kv_heads: int | None = None
    """Key and value heads K; None: as many as query heads."""
    head_size: int | None = None
    """Size H of a head; None: width / heads."""
    window: int | None = None
    """A token sees only so many nearest tokens on a side, itself among them; None: all."""
    pattern: Fixed | Strided | LocalGlobal | Longformer | BigBird | Chosen | None = None
    """Block-sparse attention: which blocks of keys each block of queries sees (`pallas_kernels.patterns`)."""
    softcap: float | None = None
    """c: scores s become c tanh(s / c) (Gemma 2)."""
    sinks: bool = False
    """A learned logit per head that takes attention and gives nothing (gpt-oss)."""
    backend: BackendName = "auto"
    """auto: the first of cudnn and hopper (NVIDIA), splash and tpu (TPU), plain (few tokens on a CPU), chunked that can
    do exactly what is asked. A named one that cannot is refused."""

    def check(self) -> Iterator[Problem]:
        if self.heads < 1:
            yield "heads", "must be at least 1"
        elif self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            legal = ", ".join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)
            yield "kv_heads", f"must divide heads={self.heads}; legal: {legal}"
        for field in ("head_size", "window"):
            if (value := getattr(self, field)) is not None and value < 1:
                yield field, "must be at least 1"
        if self.window is not None and self.window > FAR:
            yield "window", f"must be at most {FAR}; None sees all"
        if self.softcap is not None and self.softcap <= 0:
            yield "softcap", "must be positive; None has no cap"

    def mask(self, *, causal: bool, documents: bool, prefix: bool = False) -> Mask:
        """What a token of these layers sees. `prefix`: also its prefix, whatever comes first."""
        parts: list[Mask] = []
        if self.window is not None:
            parts.append(Window(self.window - 1, 0 if causal else self.window - 1))
        elif causal:
            parts.append(Causal())
        if prefix:
            parts = [parts[0] | Prefix()]
        if documents:
            parts.append(Documents())
        if self.pattern is not None:
            parts.append(Blocks(self.pattern))
        return reduce(and_, parts) if parts else Full()


class Cache(NamedTuple):
    """Keys, rotated already, and values that attention keeps of earlier tokens: of every layer of a kind, by slot."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    def write(
        self, layer: jax.Array | int, slots: Slots, k_BTKH: jax.Array, v_BTKH: jax.Array, doors: Activations
    ) -> "Cache":
        """One layer's slots with T more tokens in them."""
        at = tuple(jnp.asarray(i, jnp.int32) for i in (layer, 0, slots.first, 0, 0))
        new = [x_BTKH.astype(self.k_LBSKH.dtype) for x_BTKH in (k_BTKH, v_BTKH)]
        if slots.token_BS is not None:
            letters, kept = ("BSKH", "BTKH", "BS"), self.read(layer)
            new = [doors.local(_taken, letters, "BSKH", *x, slots.token_BS) for x in zip(kept, new, strict=True)]
        return Cache(*(lax.dynamic_update_slice(old, x[None], at) for old, x in zip(self, new, strict=True)))

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """k_BSKH and v_BSKH of one layer."""
        k_BSKH, v_BSKH = (lax.dynamic_index_in_dim(x_LBSKH, layer, keepdims=False) for x_LBSKH in self)
        return k_BSKH, v_BSKH


def _taken(old_BSKH: jax.Array, new_BTKH: jax.Array, token_BS: jax.Array) -> jax.Array:
    """Slots that take the tokens of these numbers; -1 keeps what is there."""
    new_BSKH = jnp.take_along_axis(new_BTKH, jnp.maximum(token_BS, 0)[..., None, None], axis=1)
    return jnp.where((token_BS >= 0)[..., None, None], new_BSKH, old_BSKH)


class Attention(nnx.Module):
    """Self-attention with one column projection for queries, keys and values, and one row projection."""

    def __init__(
        self,
        config: AttentionConfig,
        width: int,
        bias: bool,
        rotary: Rotary | None,
        dropout: float,
        remat: bool,
        std: float,
        out_std: float,
        rngs: nnx.Rngs,
    ):
        N, D = config.heads, width
        K, H = config.kv_heads or N, config.head_size or width // N
        G = N // K + 2
        self.config, self.rotary, self.dropout, self.remat = config, rotary, dropout, remat
        self.qkv_DKGH = weight(rngs, "DKGH", (D, K, G, H), initializers.normal(std))
        self.bias_KGH = vector(rngs, "KGH", (K, G, H), 0.0, meets="BTKGH") if bias else None
        self.out_NHD = weight(rngs, "NHD", (N, H, D), initializers.normal(out_std), meets="BTNH")
        self.sink_N = vector(rngs, "N", (N,), 0.0, meets="BTNH") if config.sinks else None
        self.out_bias_D = vector(rngs, "D", (D,), 0.0, meets="BTD") if bias else None

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """x_BTD of the residual stream -> its update, before dropout, and the cache with these tokens in it."""
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, context)
        if cache is not None:
            slots = context.slots
            assert slots is not None
            cache = cache.write(context.row, slots, k_BTKH, v_BTKH, context.doors)
            keys_values = (k_BTKH, v_BTKH) if slots.alone else cache.read(context.row)
            out_BTNH, lse_BNT = cached_attention(q_BTNH, *keys_values, slots.seen_BTS, _scores(self.config, q_BTNH))
            if self.sink_N is not None:
                out_BTNH, _ = with_sinks(out_BTNH, lse_BNT, self.sink_N[...])
        else:
            out_BTNH = self._attend(q_BTNH, k_BTKH, v_BTKH, context)
        return add_bias(context.doors.project("BTNH,NHD->BTD", out_BTNH, self.out_NHD), self.out_bias_D), cache

    def _heads(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries BTNH, keys BTKH and values BTKH."""
        project = context.doors.project
        qkv_BTKGH = add_bias(project("BTD,DKGH->BTKGH", x_BTD, self.qkv_DKGH), self.bias_KGH)
        q_BTKGH, k_BTKH, v_BTKH = qkv_BTKGH[..., :-2, :], qkv_BTKGH[..., -2, :], qkv_BTKGH[..., -1, :]
        B, T, K, G, H = q_BTKGH.shape
        q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
        if self.rotary is not None:
            q_BTNH = self.rotary.rotate(q_BTNH, context.position_BT)
            k_BTKH = self.rotary.rotate(k_BTKH, context.position_BT)
        return q_BTNH, k_BTKH, v_BTKH

    def _attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: Context) -> jax.Array:
        """out_BTNH, where shapes are one device's: the mask is bound and the backend chosen in there."""
        operands = [("BTNH", q_BTNH), ("BSKH", k_BTKH), ("BSKH", v_BTKH)]
        given = {"segments": ("BT", context.segment_BT)} if context.mask.has(Documents) else {}
        if context.mask.has(Prefix):
            assert context.prefix_BT is not None
            given["prefix"] = ("BT", context.prefix_BT)
        if self.sink_N is not None:
            given["sinks"] = ("N", self.sink_N[...])
        if dropped := self.dropout > 0.0 and context.key_B is not None:
            words = context.key("attention")
            given |= {"word0": ("B", words[0]), "word1": ("B", words[1])}
            given["head"] = ("N", context.doors.index("BTNH", "N", q_BTNH))
        chip, scores = Chip.of(context.doors.device), _scores(self.config, q_BTNH)

        def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *values: jax.Array) -> jax.Array:
            named = dict(zip(given, values, strict=True))
            dropout = Dropout(self.dropout, (named["word0"], named["word1"]), named["head"]) if dropped else None
            mask = bind(context.mask, q_BTNH.shape[1], segments=named.get("segments"), prefix=named.get("prefix"))
            with refusing():
                return flash_attention(
                    q_BTNH,
                    k_BSKH,
                    v_BSKH,
                    mask,
                    scale=scores.scale,
                    softcap=scores.softcap,
                    sinks_N=named.get("sinks"),
                    dropout=dropout,
                    backend=self.config.backend,
                    chip=chip,
                    remat=self.remat,
                )

        letters, arrays = zip(*operands, *given.values(), strict=True)
        return context.doors.local(attend, letters, "BTNH", *arrays)


def _scores(config: AttentionConfig, q_BTNH: jax.Array) -> Scores:
    return Scores(q_BTNH.shape[-1] ** -0.5, config.softcap)


@contextmanager
def refusing(path: str = "model.attention") -> Iterator[None]:
    """What no backend, or not the demanded one, can do is the config's mistake, made at this path."""
    try:
        yield
    except Unable as error:
        raise ConfigError(str(error).replace("backend=", f"{path}.backend=")) from None


def choose_backend(
    config: AttentionConfig,
    chip: Chip,
    dtype: str,
    head_size: int,
    mask: Mask,
    *,
    rows: int,
    time: int,
    dropout: float,
    there: bool = True,
    path: str = "model.attention",
) -> BackendName:
    """The backend that a call of these shapes will take, before anything is traced. If the chip is there, says which.

    Raises: ConfigError if a demanded backend cannot do exactly what is asked, naming why, one that can, and `path`, of
    the attention's config.
    """
    asked = Question(
        chip=chip,
        dtype=dtype,
        mask=mask,
        rows=rows,
        queries=time,
        keys=time,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        head_size=head_size,
        value_size=head_size,
        softcap=config.softcap is not None,
        dropout=dropout > 0,
        lse=config.sinks,
    )
    with refusing(path):
        if there:
            return choose(config.backend, asked)
        refuse(config.backend, asked)
    return config.backend
