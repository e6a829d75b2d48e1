"""Model FLOPs of a trained token. One convention, named once."""

import math

from mtx.model import Model, flatten

CONVENTION = "model FLOPs of PaLM, appendix B: 6 per matmul weight and token, 12 LTNH of attention, causal not halved"
"""What MFU and TFLOP/s mean here, for banners and logs."""

_LOOKUPS = ("ends/token_VD", "ends/position_CD")


def flops_per_token(model: Model, sequence_length: int) -> float:
    """Model FLOPs of one trained token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 per element of every matmul weight: 2 forward, 4 backward. The head counts once, tied or not, and over the
    padded vocabulary; embedding lookups, norms and biases count nothing. Attention adds 12 L T N H, kind by kind of
    layer: queries with keys, and probabilities with values, over all T keys. Neither a causal mask nor a window makes
    it less, remat adds nothing.
    """
    config = model.config
    weights = flatten(model.ordered_weights)
    counted = [w for path, w in weights.items() if w.is_matrix and path not in _LOOKUPS]
    matmul = sum(math.prod(w.shape) for w in counted)
    if config.tied_head:
        matmul += math.prod(weights["ends/token_VD"].shape)
    attention = sum(kind.count * kind.config.attention.heads * kind.config.head_size for kind in model.kinds)
    return 6.0 * matmul + 12.0 * sequence_length * attention
