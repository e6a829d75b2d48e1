"""BERT's rows: how many tokens are masked, which, and with what; and what the two halves of a pair are."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rows import CASES, TEXTS, E, draws, frame, is_row, likely, stream, windows

from data.batches.objectives import CausalLm, Chunk, MaskedLm, Row, SentencePairs, stack
from data.batches.objectives.masked import truncated

# Masked


@CASES
@given(texts=TEXTS, length=st.integers(1, 60), isolate=st.booleans(), most=st.sampled_from([None, 1, 3]))
def test_masks_are_as_many_as_asked_for(texts: list[str], length: int, isolate: bool, most: int | None) -> None:
    window = windows(stream(["start", *texts]), length)[0]
    row = MaskedLm(max_predictions=most).row(window, frame(length, isolate), draws())
    plain = CausalLm().row(window, frame(length, isolate), draws())
    is_row(row, length)
    words = (plain["tokens"] != E) & (plain["segments"] > 0)
    wanted = min(max(1, round(0.15 * words.sum())), words.sum(), most or 99)
    assert row["weights"].sum() == wanted and not row["weights"][~words].any()
    assert np.array_equal(row["targets"], plain["tokens"])
    assert np.array_equal(np.where(row["weights"] > 0, row["targets"], row["tokens"]), plain["tokens"])
    assert all(np.array_equal(row[name], plain[name]) for name in ("segments", "positions"))


def test_masks_fall_anywhere_and_are_80_10_10() -> None:
    window = np.append(np.arange(200, dtype=np.int32), 0), 200
    rows = stack([MaskedLm().row(window, frame(200), draws(i)) for i in range(600)])
    chosen = rows["weights"] > 0
    assert (chosen.sum(1) == 30).all()
    assert all(likely(count, 600, 0.15) for count in chosen.sum(0))
    total, tokens, targets = chosen.sum(), rows["tokens"][chosen], rows["targets"][chosen]
    assert likely((tokens == 257).sum(), total, 0.8)
    assert likely((tokens == targets).sum(), total, 0.1 + 0.1 / 257)
    other = tokens[(tokens != 257) & (tokens != targets)]
    assert likely(len(other), total, 0.1 * 256 / 257) and len(set(other.tolist())) > 230


@CASES
@given(
    starts=st.lists(st.booleans(), min_size=3, max_size=90), rate=st.sampled_from([0.15, 0.4]), index=st.integers(0, 99)
)
def test_words_are_masked_whole(starts: list[bool], rate: float, index: int) -> None:
    tokens = np.array([2 * i % 200 + start for i, start in enumerate(starts)], np.int32)  # odd tokens start words
    tokens[len(tokens) // 2] = E
    odd_V = np.arange(257) % 2 == 1
    masking = MaskedLm(rate=rate, whole_words=True)
    row = masking.row((np.append(tokens, E), len(tokens)), frame(len(tokens), starts_word_V=odd_V), draws(index))
    words: list[list[int]] = []
    for at, token in enumerate(tokens.tolist()):
        if token != E:
            words += [[]] if token % 2 or at in (0, len(tokens) // 2 + 1) else []
            words[-1].append(at)
    taken = [row["weights"][word].tolist() for word in words]
    assert all(len(set(weights)) == 1 for weights in taken)
    space = max(1, round(rate * (len(tokens) - 1))) - row["weights"].sum()
    assert space >= 0 and all(weights[0] or len(weights) > space for weights in taken)  # no more words fit


# Sentence pairs


def book(*lengths: list[int]) -> list[list[np.ndarray]]:
    """Documents of sentences of these lengths, numbered through: each token is unique."""
    ends = np.cumsum([0, *(n for document in lengths for n in document)])
    sentences = iter([np.arange(start, end, dtype=np.int32) + 1000 for start, end in pairwise(ends)])
    return [[next(sentences) for _ in document] for document in lengths]


def text_of(row: Row, kind: int) -> list[int]:
    here = (row["segments"] > 0) & (row["types"] == kind) & ~np.isin(row["targets"], (258, 259))
    return row["targets"][here].tolist()


@pytest.mark.parametrize("negative", ["random", "swapped"])
def test_half_of_the_pairs_do_not_follow(negative: str) -> None:
    found = book([4] * 10, [7] * 5, [30, 30, 2])
    pairs, labels = SentencePairs(negative=negative), Counter()
    first_of = [document[0][0] for document in found]
    for i in range(1200):
        row = pairs.row(found, Chunk(1, 0, 5), frame(48), draws(i))
        is_row(row, 48)
        a, b = text_of(row, 0), text_of(row, 1)
        homes = [np.searchsorted(first_of, part, side="right").tolist() for part in (a, b)]
        assert all(len(set(home)) == 1 for home in homes) and all(
            np.diff(part).tolist() == [1] * (len(part) - 1) for part in (a, b)
        )
        follows, label = b[0] == a[-1] + 1, int(row["label"][0])
        assert follows == (label == 0) and homes[0][0] == 2
        assert (homes[1][0] == 2) == (label == 0 or negative == "swapped")
        labels[label, homes[1][0]] += 1
    assert likely(sum(count for (label, _), count in labels.items() if label), 1200, 0.5)
    if negative == "random":
        assert likely(labels[1, 1], labels[1, 1] + labels[1, 3], 0.5)  # any other document


def test_pairs_are_framed_and_masked() -> None:
    found = book([9] * 12, [5] * 3)
    pairs = SentencePairs(negative="swapped", masking=MaskedLm(rate=0.2), short_rate=0.5)
    lengths = []
    for i in range(400):
        row = pairs.row(found, Chunk(0, 0, 12), frame(64), draws(i))
        used = int((row["segments"] > 0).sum())
        specials = np.flatnonzero(np.isin(row["targets"][:used], (258, 259)))
        assert row["targets"][specials].tolist() == [258, 259, 259] and specials[2] == used - 1
        assert np.array_equal(row["types"], (np.arange(64) > specials[1]) & (np.arange(64) < used))
        assert row["weights"].sum() == max(1, round(0.2 * (used - 3))) and not row["weights"][specials].any()
        assert (row["tokens"][used:] == 303).all() and row["positions"][:used].tolist() == list(range(used))
        lengths.append(used)
    # A short pair wants 2 to 61 tokens and has whole sentences of nine, at least two: from 55 on, it is cut to 61.
    assert set(lengths) == {21, 30, 39, 48, 57, 64}
    assert likely(sum(length < 64 for length in lengths), 400, 0.5 * 53 / 60)


@CASES
@given(lengths=st.tuples(st.integers(1, 30), st.integers(1, 30)), most=st.integers(2, 40), index=st.integers(0, 9))
def test_the_longer_text_is_cut(lengths: tuple[int, int], most: int, index: int) -> None:
    left = list(lengths)
    while sum(left) > most:  # BERT's truncate_seq_pair
        left[left[1] > left[0]] -= 1
    found = truncated(np.arange(lengths[0]), np.arange(lengths[1]), most, draws(index))
    assert [len(tokens) for tokens in found] == left
    assert all((np.diff(tokens) == 1).all() for tokens in found)


def test_texts_are_cut_at_either_end() -> None:
    fronts = [truncated(np.arange(60), np.arange(10), 20, draws(i))[0][0] for i in range(100)]
    assert likely(sum(fronts), 100 * 50, 0.5) and len(set(fronts)) > 10


@CASES
@given(lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=4))
def test_chunks_hold_all_sentences(lengths: list[list[int]]) -> None:
    found = SentencePairs().chunks(lengths, 15)
    for document, sentences in enumerate(lengths):
        mine = [chunk for chunk in found if chunk.document == document]
        held = sorted({s for chunk in mine for s in range(chunk.first, chunk.end)})
        assert held == (list(range(len(sentences))) if len(sentences) > 1 else [])
        assert all(chunk.end - chunk.first >= 2 for chunk in mine)
        assert all(a.end == b.first for a, b in pairwise(mine[:-1]))
        for chunk in mine[:-1]:
            total = sum(sentences[chunk.first : chunk.end])
            assert total >= 12 and (total - sentences[chunk.end - 1] < 12 or chunk.end - chunk.first == 2)


def test_another_document_is_needed() -> None:
    index = next(i for i in range(99) if draws(i).uniform(2)[1] < 0.5)  # where b is to be of another document
    with pytest.raises(ValueError, match="needs two documents"):
        SentencePairs().row(book([3, 3]), Chunk(0, 0, 2), frame(20), draws(index))
    SentencePairs(negative="swapped").row(book([3, 3]), Chunk(0, 0, 2), frame(20), draws(index))
