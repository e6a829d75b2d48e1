"""Attention under one contract, whichever backend runs it: no mask is ignored, no combination is done halfway.

`flash_attention` is the door. Backends, in the order in which `choose` prefers them: cudnn and hopper on NVIDIA GPUs,
splash and tpu on TPUs, plain (all scores at once) for few keys, chunked (tiles, in plain JAX) for everything else.
"""

import logging
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.flash import LSE, OUT, Noise, Scores, flash
from pallas_kernels.attention.plain import cached_attention, plain_attention
from pallas_kernels.attention.question import Chip, Question
from pallas_kernels.attention.sizes import sizes_for
from pallas_kernels.masks import BoundMask, Documents
from pallas_kernels.threefry import Words

__all__ = [
    "LSE", "OUT", "BackendName", "Chip", "Dropout", "Question", "Scores", "Unable", "cached_attention", "cannot",
    "choose", "flash_attention", "module", "refuse", "with_sinks",
]  # fmt: skip

BackendName = Literal["auto", "plain", "chunked", "cudnn", "hopper", "splash", "tpu"]
"""chunked, hopper and tpu are `flash.Kernel`s: they give lse, and share one derivative rule."""

log = logging.getLogger("mtx")


class Unable(ValueError):
    """No backend, or not the demanded one, can do exactly what is asked. Says why, and which one can."""


class Dropout(NamedTuple):
    """Of probabilities; the bits depend on global indices alone, never on who computes them."""

    rate: float
    words_2B: Words
    """Two uint32 words per sequence."""
    head_N: jax.Array
    """Global head indices."""


def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKU: jax.Array,
    mask: BoundMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    dropout: Dropout | None = None,
    backend: BackendName = "auto",
    chip: Chip | None = None,
    sizes: Any = None,
    with_lse: bool = False,
    remat: bool = False,
) -> Any:
    """softmax(scale q k, where the mask shows it) v, without T x S scores in memory; float32 inside.

    Call it where shapes are one device's: on one device or inside a `jax.shard_map` over all mesh axes. N must be a
    multiple of K; keys and values are never repeated. Differentiable in q, k, v and sinks, through lse too.

    Args:
        mask: `masks.bind(...)`: what is seen. Without explicit positions query 0 is beside key 0.
        scale: H ** -0.5 by default.
        softcap: c tanh(s / c) in place of each score s.
        sinks_N: per head the logit of a key that everyone sees and whose value is 0 (Xiao et al. 2023; gpt-oss).
        dropout: of probabilities.
        backend: `auto` takes the first that can, and says which and why, once.
        chip: what it will run on; the first local device by default.
        sizes: tiles, in the backend's own terms; by default from the table of `sizes.py`.
        with_lse: whether to return lse too.
        remat: plain computes its scores again in the backward pass, as the others always do.

    Returns: out_BTNU in q's dtype, and if asked lse_BNT, float32: the natural log of the sum of exponentials. Where a
        query sees nothing, out is 0, lse -inf, and gradients are 0.

    Raises: Unable, if the demanded backend cannot do exactly this; ValueError for arguments that nothing can.
    """
    B, T, N, H = q_BTNH.shape
    S, K, U = v_BSKU.shape[1:]
    _check_shapes(q_BTNH, k_BSKH, v_BSKU, mask)
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; None has no cap")
    if dropout is not None and not 0 <= dropout.rate < 1:
        raise ValueError(f"dropout.rate={dropout.rate} must be at least 0 and below 1")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale={scale} must be positive")
    if dropout is not None and dropout.rate == 0:
        dropout = None
    chip = Chip.of(jax.devices()[0]) if chip is None else chip
    asked = Question(
        chip=chip,
        dtype=str(q_BTNH.dtype),
        mask=mask.mask,
        rows=B,
        queries=T,
        keys=S,
        heads=N,
        kv_heads=K,
        head_size=H,
        value_size=U,
        positions=mask.query_T is not None or mask.key_S is not None,
        key_segments=mask.key_segment_BS is not None,
        softcap=softcap is not None,
        dropout=dropout is not None,
        lse=with_lse or sinks_N is not None,
    )
    name = choose(backend, asked)
    scores = Scores(H**-0.5 if scale is None else scale, softcap, 0.0 if dropout is None else dropout.rate)
    noise = None
    if dropout is not None:
        t = jnp.arange(T) if mask.query_T is None else mask.query_T
        s = jnp.arange(S) if mask.key_S is None else mask.key_S
        noise = Noise(dropout.words_2B, dropout.head_N, t, s)
    if mask.unseen_keys():  # whatever they hold, even NaN, meets probabilities of 0
        seen_BS11 = mask.visible().seen_keys()[..., None, None]
        k_BSKH, v_BSKU = jnp.where(seen_BS11, k_BSKH, 0), jnp.where(seen_BS11, v_BSKU, 0)
    if name in ("cudnn", "splash"):
        return module(name).attend(q_BTNH, k_BSKH, v_BSKU, mask, scores)
    if name == "plain":
        attend = jax.checkpoint(plain_attention, static_argnums=5) if remat else plain_attention
        out, lse = attend(q_BTNH, k_BSKH, v_BSKU, mask, noise, scores)
    else:
        kernel = module(name)
        sizes = sizes_for(kernel, asked) if sizes is None else sizes
        out, lse = flash(kernel, scores, sizes, q_BTNH, k_BSKH, v_BSKU, mask.visible(), noise)
    if sinks_N is not None:
        out, lse = with_sinks(out, lse, sinks_N)
    return (out, lse) if with_lse else out


def with_sinks(out_BTNU: jax.Array, lse_BNT: jax.Array, sinks_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same attention beside one more key per head, with the sink as its logit and a value of 0."""
    sink_N1, blind_BNT = sinks_N.astype(jnp.float32)[:, None], lse_BNT == -jnp.inf
    lse_BNT = jnp.where(blind_BNT, 0.0, lse_BNT)  # a sink may be -inf too: no sink
    sunk_BNT = jnp.logaddexp(lse_BNT, sink_N1)
    share_BTN = jnp.swapaxes(jnp.where(blind_BNT, 0.0, jnp.exp(lse_BNT - sunk_BNT)), 1, 2)
    return (out_BTNU * share_BTN[..., None]).astype(out_BTNU.dtype), jnp.where(blind_BNT, sink_N1, sunk_BNT)


@lru_cache
def choose(backend: BackendName, asked: Question) -> BackendName:
    """The backend to run. Says it once per distinct choice and reasons.

    Raises: Unable, if the demanded backend cannot do exactly what is asked, naming why and one that can.
    """
    refuse(backend, asked)
    chosen, why = _first_able(asked)
    if backend != "auto":
        chosen, why = backend, "asked for"
    if [c.patterns for c in asked.mask.conjunctions(own=not asked.key_segments)] != [frozenset()]:
        why = "; ".join(filter(None, ["by lists of tiles: the mask is not one interval", why]))
    slow = chosen in ("plain", "chunked") and asked.chip.platform != "cpu"
    _say_once(logging.WARNING if slow else logging.INFO, f"attention: {chosen}{f' ({why})' if why else ''}")
    return chosen


def refuse(backend: BackendName, asked: Question) -> None:
    """Raises: Unable, if a demanded backend cannot do exactly what is asked, naming why and one that can."""
    if backend != "auto" and (reason := cannot(backend, asked)) is not None:
        able, _ = _first_able(asked)
        raise Unable(f"backend={backend} cannot do this: {reason}; use backend={able}, or auto.")


def _first_able(asked: Question) -> tuple[BackendName, str]:
    """The first backend for this chip that can, and why not those before it."""
    reasons: dict[BackendName, str] = {}
    for name in _order(asked):
        if (reason := cannot(name, asked)) is None:
            return name, "; ".join(f"not {other}: {why}" for other, why in reasons.items())
        reasons[name] = reason
    raise AssertionError("chunked and plain can do all")


def cannot(name: BackendName, asked: Question) -> str | None:
    """Why a backend cannot do exactly this; None if it can."""
    if name in ("plain", "chunked"):
        return None
    return module(name).cannot(asked)


def module(name: BackendName) -> ModuleType:
    """A backend's module, imported when it is used: Pallas takes its time."""
    if name == "cudnn":
        from pallas_kernels.attention import cudnn as found
    elif name == "hopper":
        from pallas_kernels.attention import hopper as found
    elif name == "splash":
        from pallas_kernels.attention import splash as found
    elif name == "tpu":
        from pallas_kernels.attention import tpu as found
    else:
        from pallas_kernels.attention import chunked as found
    return found


FEW_SCORES = 512 * 512
"""Up to so many queries x keys, all scores at once are as quick as tiles on a CPU (benchmarks/attention.py)."""


def _order(asked: Question) -> tuple[BackendName, ...]:
    """Backends for this chip, the best first."""
    few = asked.chip.platform == "cpu" and asked.queries * asked.keys <= FEW_SCORES
    tpu: tuple[BackendName, ...] = ("splash", "tpu")
    if asked.mask.has(Documents):
        tpu = ("tpu", "splash")  # splash visits what other documents hide
    first: dict[str, tuple[BackendName, ...]] = {"gpu": ("cudnn", "hopper"), "tpu": tpu}
    return *first.get(asked.chip.platform, ()), "plain" if few else "chunked"


@lru_cache
def _say_once(level: int, message: str) -> None:
    log.log(level, message)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, mask: BoundMask) -> None:
    (B, T, N, H), (B_k, S, K, H_k) = q.shape, k.shape
    if v.shape[:3] != (B, S, K) or B_k != B or H_k != H or N % K:
        raise ValueError(f"q_BTNH {q.shape}, k_BSKH {k.shape}, v_BSKU {v.shape}: B, S, K, H must agree, and K divide N")
    if (mask.queries, mask.keys) != (T, S):
        raise ValueError(f"the mask is bound to {mask.queries} queries and {mask.keys} keys; q has {T}, k has {S}")
