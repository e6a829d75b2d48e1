"""The rows of a split: how many an objective makes of it, and each one by its number and epoch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from data.batches.objectives import (
    AnyObjective,
    CausalLm,
    Completion,
    DocumentRows,
    Frame,
    Piece,
    SentencePairs,
    WindowObjective,
    documents_row,
    generator,
    stack,
)
from data.batches.packing import Batch, BestFit, Concatenate, Window, cut, pack, window_count
from data.corpus import Split


class Pick(NamedTuple):
    """One row, in one epoch: randomness differs between epochs."""

    epoch: int
    row: int


class Span(NamedTuple):
    """Tokens [start, end) of a split's stream."""

    start: int
    end: int


class Rows(Protocol):
    """All rows of a split."""

    def __len__(self) -> int: ...
    def batch(self, picks: Sequence[Pick]) -> Batch:
        """These rows [B, T], in this order; at least one."""
        ...

    def spans(self, row: int) -> list[Span]:
        """What of the stream is in a row, in its order."""
        ...


def rows_of(
    split: Split,
    objective: AnyObjective,
    packing: Concatenate | BestFit,
    frame: Frame,
    *,
    seed: int,
    source: str,
) -> Rows:
    """A split's rows. `source` is its name for random numbers.

    Raises: ValueError if there are none, or the documents are not of the kind that the objective is for.
    """
    if isinstance(objective, SentencePairs):
        found: Rows = _Pairs(split, objective, frame, seed, source)
    elif isinstance(objective, Completion):
        found = Completions(split, objective, frame)
    elif isinstance(packing, BestFit):
        found = _Packed(split, frame)
    else:
        found = _Windows(split, objective, frame, seed, source)
    return found


class _Windows:
    """Rows of windows that cover the stream."""

    def __init__(self, split: Split, objective: WindowObjective, frame: Frame, seed: int, source: str) -> None:
        self._stream_N, self._objective, self._frame = split.tokens_N, objective, frame
        self._seed, self._source = seed, source
        self._length = objective.window_length(frame.sequence_length)

    def __len__(self) -> int:
        return window_count(len(self._stream_N), self._length)

    def batch(self, picks: Sequence[Pick]) -> Batch:
        windows = [cut(self._stream_N, pick.row, self._length) for pick in picks]
        return windows_batch(windows, picks, self._objective, self._frame, self._seed, self._source)

    def spans(self, row: int) -> list[Span]:
        start = row * self._length
        return [Span(start, min(start + self._length + 1, len(self._stream_N)))]


def windows_batch(
    windows: Sequence[Window],
    picks: Sequence[Pick],
    objective: WindowObjective,
    frame: Frame,
    seed: int,
    source: str,
) -> Batch:
    """Windows of a stream as rows, each with the random numbers of its pick."""
    if isinstance(objective, CausalLm):  # all at once
        return pack(windows, end_of_document=frame.end_of_document, isolate_documents=frame.isolate_documents)
    return stack(
        [
            objective.row(window, frame, generator(seed, objective.purpose, source, pick.epoch, pick.row))
            for window, pick in zip(windows, picks, strict=True)
        ]
    )


class _Packed:
    """Rows of whole documents, best fit."""

    def __init__(self, split: Split, frame: Frame) -> None:
        self._stream_N, self._frame = split.tokens_N, frame
        self._starts_D = split.document_starts()
        self._rows = DocumentRows(np.diff(self._starts_D), frame.sequence_length)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, picks: Sequence[Pick]) -> Batch:
        return stack(
            [
                documents_row([self._stream_N[start:end] for start, end in self.spans(pick.row)], self._frame)
                for pick in picks
            ]
        )

    def spans(self, row: int) -> list[Span]:
        return [self._span(piece) for piece in self._rows[row]]

    def _span(self, piece: Piece) -> Span:
        start = int(self._starts_D[piece.document])
        return Span(start + piece.start, start + piece.end)


class Completions:
    """Rows of prompts with their completions."""

    def __init__(self, split: Split, objective: Completion, frame: Frame) -> None:
        sequences = np.diff(split.documents_D)
        if (sequences != 2).any():
            raise ValueError(
                "objective=Completion is for documents of a prompt and what follows it, and these are not; prepare "
                "them with data.prompt_key=<key of the prompt>."
            )
        self._stream_N, self._objective, self._frame = split.tokens_N, objective, frame
        self._starts_S = split.sequence_starts()
        lengths = split.lengths_S.reshape(-1, 2) - [0, 1]  # the end of document is the row's to add
        self._rows, self._taken_P = objective.pack(lengths, frame.sequence_length)
        self.left_out = len(lengths) - len(self._taken_P), len(lengths)
        """Pairs that are longer than a row, and all."""

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, picks: Sequence[Pick]) -> Batch:
        return stack(
            [self._objective.row([self._pair(n) for n in self._pairs(pick.row)], self._frame) for pick in picks]
        )

    def _pairs(self, row: int) -> list[int]:
        return self._taken_P[self._rows[row]].tolist()

    def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start, middle, end = self._starts_S[2 * number : 2 * number + 3]
        return self._stream_N[start:middle], self._stream_N[middle : end - 1]

    def spans(self, row: int) -> list[Span]:
        return [Span(int(self._starts_S[2 * n]), int(self._starts_S[2 * n + 2])) for n in self._pairs(row)]


class _Pairs:
    """Rows of two pieces of text each, for BERT's second objective."""

    def __init__(self, split: Split, objective: SentencePairs, frame: Frame, seed: int, source: str) -> None:
        self._objective, self._frame, self._seed, self._source = objective, frame, seed, source
        self._documents = _Sentences(split)
        lengths = [self._documents.lengths(d) for d in range(len(self._documents))]
        if max(map(len, lengths), default=0) < 2:
            raise ValueError(
                "objective=SentencePairs is for documents in sentences, and no document here has two; prepare them "
                "with data.sentences=true."
            )
        if len(lengths) < 2 and objective.negative == "random":
            raise ValueError(
                "objective=SentencePairs takes text of another document, and there is one; give more documents, or say "
                "objective.negative=swapped."
            )
        self._chunks = objective.chunks(lengths, frame.sequence_length)

    def __len__(self) -> int:
        return len(self._chunks)

    def batch(self, picks: Sequence[Pick]) -> Batch:
        purpose = self._objective.purpose
        return stack(
            [
                self._objective.row(
                    self._documents,
                    self._chunks[pick.row],
                    self._frame,
                    generator(self._seed, purpose, self._source, pick.epoch, pick.row),
                )
                for pick in picks
            ]
        )

    def spans(self, row: int) -> list[Span]:
        chunk = self._chunks[row]
        return [self._documents.span(chunk.document, chunk.first, chunk.end)]


class _Sentences(Sequence[Sequence[np.ndarray]]):
    """Documents as their sentences' tokens, without ends of documents and empty sentences; read when asked for."""

    def __init__(self, split: Split) -> None:
        self._split, self._starts_S = split, split.sequence_starts()
        (self._with_text,) = np.nonzero(np.diff(self._starts_S[split.documents_D]) > 1)  # more than their end

    def __len__(self) -> int:
        return len(self._with_text)

    def lengths(self, document: int) -> list[int]:
        first, end = self._split.documents_D[self._with_text[document] :][:2]
        lengths = self._split.lengths_S[first:end].tolist()
        lengths[-1] -= 1
        return lengths if lengths[-1] else lengths[:-1]

    def __getitem__(self, document: int) -> list[np.ndarray]:  # pyrefly: ignore[bad-override]: no slices
        first = int(self._split.documents_D[self._with_text[document]])
        starts = self._starts_S[first:]
        found = []
        for i, length in enumerate(self.lengths(document)):
            found.append(np.asarray(self._split.tokens_N[starts[i] : starts[i] + length], np.int32))
        return found

    def span(self, document: int, first: int, end: int) -> Span:
        start = int(self._split.documents_D[self._with_text[document]])
        return Span(int(self._starts_S[start + first]), int(self._starts_S[start + end]))
