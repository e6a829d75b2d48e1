"""Attention: builds queries, keys and values, picks the kernel, says which, refuses what was demanded in vain."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.nn import initializers

from mtx.errors import ConfigError, Problem
from mtx.layers import Context, Rotary, add_bias, vector, weight
from mtx.spmd import ManualDoors
from pallas_kernels.masks import Mask
from pallas_kernels.plain_attention import cached_attention, plain_attention

log = logging.getLogger("mtx")

BackendName = Literal["auto", "plain", "cudnn", "splash"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head attention; fewer key and value heads than query heads make it grouped (GQA, MQA)."""

    heads: int
    """Query heads N."""
    kv_heads: int | None = None
    """Key and value heads K; None: as many as query heads."""
    head_size: int | None = None
    """Size H of a head; None: width / heads."""
    backend: BackendName = "auto"
    """auto: the first of cudnn (NVIDIA), splash (TPU), plain that can do exactly what is asked."""

    def check(self) -> Iterator[Problem]:
        if self.heads < 1:
            yield "heads", "must be at least 1"
        elif self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            legal = ", ".join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)
            yield "kv_heads", f"must divide heads={self.heads}; legal: {legal}"
        if self.head_size is not None and self.head_size < 1:
            yield "head_size", "must be at least 1"


class Cache(NamedTuple):
    """What attention keeps of earlier tokens: the keys, rotated already, and values of every layer, by slot."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array

    def write(self, layer: jax.Array | int, slot: jax.Array | int, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Cache":
        """T slots of one layer replaced, from `slot`."""
        at = tuple(jnp.asarray(i, jnp.int32) for i in (layer, 0, slot, 0, 0))
        new = (x_BTKH.astype(self.k_LBSKH.dtype)[None] for x_BTKH in (k_BTKH, v_BTKH))
        return Cache(*(lax.dynamic_update_slice(old, x, at) for old, x in zip(self, new, strict=True)))

    def read(self, layer: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """k_BSKH and v_BSKH of one layer."""
        k_BSKH, v_BSKH = (lax.dynamic_index_in_dim(x_LBSKH, layer, keepdims=False) for x_LBSKH in self)
        return k_BSKH, v_BSKH


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
        self.bias_KGH = vector(rngs, "KGH", (K, G, H), 0.0) if bias else None
        self.out_NHD = weight(rngs, "NHD", (N, H, D), initializers.normal(out_std))
        self.out_bias_D = vector(rngs, "D", (D,), 0.0) if bias else None

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """x_BTD of the residual stream -> its update, before dropout, and the cache with these tokens in it."""
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, context)
        if cache is not None:
            assert context.seen_BTS is not None
            cache = cache.write(context.layer, context.slot, k_BTKH, v_BTKH)
            scale = q_BTNH.shape[-1] ** -0.5
            out_BTNH = cached_attention(q_BTNH, *cache.read(context.layer), context.seen_BTS, scale=scale)
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
        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            return attention(q_BTNH, k_BTKH, v_BTKH, context, dropout=self.dropout, backend=self.config.backend)

        if self.remat:
            attend = jax.checkpoint(attend, prevent_cse=context.doors.unrolled)
        return attend(q_BTNH, k_BTKH, v_BTKH)


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, context: Context, *, dropout: float, backend: BackendName
) -> jax.Array:
    """Scaled dot-product attention under `context.mask` by the backend that `choose` names."""
    rate = dropout if context.key_B is not None else 0.0
    H = q_BTNH.shape[-1]
    manual = isinstance(context.doors, ManualDoors)
    chosen = choose(backend, context.doors.platform, str(q_BTNH.dtype), H, q_BTNH.shape[1], context.mask, rate, manual)
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=context.mask.causal, implementation="cudnn"
        )
    if chosen == "splash":
        return _splash(q_BTNH, k_BSKH, v_BSKH, context.mask)
    return plain_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        context.mask,
        context.segment_BT,
        scale=H**-0.5,
        dropout=rate,
        key_B=context.key("attention") if rate else None,
        head_N=context.doors.index("N", q_BTNH, 2) if rate else None,
    )


@lru_cache
def choose(
    backend: BackendName, platform: str, dtype: str, head_size: int, time: int, mask: Mask, dropout: float, manual: bool
) -> BackendName:
    """The backend to run; logged once per distinct question.

    Raises: ConfigError if a demanded backend cannot do exactly what is asked, naming why and one that can.
    """
    reasons: dict[BackendName, str | None] = {
        "cudnn": _cudnn_cannot(platform, dtype, head_size, mask, dropout, manual),
        "splash": _splash_cannot(platform, head_size, time, mask, dropout, manual),
        "plain": None,
    }
    if backend != "auto":
        if reason := reasons[backend]:
            raise ConfigError(
                f"model.attention.backend={backend} cannot do this: {reason}; use model.attention.backend=plain, "
                "or auto, which takes the first that can."
            )
        return backend
    able: list[BackendName] = [name for name, reason in reasons.items() if reason is None]
    why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason)
    loud = able[0] == "plain" and platform != "cpu"
    _say_once(
        logging.WARNING if loud else logging.INFO,
        f"attention: {'plain XLA' if able[0] == 'plain' else able[0]}{f' ({why})' if why else ''}",
    )
    return able[0]


@lru_cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


def _cudnn_cannot(platform: str, dtype: str, head_size: int, mask: Mask, dropout: float, manual: bool) -> str | None:
    if platform not in ("gpu", "cuda"):
        return "it needs an NVIDIA GPU"
    if not manual:
        return "it runs inside partition=Manual"
    if dtype not in ("bfloat16", "float16"):
        return f"it needs precision.compute=bfloat16, not {dtype}"
    if head_size % 8 or head_size > 128:
        return f"it needs a head size that is a multiple of 8 up to 128, not {head_size}"
    return _unmasked(mask, dropout)


def _splash_cannot(platform: str, head_size: int, time: int, mask: Mask, dropout: float, manual: bool) -> str | None:
    if platform != "tpu":
        return "it needs a TPU"
    if not manual:
        return "it runs inside partition=Manual"
    if head_size % 128 or time % 128:
        return f"it needs a head size and a length that are multiples of 128, not {head_size} and {time}"
    return _unmasked(mask, dropout)


def _unmasked(mask: Mask, dropout: float) -> str | None:
    if mask.documents:
        return "it does not see document borders (data.isolate_documents=false has none)"
    return "it has no dropout" if dropout else None


def _splash(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, N, H = q_BTNH.shape
    one = masks.CausalMask((T, T)) if mask.causal else masks.FullMask((T, T))
    block = next(size for size in (512, 256, 128) if T % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    heads = masks.MultiHeadMask([one] * N)
    kernel = splash.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH * H**-0.5, k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(kernel)(q, k, v)
    return jnp.swapaxes(out_BNTH, 1, 2)  # pyrefly: ignore[bad-argument-type]: a pair only with save_residuals
