"""Corpora in memory that the tests of data share."""

from collections.abc import Sequence

import numpy as np

from data import Corpus, Split
from data.tokenizer import ByteTokenizer

E = ByteTokenizer.end_of_document


def split(documents: Sequence[Sequence[bytes]]) -> Split:
    """Documents of one sequence or several, bytes as tokens."""
    sequences = [
        np.frombuffer(text, np.uint8).astype(np.uint16) if i < len(texts) - 1 else np.array([*text, E], np.uint16)
        for texts in documents
        for i, text in enumerate(texts)
    ]
    return Split(
        tokens_N=np.concatenate(sequences),
        lengths_S=np.array([len(tokens) for tokens in sequences], np.int32),
        documents_D=np.cumsum([0, *map(len, documents)]),
        bytes=sum(len(text) for texts in documents for text in texts),
    )


def corpus(train: Sequence[Sequence[bytes]], validation: Sequence[Sequence[bytes]] = (), source: str = "") -> Corpus:
    splits = {"train": split(train)} | ({"validation": split(validation)} if validation else {})
    return Corpus(
        source=source, tokenizer=ByteTokenizer(), splits=splits, digest=source.ljust(16, "0"), gzip_bits_per_byte=None
    )


def texts(count: int, length: int, letter: str, seed: int = 0) -> list[list[bytes]]:
    """Documents of one sequence that start with a letter and their number."""
    lengths = np.random.default_rng(seed).integers(length // 2, length * 3 // 2 + 1, count)
    return [[f"{letter}{i} ".encode() + b"abcdefgh " * int(n // 9)] for i, n in enumerate(lengths)]
