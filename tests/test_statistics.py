"""Lengths of documents, counted."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import Split
from data.statistics import Bucket, of_split


def split(documents: list[list[int]], text_bytes: int | None = None) -> Split:
    """Documents of sequences of these lengths."""
    lengths = [length for document in documents for length in document]
    firsts = np.cumsum([0, *(len(document) for document in documents)])
    stream = np.zeros(sum(lengths), np.uint16)
    return Split(tokens_N=stream, lengths_S=np.array(lengths, np.int32), documents_D=firsts, bytes=text_bytes)


def test_documents_of_several_sequences() -> None:
    found = of_split(split([[1], [2, 1], [4], [17], []], text_bytes=40))
    assert (found.documents, found.tokens, found.mean, found.median, found.longest) == (5, 25, 5.0, 3.0, 17)
    assert found.bytes_per_token == 2.0  # five of the tokens are ends of documents
    assert found.histogram == (
        Bucket(0, 1, 0),
        Bucket(1, 1, 1),
        Bucket(2, 1, 3),
        Bucket(4, 1, 4),
        Bucket(8, 0, 0),
        Bucket(16, 1, 17),
    )
    assert of_split(split([[3], [2]])).bytes_per_token is None
    assert of_split(split([[1], [1]], text_bytes=0)).bytes_per_token is None
    assert of_split(split([])).histogram == ()


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=3), max_size=20))
def test_each_document_is_in_its_bucket(documents: list[list[int]]) -> None:
    lengths_S = np.array([length for document in documents for length in document], np.int32)
    firsts = np.cumsum([0, *(len(document) for document in documents)])
    found = of_split(Split(tokens_N=np.empty(0), lengths_S=lengths_S, documents_D=firsts, bytes=None))
    lengths = [sum(document) for document in documents]
    assert (found.documents, found.tokens, found.longest) == (len(lengths), sum(lengths), max(lengths, default=0))
    for bucket in found.histogram:
        inside = [n for n in lengths if (2 ** math.floor(math.log2(n)) if n else 0) == bucket.shortest]
        assert (bucket.documents, bucket.tokens) == (len(inside), sum(inside))
    assert sum(bucket.documents for bucket in found.histogram) == len(lengths)
    edges = [bucket.shortest for bucket in found.histogram]
    assert edges == sorted(set(edges))
    if found.histogram:
        assert found.histogram[0].documents and found.histogram[-1].documents
