"""Span corruption: texts come back, lengths are T5's, and all ways to place spans are as likely."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import CASES, SPECIALS, TEXTS, E, draws, equally_likely, frame, is_row, stream, windows

from data.batches.objectives import SpanCorruption, Specials
from data.batches.objectives.row import documents
from data.batches.objectives.spans import restore


def test_lengths_are_those_of_t5() -> None:
    spans = SpanCorruption()
    assert spans.lengths(568) == (512, 114) and spans.lengths(569)[0] > 512  # Raffel et al.'s, t5's random_spans_helper
    assert [SpanCorruption(noise_density=0.5, mean_span_tokens=m).counts(10) for m in (1, 2.5)] == [(5, 5), (5, 2)]
    assert [spans.counts(n) for n in (2, 3, 10, 100)] == [(1, 1), (1, 1), (2, 1), (15, 5)]


@CASES
@given(
    texts=TEXTS,
    length=st.integers(5, 80),
    density=st.sampled_from([0.15, 0.5, 0.9]),
    mean=st.sampled_from([1.0, 3.0]),
    isolate=st.booleans(),
)
def test_spans_go_back(texts: list[str], length: int, density: float, mean: float, isolate: bool) -> None:
    spans = SpanCorruption(noise_density=density, mean_span_tokens=mean)
    fits = spans.window_length(length)
    assert sum(spans.lengths(fits)) <= length + 1 < sum(spans.lengths(fits + 1))
    tokens, real = windows(stream(["start", *texts]), fits)[0]
    row = spans.row((tokens, real), frame(length, isolate), draws())
    is_row(row, length)
    found = []
    for segment in range(1, row["segments"].max() + 1):
        here = np.flatnonzero(row["segments"] == segment)
        (end,) = set((row["prefix"][here] - here[0]).tolist())
        both = np.append(row["tokens"][here], row["targets"][here[-1]])
        read, written = both[:end], both[end:]
        found.append(restore(read, written, SPECIALS).tolist())
        assert (len(read), len(written)) == spans.lengths(len(found[-1])) and read[-1] == written[-1] == E
        used = SPECIALS.sentinels[: spans.counts(len(found[-1]))[1]]
        assert all(tuple(side[np.isin(side, SPECIALS.sentinels)].tolist()) == used for side in (read, written))
        assert row["weights"][here].sum() == len(written) and row["weights"][here[end - 1 :]].all()
    parts = documents(tokens[:real], E) if isolate else [tokens[:real]]
    expected = [part.tolist() for part in parts if len(part) > 1]
    assert found[:-1] == expected[: max(0, len(found) - 1)]
    assert not found or found[-1] == expected[len(found) - 1][: len(found[-1])]
    assert isolate or found == expected


def test_spans_fall_anywhere() -> None:
    spans = SpanCorruption(noise_density=0.5, mean_span_tokens=2)
    text = np.arange(8, dtype=np.int32)  # 4 go in 2 spans: (1, 3), (2, 2) or (3, 1), and so do those that stay
    found = Counter(tuple(spans.corrupt(text, frame(40), draws(i))[0].tolist()) for i in range(1800))
    assert equally_likely(found, 9)


def test_too_few_sentinels_are_refused() -> None:
    few = frame(100, specials=Specials(sentinels=(300, 301)))
    text = np.arange(40, dtype=np.int32)
    with pytest.raises(ValueError, match=r"holds 2 tokens, but 40 tokens lose 13 spans.*try mean_span_tokens=7"):
        SpanCorruption(noise_density=0.33, mean_span_tokens=1).corrupt(text, few, draws())
    assert SpanCorruption(noise_density=0.33, mean_span_tokens=7).corrupt(text, few, draws())[0][-1] == E
