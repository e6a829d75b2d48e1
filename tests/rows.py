"""Streams, draws and statistics that the tests of objectives share."""

import math
from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from data.batches.objectives import Draws, Frame, Row, Specials, generator
from data.batches.packing import Window, cut, window_count
from data.tokenizer import ByteTokenizer

E = ByteTokenizer.end_of_document
SPECIALS = Specials(
    mask=257,
    cls=258,
    sep=259,
    fim_prefix=260,
    fim_middle=261,
    fim_suffix=262,
    sentinels=tuple(range(263, 303)),
    pad=303,
)
CASES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
TEXTS = st.lists(st.text(st.sampled_from("ab c\u00e9\u20ac\U0001f600"), max_size=30), min_size=1, max_size=8)


def frame(sequence_length: int, isolate: bool = True, **changes: object) -> Frame:
    common = {"vocab_size": 257, "end_of_document": E, "specials": SPECIALS, "codec": ByteTokenizer()}
    return Frame(sequence_length=sequence_length, isolate_documents=isolate, **common | changes)


def draws(index: int = 0, purpose: str = "test") -> Draws:
    return generator(7, purpose, "web", 0, index)


def stream(texts: list[str]) -> np.ndarray:
    return np.array([token for text in texts for token in (*text.encode(), E)], np.uint16)


def windows(stream_N: np.ndarray, length: int) -> list[Window]:
    return [cut(stream_N, i, length) for i in range(window_count(len(stream_N), length))]


def likely(found: int, of: int, share: float) -> bool:
    """Whether a count is within five standard deviations of a binomial's mean."""
    return abs(found - of * share) <= 5 * math.sqrt(of * share * (1 - share))


def equally_likely(found: Counter, kinds: int) -> bool:
    return len(found) == kinds and all(likely(count, found.total(), 1 / kinds) for count in found.values())


def is_row(row: Row, length: int) -> None:
    """Types, shapes and what attention relies on."""
    real = int((row["segments"] > 0).sum())
    for name, array in row.items():
        assert array.dtype == (np.float32 if name == "weights" else np.int32), name
        assert array.shape == (length,), name
    assert (np.diff(row["segments"][:real]) >= 0).all() and not row["segments"][real:].any()
    assert not row["weights"][real:].any() and not row["positions"][real:].any()
    assert (np.diff(row.get("prefix", np.zeros(1))) >= 0).all()


def same(a: Row, b: Row) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)
