"""cuDNN's fused attention through jax.nn: the quickest on NVIDIA GPUs for the masks that it knows."""

import jax

from pallas_kernels.attention.flash import Scores
from pallas_kernels.attention.question import Question
from pallas_kernels.masks import Both, BoundMask, Causal, Full, Mask, Window


def cannot(asked: Question) -> str | None:
    """Why cuDNN cannot do exactly this; None if it can."""
    if asked.chip.platform != "gpu":
        return "it needs an NVIDIA GPU"
    if asked.chip.capability < 8.0:
        return f"it needs compute capability 8.0, and {asked.chip.kind or 'this GPU'} has {asked.chip.capability}"
    if asked.dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16 or float16, not {asked.dtype}"
    most = 256 if asked.chip.capability >= 9.0 else 128
    if asked.head_size % 8 or asked.head_size > most or asked.value_size != asked.head_size:
        return f"it needs one head size, a multiple of 8 up to {most}, not {asked.head_size} and {asked.value_size}"
    if asked.queries != asked.keys or asked.positions:
        return "it is used only where queries and keys are the same tokens in order"
    if _arguments(asked.mask) is None:
        return f"of masks it knows Full, Causal and Window(before), not {asked.mask}"
    if asked.dropout or asked.softcap or asked.lse:
        missing = "dropout" if asked.dropout else "soft-cap" if asked.softcap else "lse (sinks need it)"
        return f"it has no {missing}"
    return None


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, mask: BoundMask, scores: Scores) -> jax.Array:
    """out_BTNU, with cuDNN's own derivative."""
    arguments = _arguments(mask.mask)
    assert arguments is not None
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKU, scale=scores.scale, implementation="cudnn", **arguments)


def _arguments(mask: Mask) -> dict | None:
    """The mask in cuDNN's terms, or None. It has windows only backward and only beside its causal mask."""
    match mask:
        case Full():
            return {}
        case Causal():
            return {"is_causal": True}
        case Window(before, 0) | Both(Causal(), Window(before, _)) | Both(Window(before, _), Causal()):
            return {"is_causal": True, "local_window_size": (before, 0)}
    return None
