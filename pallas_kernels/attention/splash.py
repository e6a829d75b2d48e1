"""JAX's splash attention for TPU, with its own derivative: the masks that it knows before compiling, and documents.

It skips tiles that the static part of a mask hides. Documents it only masks, tile by tile: for many short ones `tpu.py`
visits less. Its lse has no gradient, and a query that sees nothing would get a mean of values: both are refused.
"""

from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from pallas_kernels.attention.flash import OUT, Scores
from pallas_kernels.attention.question import Question
from pallas_kernels.attention.tpu_tiles import LANES, pad_to
from pallas_kernels.masks import Blocks, Both, BoundMask, Causal, Documents, Either, Full, Mask, Prefix, Window
from pallas_kernels.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Tiles of splash's three kernels, multiples of 128; the sequence is padded to whole tiles."""

    query: int = 512
    key: int = 512
    interpret: bool = False
    """For tests without a TPU."""


def cannot(asked: Question) -> str | None:
    """Why splash cannot do exactly this; None if it can."""
    if asked.chip.platform != "tpu":
        return "it needs a TPU"
    if asked.dtype != "bfloat16":
        return f"it is used for bfloat16, not {asked.dtype}: how exact its products are is the compiler's choice"
    if asked.dropout or asked.lse:
        return "it has no dropout" if asked.dropout else "its lse (sinks need it) has no gradient"
    if asked.queries != asked.keys or asked.positions or asked.key_segments:
        return "it is used only where queries and keys are the same tokens in order"
    static, _ = _split(asked.mask)
    if static.has(Prefix):
        return "it knows no Prefix: the mask must be known before compiling"
    if static.has(Documents):
        return f"it knows Documents only beside `&`, not {asked.mask}"
    if not _sees_itself(static, asked.queries):
        return "it needs that every query sees itself"
    return None


def default_sizes(time: int, head_size: int, value_size: int, itemsize: int) -> Sizes:
    """Unmeasured: the largest tiles, of those that pad least, within 16 MiB of VMEM, the least of all generations."""
    largest = 512 if (head_size + value_size) * itemsize <= 1024 else 256
    choices = [size for size in (512, 384, 256) if size <= largest]
    size = min(choices, key=lambda size: (time + -time % size, -size))
    size = min(size, time + -time % LANES)
    return Sizes(query=size, key=size)


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, mask: BoundMask, scores: Scores, sizes: Sizes | None = None
) -> jax.Array:
    """out_BTNU. Out and lse carry `flash.OUT` as their name for `jax.checkpoint` policies."""
    _, T, N, H = q_BTNH.shape
    if sizes is None:
        sizes = default_sizes(T, H, v_BSKU.shape[3], q_BTNH.dtype.itemsize)
    static, documents = _split(mask.mask)
    multiple = int(np.lcm(sizes.query, sizes.key))
    q, k, v = (jnp.swapaxes(pad_to(x, 1, multiple), 1, 2) for x in (q_BTNH * scores.scale, k_BSKH, v_BSKU))
    padded = q.shape[2]
    segments_BT = mask.query_segment_BT if documents else None
    if padded != T:  # no query sees the padding but the padding itself
        if segments_BT is None:
            segments_BT = jnp.zeros((q.shape[0], T), jnp.int32)
        segments_BT = pad_to(segments_BT, 1, multiple, -1)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_lowered(static, T, padded)] * N),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=sizes.query,
            block_kv=sizes.key,
            block_q_dkv=sizes.query,
            block_kv_dkv=sizes.key,
            block_q_dq=sizes.query,
            block_kv_dq=sizes.key,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scores.softcap,
        residual_checkpoint_name=OUT,
        interpret=sizes.interpret,
    )
    if segments_BT is None:
        out_BNTU = jax.vmap(kernel)(q, k, v)
    else:
        ids = splash_attention_kernel.SegmentIds(segments_BT, segments_BT)
        out_BNTU = jax.vmap(kernel)(q, k, v, ids)
    assert isinstance(out_BNTU, jax.Array)  # a pair only if residuals are asked for
    return jnp.swapaxes(lax.slice_in_dim(out_BNTU, 0, T, axis=2), 1, 2)


def _split(mask: Mask) -> tuple[Mask, bool]:
    """(what is known before compiling, whether documents go beside it)."""
    conjuncts = _conjuncts(mask)
    static = [part for part in conjuncts if not isinstance(part, Documents)]
    return reduce(Both, static) if static else Full(), len(static) < len(conjuncts)


def _conjuncts(mask: Mask) -> list[Mask]:
    return _conjuncts(mask.left) + _conjuncts(mask.right) if isinstance(mask, Both) else [mask]


def _sees_itself(mask: Mask, time: int) -> bool:
    match mask:
        case Both(left, right):
            return _sees_itself(left, time) and _sees_itself(right, time)
        case Either(left, right):
            return _sees_itself(left, time) or _sees_itself(right, time)
        case Blocks(pattern):
            return bool(_matrix(pattern, time).diagonal().all())
    return True


@lru_cache
def _matrix(pattern: Pattern, time: int) -> np.ndarray:
    return pattern.matrix(time, time)


def _lowered(mask: Mask, time: int, padded: int) -> splash_attention_mask.Mask:
    """Splash computes causal masks and windows from indices; the partial tiles of others it fetches."""
    shape = (padded, padded)
    match mask:
        case Full():
            return splash_attention_mask.FullMask(shape)
        case Causal():
            return splash_attention_mask.CausalMask(shape)
        case Window(before, after):
            return splash_attention_mask.LocalMask(shape, (before, after), 0)
        case Both(Causal(), Window(before, _)) | Both(Window(before, _), Causal()):
            return splash_attention_mask.LocalMask(shape, (before, 0), 0)
    return _Static(mask, time, padded)


@dataclass(frozen=True)
class _Static(splash_attention_mask.Mask):
    """A mask of ours, spelled out only where splash asks. Padding sees all padding."""

    mask: Mask
    time: int
    padded: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.padded, self.padded

    def __getitem__(self, idx: Any) -> np.ndarray:
        t, s = (np.arange(self.padded)[at] for at in idx)
        t, s = t[:, None], s[None, :]
        padding = (t >= self.time) & (s >= self.time)
        return padding | ((t < self.time) & (s < self.time) & self._seen(self.mask, t, s))

    def _seen(self, mask: Mask, t: np.ndarray, s: np.ndarray) -> np.ndarray:
        match mask:
            case Both(left, right):
                return self._seen(left, t, s) & self._seen(right, t, s)
            case Either(left, right):
                return self._seen(left, t, s) | self._seen(right, t, s)
            case Causal():
                return s <= t
            case Window(before, after):
                return (t - before <= s) & (s <= t + after)
            case Blocks(pattern):
                matrix = _matrix(pattern, self.time)
                last = len(matrix) - 1
                return matrix[np.minimum(t // pattern.block, last), np.minimum(s // pattern.block, last)]
        assert isinstance(mask, Full)
        return np.ones((1, 1), bool)
