"""Model FLOPs of a trained token. One convention, named once."""

import math
from collections.abc import Collection

from mtx.model import Model, flatten

CONVENTION = "model FLOPs of PaLM, appendix B: 6 per matmul weight and token, 12 LTNH of attention, causal not halved"
"""What MFU and TFLOP/s mean here, for banners and logs."""


def flops_per_token(model: Model, sequence_length: int, frozen: Collection[str] = ()) -> float:
    """Model FLOPs of one trained token, forward and backward (Chowdhery et al. 2022, appendix B).

    6 per element of every weight that tokens are multiplied with: 2 forward, 4 backward, or 2 if its name is in
    `frozen`, for lack of a gradient. The head counts once, tied or not, and over the padded vocabulary; embedding
    lookups, norms and biases count nothing. Attention adds 12 L T N H, kind by kind of layer: queries with keys, and
    probabilities with values, over all T keys. Neither a causal mask nor a window makes it less, remat adds nothing.
    """
    weights = flatten(model.ordered_weights)
    head = "ends/token_VD" if model.config.tied_head else None
    counted = {name: math.prod(w.shape) for name, w in weights.items() if w.treatment.multiplied or name == head}
    matmul = sum((4.0 if name in frozen else 6.0) * size for name, size in counted.items())
    attention = sum(kind.count * kind.config.attention.heads * kind.config.head_size for kind in model.kinds)
    return matmul + 12.0 * sequence_length * attention
