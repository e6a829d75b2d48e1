"""What a sample teaches: pure functions from tokens to a row, one per objective.

Objectives over windows (`CausalLm`, `PrefixLm`, `FillInTheMiddle`, `MaskedLm`, `SpanCorruption`) have one form:
`row(window, frame, draws)`, with windows of `window_length(sequence_length)` targets and draws from
`generator(seed, objective.purpose, source, epoch, index)`. `Completion` and `SentencePairs` have inputs of their own.
"""

from data.batches.objectives.best_fit import Bins, Completion, DocumentRows, Piece, best_fit, documents_row
from data.batches.objectives.causal import CausalLm, PrefixLm
from data.batches.objectives.draws import Draws, generator, permuted
from data.batches.objectives.fim import FillInTheMiddle
from data.batches.objectives.masked import Chunk, MaskedLm, SentencePairs
from data.batches.objectives.row import Codec, Frame, Objective, Row, Specials, WindowObjective, stack
from data.batches.objectives.spans import SpanCorruption

AnyObjective = CausalLm | PrefixLm | FillInTheMiddle | MaskedLm | SentencePairs | SpanCorruption | Completion

__all__ = [
    "AnyObjective",
    "Bins",
    "CausalLm",
    "Chunk",
    "Codec",
    "Completion",
    "DocumentRows",
    "Draws",
    "FillInTheMiddle",
    "Frame",
    "MaskedLm",
    "Objective",
    "Piece",
    "PrefixLm",
    "Row",
    "SentencePairs",
    "SpanCorruption",
    "Specials",
    "WindowObjective",
    "best_fit",
    "documents_row",
    "generator",
    "permuted",
    "stack",
]
