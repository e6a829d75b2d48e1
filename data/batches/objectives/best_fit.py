"""Rows of whole documents, or of prompts with their completions, packed so that as little as possible is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data.batches.objectives.row import Example, Frame, Objective, Row, examples_row


class Bins(Sequence[np.ndarray]):
    """Rows of item numbers, each row's in ascending order, int64 [K]."""

    def __init__(self, row_N: np.ndarray, rows: int) -> None:
        """row_N: the row of each item. Rows are numbered anew, in the order of their first items."""
        first_R = np.empty(rows, np.int64)
        first_R[row_N[::-1]] = np.arange(len(row_N))[::-1]  # the last one written stays
        number_R = np.empty(rows, row_N.dtype)
        number_R[np.argsort(first_R)] = np.arange(rows)
        row_N = number_R[row_N]
        self._items_N = np.argsort(row_N, kind="stable")
        self._starts_R = np.append(0, np.cumsum(np.bincount(row_N, minlength=rows)))

    def __len__(self) -> int:
        return len(self._starts_R) - 1

    def __getitem__(self, row: int) -> np.ndarray:  # pyrefly: ignore[bad-override]: no slices
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self._items_N[self._starts_R[row] : self._starts_R[row + 1]]


def best_fit(length_N: np.ndarray, capacity: int) -> Bins:
    """Rows of items whose lengths sum to `capacity` at most: the longest item first, each into the fullest row
    that takes it (best-fit decreasing; Ding et al. 2024, "Fewer truncations improve language modeling", section 3).

    A function of its arguments alone: ties go to the earlier item. All items of a length are placed together: of the
    rows that are equally full, each takes as many of them as it can, before the next one takes any.

    Raises:
      ValueError: a length below 1 or above the capacity.
    """
    wrong_K = length_N[(length_N < 1) | (length_N > capacity)]
    if len(wrong_K):
        raise ValueError(f"an item of length {wrong_K[0]} does not fit a row of {capacity}, or is none.")
    longest_first_N = np.argsort(capacity - length_N.astype(np.int64), kind="stable")
    row_N, rows = np.empty(len(length_N), np.int32), 0
    spaces = _Spaces(capacity)
    done = 0
    counts = np.bincount(length_N, minlength=1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            space = spaces.least(length)
            each = (space or capacity) // length
            wanted = -(-left // each)
            if space:
                taken_R = spaces.take(space, wanted)
            else:
                space, taken_R, rows = capacity, np.arange(rows, rows + wanted), rows + wanted
            placed = min(left, each * len(taken_R))
            row_N[longest_first_N[done : done + placed]] = np.repeat(taken_R, each)[:placed]
            whole, rest = divmod(placed, each)
            spaces.give(space - each * length, taken_R[:whole])
            spaces.give(space - rest * length, taken_R[whole:])
            done, left = done + placed, left - placed
    return Bins(row_N, rows)


class _Spaces:
    """Rows by the space that is left in them; those that came last are taken first."""

    def __init__(self, capacity: int) -> None:
        self._rows: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._there = 0  # bit s: some row has s left

    def least(self, length: int) -> int:
        """The least space that takes an item; 0: none does."""
        fits = self._there >> length
        return length + (fits & -fits).bit_length() - 1 if fits else 0

    def take(self, space: int, most: int) -> np.ndarray:
        """Up to so many rows with this space, the last ones first; at least one."""
        last_R = self._rows[space].pop()[::-1]
        if len(last_R) > most:
            self._rows[space].append(last_R[most:][::-1])
        self._there ^= 0 if self._rows[space] else 1 << space
        return last_R[:most]

    def give(self, space: int, row_R: np.ndarray) -> None:
        if space and len(row_R):
            self._rows[space].append(row_R)
            self._there |= 1 << space


class Piece(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


class DocumentRows(Sequence[list[Piece]]):
    """Rows of documents, from their lengths with their ends (int [D]); only those that exceed a row are cut, into full
    rows and a rest. Each token but a document's first is a target once: pieces overlap by one, as windows do.
    """

    def __init__(self, tokens_D: np.ndarray, sequence_length: int) -> None:
        pieces_D = -(-(tokens_D.astype(np.int64) - 1) // sequence_length)
        self._document_P = np.repeat(np.arange(len(tokens_D)), pieces_D)
        before_P = np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
        self._start_P = (np.arange(len(before_P)) - before_P) * sequence_length
        self._targets_P = np.minimum(tokens_D[self._document_P] - 1 - self._start_P, sequence_length)
        self._rows = best_fit(self._targets_P, sequence_length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> list[Piece]:  # pyrefly: ignore[bad-override]: no slices
        found_K = self._rows[row]
        columns = self._document_P[found_K], self._start_P[found_K], self._targets_P[found_K]
        return [Piece(d, start, start + n + 1) for d, start, n in zip(*(x.tolist() for x in columns), strict=True)]


def documents_row(pieces: Sequence[np.ndarray], frame: Frame) -> Row:
    """The tokens of a row of `DocumentRows` as a row, each piece a segment."""
    return examples_row([Example(tokens, 1) for tokens in pieces], frame, prefix=False)


@dataclass(frozen=True, kw_only=True)
class Completion(Objective):
    """A completion and its end, after a prompt that is only read; several pairs to a row, none cut."""

    prefix: bool = False
    """Whether a prompt's tokens see one another in both directions."""

    @property
    def attention(self) -> Literal["causal", "prefix"]:
        """See `Objective`."""
        return "prefix" if self.prefix else "causal"

    def pack(self, length_N2: np.ndarray, sequence_length: int) -> tuple[Bins, np.ndarray]:
        """Rows of pairs, from the lengths of (prompt, completion), best fit; and which pairs (int64 [P]) the items of
        the rows are, as those that are longer than a row, or empty, are left out."""
        position_N = length_N2.sum(axis=1)
        (taken_P,) = np.nonzero((position_N >= 1) & (position_N <= sequence_length))
        return best_fit(position_N[taken_P], sequence_length), taken_P

    def row(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], frame: Frame) -> Row:
        """The (prompt, completion) tokens of a row of `pack` as a row; only completions and their ends weigh."""
        end = [frame.end_of_document]
        examples = [Example(np.concatenate([prompt, answer, end]), len(prompt)) for prompt, answer in pairs]
        return examples_row(examples, frame, prefix=self.prefix)
