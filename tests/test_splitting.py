"""Splits: exact shares of different documents, each on one side, whatever the order."""

from fractions import Fraction

import numpy as np
import pytest

from data.prepare import splitting
from data.prepare.splitting import HASH, LAST, borders, counts, split_of, text_hash


def shares(*numbers: int) -> dict[str, Fraction]:
    named = zip(("train", "validation", "test"), numbers, strict=False)
    return {name: Fraction(number, sum(numbers)) for name, number in named if number}


def split(texts: list[bytes], wanted: dict[str, Fraction]) -> dict[str, list[bytes]]:
    hashes_N = np.sort(np.array([text_hash(text) for text in texts], HASH))
    ends = borders(hashes_N, wanted)
    found: dict[str, list[bytes]] = {name: [] for name in ends}
    for text in texts:
        found[split_of(text, ends)].append(text)
    return found


TEXTS = [f"document {i}".encode() for i in range(2000)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("numbers", "sizes"),
    [
        ((949, 50, 1), [1898, 100, 2]),
        ((1, 1, 1), [666, 667, 667]),
        ((98, 2), [1960, 40]),
        ((1, 0, 1), [1000, 1000]),
        ((1, 0), [2000]),
        ((1, 999, 0), [2, 1998]),
        ((999_999, 1), [1999, 1]),
    ],
)
def test_shares_are_exact(numbers: tuple, sizes: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    found = split(TEXTS, shares(*numbers))
    assert [len(texts) for texts in found.values()] == sizes
    assert sorted(text for texts in found.values() for text in texts) == sorted(TEXTS)


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_copies_fall_on_one_side_and_count_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    copied = TEXTS + [text for i, text in enumerate(TEXTS[:300]) for _ in range(i % 5)]
    once, several = split(TEXTS, shares(949, 50, 1)), split(copied, shares(949, 50, 1))
    assert {name: set(texts) for name, texts in several.items()} == {name: set(texts) for name, texts in once.items()}


def test_order_does_not_matter_and_new_documents_move_few() -> None:
    wanted = shares(9, 1)
    one = split(TEXTS, wanted)
    assert set(split(TEXTS[::-1], wanted)["validation"]) == set(one["validation"])
    more = split([*TEXTS, *(f"new {i}".encode() for i in range(200))], wanted)
    assert len(set(one["validation"]) - set(more["validation"])) < 20


@pytest.mark.parametrize(
    ("numbers", "distinct", "sizes"),
    [
        ((949, 50, 1), 3, [1, 1, 1]),
        ((1, 500, 500), 3, [1, 1, 1]),
        ((949, 50, 1), 30, [27, 2, 1]),
        ((1, 0), 1, [1]),
        ((1, 99), 10, [1, 9]),
    ],
)
def test_each_split_gets_a_document(numbers: tuple, distinct: int, sizes: list[int]) -> None:
    assert list(counts(distinct, shares(*numbers)).values()) == sizes


@pytest.mark.parametrize(("numbers", "distinct"), [((949, 50, 1), 2), ((1, 1), 1), ((1, 0), 0)])
def test_too_few_documents_are_refused(numbers: tuple, distinct: int) -> None:
    with pytest.raises(ValueError, match=f"different documents; the text has {distinct}"):
        counts(distinct, shares(*numbers))
    with pytest.raises(ValueError, match=f"the text has {distinct}"):
        borders(np.repeat(np.arange(distinct, dtype=HASH), 9), shares(*numbers))


def test_the_largest_hash_belongs_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "text_hash", lambda text: LAST - 1)
    assert split_of(b"", borders(np.array([0, LAST - 1], HASH), shares(1, 1))) == "validation"
    assert split_of(b"", borders(np.array([LAST - 1], HASH), shares(1))) == "train"
