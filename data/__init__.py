"""Text to tokens to batches. A leaf: it imports nothing of ours, and no JAX.

A source is a frozen config with `check()`, `vocab_size`, `isolate_documents`, `is_prepared()` and
`load() -> Corpus`; one that must be prepared is a `Prepared`, with `prepare(progress)` too. A `Corpus` gives batches:
dicts of numpy arrays that depend on nothing but the seed, the text and the numbers of the samples.
"""

from data.corpus import Corpus, Split
from data.packing import Batch
from data.prepared import Fail, Prepared, Skip
from data.python_docs import PythonDocs
from data.text_files import TextFiles
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
    "Batch",
    "Bpe",
    "Bytes",
    "Corpus",
    "Fail",
    "Gpt2",
    "Prepared",
    "PythonDocs",
    "SentencePiece",
    "SentencePieceFile",
    "Skip",
    "Split",
    "TextFiles",
    "TokenizerFile",
    "WordPiece",
    "WordPieceFile",
]
