"""Text to tokens to batches. A leaf: it imports nothing of ours, and no JAX.

A source is a frozen config with `check()`, `tokenizer`, `vocab_size`, `is_prepared()` and `load() -> Corpus`; one that
must be prepared is a `Prepared`, with `prepare(progress)` too. A `Loader` makes batches of what was loaded, for an
objective and a way of packing: dicts of numpy arrays that depend on nothing but these, the seed, the text and the
numbers of the samples.
"""

from data.batches.curriculum import Curriculum, LengthWarmup
from data.batches.loader import Loader, Origin, Text
from data.batches.objectives import (
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
from data.batches.packing import Batch, BestFit, Concatenate
from data.batches.rows import Pick, Rows
from data.batches.special_tokens import lacking
from data.corpus import Blended, Corpus, Split
from data.prepare.prepared import Prepared
from data.prepare.source import Fail, Skip
from data.sources.blend import Blend, Phase, Weighted, sources_of
from data.sources.megatron_shards import MegatronShards
from data.sources.python_docs import PythonDocs
from data.sources.seqio_task import Live, LiveLoader, LiveText, SeqioTask
from data.sources.text_files import TextFiles
from data.sources.tfds_text import TfdsText
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
