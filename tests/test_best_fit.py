"""Best-fit packing: nothing is lost, nothing exceeds a row, and rows are as full as a plain search makes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.objectives import Bins, Completion, DocumentRows, Frame, Specials, best_fit, documents_row
from data.batches.packing import pack

E = 256
CASES = settings(max_examples=100, deadline=None, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(1, 20), max_size=40)


def frame(sequence_length: int) -> Frame:
    return Frame(
        sequence_length=sequence_length,
        vocab_size=257,
        end_of_document=E,
        isolate_documents=True,
        specials=Specials(pad=300),
    )


def plain_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """One item after the other, by search over all rows; of equally full ones, that which changed last."""
    rows: list[list[int]] = []
    fills: list[tuple[int, int]] = []
    for turn, item in enumerate(sorted(range(len(lengths)), key=lambda item: -lengths[item])):
        fitting = [(fill, row) for row, fill in enumerate(fills) if fill[0] + lengths[item] <= capacity]
        row = max(fitting)[1] if fitting else len(rows)
        if not fitting:
            rows.append([])
            fills.append((0, 0))
        rows[row].append(item)
        fills[row] = fills[row][0] + lengths[item], turn
    return sorted(sorted(row) for row in rows)


def listed(rows: Bins) -> list[list[int]]:
    return [row.tolist() for row in rows]


@settings(CASES, max_examples=300)
@given(lengths=LENGTHS, more=st.integers(0, 60))
def test_each_item_is_where_a_plain_search_puts_it(lengths: list[int], more: int) -> None:
    capacity = max(lengths, default=1) + more
    assert listed(best_fit(np.array(lengths, int), capacity)) == plain_best_fit(lengths, capacity)


def test_the_fullest_row_takes_an_item() -> None:
    assert listed(best_fit(np.array([6, 7, 3, 4, 2]), 10)) == [[0, 3], [1, 2], [4]]
    assert listed(best_fit(np.array([5, 5, 5, 5]), 10)) == [[0, 1], [2, 3]]
    assert listed(best_fit(np.array([], int), 10)) == []


def test_many_documents_are_packed_at_once() -> None:
    """Items of a length are placed together: a million of them in about a second."""
    lengths = (np.random.Generator(np.random.Philox(key=1)).pareto(1, 1_000_000) * 100).astype(int).clip(1, 2048)
    rows = best_fit(lengths, 2048)
    assert lengths.sum() / 2048 / len(rows) > 0.999


@pytest.mark.parametrize("lengths", [[3, 11], [3, 0]])
def test_what_does_not_fit_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"item of length {lengths[1]} does not fit a row of 10"):
        best_fit(np.array(lengths), 10)


@CASES
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), sequence_length=st.integers(1, 20))
def test_each_token_of_a_document_but_its_first_is_a_target_once(lengths: list[int], sequence_length: int) -> None:
    starts = np.cumsum([0, *lengths])
    stream = np.arange(starts[-1]).astype(np.int32)
    rows = DocumentRows(np.array(lengths), sequence_length)
    targets = []
    for pieces in rows:
        for piece in pieces:
            whole = lengths[piece.document] - 1 <= sequence_length
            assert (
                (piece.start, piece.end) == (0, lengths[piece.document])
                if whole
                else piece.start % sequence_length == 0
            )
        row = documents_row([stream[starts[d] :][start:end] for d, start, end in pieces], frame(sequence_length))
        real = row["segments"] > 0
        assert np.array_equal(row["weights"], real) and "prefix" not in row
        assert (row["targets"][real] == row["tokens"][real] + 1).all() and (row["tokens"][~real] == 300).all()
        assert row["segments"].max() == len(pieces)
        targets += row["targets"][real].tolist()
    assert sorted(targets) == sorted(set(stream.tolist()) - set(starts.tolist()))


def test_one_document_is_a_row_of_pack() -> None:
    tokens = np.array([5, 6, 7, E], np.int32)
    row = documents_row([tokens], frame(3))
    expected = pack([(tokens, 3)], end_of_document=E, isolate_documents=True)
    assert all(
        np.array_equal(row[name], expected[name][0]) and row[name].dtype == expected[name].dtype for name in expected
    )


# Completions


def test_only_completions_weigh() -> None:
    pairs = [(np.array([1, 2]), np.array([3])), (np.array([4]), np.array([5, 6]))]
    row = Completion(prefix=True).row(pairs, frame(8))
    assert {name: array.tolist() for name, array in row.items()} == {
        "tokens": [1, 2, 3, 4, 5, 6, 300, 300],
        "targets": [2, 3, E, 5, 6, E, 300, 300],
        "weights": [0, 1, 1, 1, 1, 1, 0, 0],
        "segments": [1, 1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 0, 0],
        "prefix": [2, 2, 2, 4, 4, 4, 4, 4],
    }
    assert {name: array.tolist() for name, array in Completion().row(pairs, frame(8)).items()} == {
        name: array.tolist() for name, array in row.items() if name != "prefix"
    }


@CASES
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_no_pair_is_cut(lengths: list[tuple[int, int]]) -> None:
    rows, taken_P = Completion().pack(np.array(lengths, int).reshape(-1, 2), 12)
    assert sorted(item for row in rows for item in row.tolist()) == list(range(len(taken_P)))
    assert taken_P.tolist() == [i for i, pair in enumerate(lengths) if 1 <= sum(pair) <= 12]
    for items in rows:
        pairs = [(np.arange(p) + 20 * i, np.arange(c) + 20 * i + 10) for i in taken_P[items] for p, c in [lengths[i]]]
        row = Completion().row(pairs, frame(12))
        expected = [t for (p, c) in pairs for t in ([*c.tolist(), E] if len(p) else [*c.tolist(), E][1:])]
        assert row["targets"][row["weights"] > 0].tolist() == expected


def test_completions_are_packed_best_fit() -> None:
    rows, taken_P = Completion().pack(np.array([(3, 3), (20, 1), (4, 3), (0, 0), (2, 1)]), 10)
    assert [taken_P[row].tolist() for row in rows] == [[0], [2, 4]]
