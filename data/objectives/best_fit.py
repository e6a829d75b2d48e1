"""Rows of whole documents, or of prompts with their completions, packed so that as little as possible is cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from data.objectives.row import Example, Frame, Objective, Row, examples_row


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of item numbers whose lengths sum to `capacity` at most: the longest item first, each into the fullest row
    that takes it (best-fit decreasing; Ding et al. 2024, "Fewer truncations improve language modeling", section 3).

    A function of its arguments alone: ties go to the earlier item; rows come in the order of their first items.

    Raises:
      ValueError: a length below 1 or above the capacity.
    """
    wrong = next((length for length in lengths if not 1 <= length <= capacity), None)
    if wrong is not None:
        raise ValueError(f"an item of length {wrong} does not fit a row of {capacity}, or is none.")
    rows: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity)]
    spaces = 0  # bit s: some row has s left
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        fits = spaces >> lengths[item]
        if fits:
            space = lengths[item] + (fits & -fits).bit_length() - 1
            row = with_space[space].pop()
            spaces ^= 0 if with_space[space] else 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := space - lengths[item]:
            with_space[left].append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)


class Piece(NamedTuple):
    """Tokens [start, end) of a document."""

    document: int
    start: int
    end: int


def pack_documents(document_tokens: Sequence[int], sequence_length: int) -> list[list[Piece]]:
    """Rows of documents, from their lengths with their ends; only those that exceed a row are cut, into full rows and
    a rest. Each token but a document's first is a target once: pieces overlap by one, as windows do.
    """
    pieces = [
        Piece(document, start, min(start + sequence_length, tokens - 1) + 1)
        for document, tokens in enumerate(document_tokens)
        for start in range(0, tokens - 1, sequence_length)
    ]
    rows = best_fit([piece.end - piece.start - 1 for piece in pieces], sequence_length)
    return [[pieces[item] for item in row] for row in rows]


def documents_row(pieces: Sequence[np.ndarray], frame: Frame) -> Row:
    """The tokens of a row of `pack_documents` as a row, each piece a segment."""
    return examples_row([Example(tokens, 1) for tokens in pieces], frame, prefix=False)


class Packed(NamedTuple):
    """What becomes of pairs."""

    rows: list[list[int]]
    """Numbers of the pairs of each row."""
    left_out: list[int]
    """Numbers of those that are longer than a row, or empty."""


@dataclass(frozen=True, kw_only=True)
class Completion(Objective):
    """A completion and its end, after a prompt that is only read; several pairs to a row, none cut."""

    prefix: bool = False
    """Whether a prompt's tokens see one another in both directions."""

    @property
    def attention(self) -> Literal["causal", "prefix"]:
        """See `Objective`."""
        return "prefix" if self.prefix else "causal"

    def pack(self, pair_tokens: Sequence[tuple[int, int]], sequence_length: int) -> Packed:
        """Rows of pairs, from the lengths of (prompt, completion), best fit."""
        positions = [prompt + completion for prompt, completion in pair_tokens]
        taken = [pair for pair, length in enumerate(positions) if 1 <= length <= sequence_length]
        rows = best_fit([positions[pair] for pair in taken], sequence_length)
        left_out = sorted(set(range(len(positions))) - set(taken))
        return Packed([[taken[item] for item in row] for row in rows], left_out)

    def row(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], frame: Frame) -> Row:
        """The (prompt, completion) tokens of a row of `pack` as a row; only completions and their ends weigh."""
        end = [frame.end_of_document]
        examples = [Example(np.concatenate([prompt, answer, end]), len(prompt)) for prompt, answer in pairs]
        return examples_row(examples, frame, prefix=self.prefix)
