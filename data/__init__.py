"""Text to tokens to batches. A leaf: it imports nothing of ours, and no JAX.

A source is a frozen config with `check()`, `tokenizer`, `vocab_size`, `is_prepared()` and `load() -> Corpus`; one that
must be prepared is a `Prepared`, with `prepare(progress)` too. A `Loader` makes batches of what was loaded, for an
objective and a way of packing: dicts of numpy arrays that depend on nothing but these, the seed, the text and the
numbers of the samples.
"""

from data.blended import Blend, Blended, Phase, Weighted, sources_of
from data.corpus import Corpus, Split
from data.curriculum import Curriculum, LengthWarmup
from data.loader import Loader, Origin, Text
from data.megatron_shards import MegatronShards
from data.objectives import (
    AnyObjective,
    CausalLm,
    Completion,
    FillInTheMiddle,
    MaskedLm,
    PrefixLm,
    SentencePairs,
    SpanCorruption,
    WindowObjective,
)
from data.packing import Batch, BestFit, Concatenate
from data.prepared import Fail, Prepared, Skip
from data.python_docs import PythonDocs
from data.rows import Pick, Rows
from data.seqio_task import Live, LiveLoader, LiveText, SeqioTask
from data.specials import lacking
from data.text_files import TextFiles
from data.tfds_text import TfdsText
from data.tokenizer import (
    Bpe,
    Bytes,
    Gpt2,
    SentencePiece,
    SentencePieceFile,
    TokenizerFile,
    WordPiece,
    WordPieceFile,
)

__all__ = [
    "AnyObjective",
    "Batch",
    "BestFit",
    "Blend",
    "Blended",
    "Bpe",
    "Bytes",
    "CausalLm",
    "Completion",
    "Concatenate",
    "Corpus",
    "Curriculum",
    "Fail",
    "FillInTheMiddle",
    "Gpt2",
    "LengthWarmup",
    "Live",
    "LiveLoader",
    "LiveText",
    "Loader",
    "MaskedLm",
    "MegatronShards",
    "Origin",
    "Phase",
    "Pick",
    "PrefixLm",
    "Prepared",
    "PythonDocs",
    "Rows",
    "SentencePairs",
    "SentencePiece",
    "SentencePieceFile",
    "SeqioTask",
    "Skip",
    "SpanCorruption",
    "Split",
    "Text",
    "TextFiles",
    "TfdsText",
    "TokenizerFile",
    "Weighted",
    "WindowObjective",
    "WordPiece",
    "WordPieceFile",
    "lacking",
    "sources_of",
]
