"""How much a split holds, and how long its documents are; told from lengths, without reading a token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.corpus import Split


class Bucket(NamedTuple):
    """Documents of similar length."""

    shortest: int
    """Tokens: 0, or a power of two; the next bucket begins at twice as many."""
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one split. The token that ends a document is one of its tokens, and none of its text."""

    documents: int
    tokens: int
    bytes: int | None
    """Of text in UTF-8; None: unknown."""
    median: float
    """Tokens per document; half of them are shorter."""
    longest: int
    """Tokens of the longest document."""
    histogram: tuple[Bucket, ...]
    """From the shortest document's bucket to the longest's, with those between that are empty."""

    @property
    def bytes_per_token(self) -> float | None:
        """Of text; None: unknown."""
        text_tokens = self.tokens - self.documents
        return None if self.bytes is None or not text_tokens else self.bytes / text_tokens

    @property
    def mean(self) -> float:
        """Tokens per document."""
        return self.tokens / max(self.documents, 1)


def of_split(split: Split) -> Statistics:
    """Reads the lengths of all sequences."""
    lengths_D = np.diff(split.document_starts())
    return Statistics(
        documents=len(lengths_D),
        tokens=int(lengths_D.sum()),
        bytes=split.bytes,
        median=float(np.median(lengths_D)) if len(lengths_D) else 0.0,
        longest=int(lengths_D.max(initial=0)),
        histogram=tuple(_histogram(lengths_D)),
    )


def _histogram(lengths_D: np.ndarray) -> Iterator[Bucket]:
    exponents_D = np.frexp(lengths_D)[1]  # 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7
    documents = np.bincount(exponents_D)
    tokens = np.bincount(exponents_D, weights=lengths_D)  # exact below 2**53
    for exponent in range(int(exponents_D.min(initial=len(documents))), len(documents)):
        shortest = 1 << (exponent - 1) if exponent else 0
        yield Bucket(shortest, int(documents[exponent]), int(tokens[exponent]))
