"""Text to tokens to batches. A leaf: it imports nothing of ours, and no JAX.

A source is a frozen config with `check()`, `vocab_size`, `isolate_documents` and `load() -> Corpus`. A `Corpus`
gives batches: dicts of numpy arrays that depend on nothing but the seed and the number of samples consumed.
"""

from data.corpus import Corpus
from data.packing import Batch
from data.python_docs import PythonDocs

__all__ = ["Batch", "Corpus", "PythonDocs"]
