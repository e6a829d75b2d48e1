"""Span corruption: spans of text become sentinels, and what they stood for is to be told."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from data.batches.objectives.draws import Draws
from data.batches.objectives.row import (
    Example,
    Frame,
    Row,
    Specials,
    WindowObjective,
    check_shares,
    documents,
    examples_row,
)
from data.batches.packing import Window

SHORTEST = 2
"""Tokens that can be corrupted: one stays, one goes."""


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(WindowObjective):
    """T5's objective (Raffel et al. 2019, section 3.1.4) for a decoder: the corrupted text is a prefix of the answer.

    `a b c d e f` becomes `a b <0> e <1> <end>` to read and `<0> c d <1> f <end>` to write. All ways to place the spans
    are as likely; text comes first, a span last.
    """

    noise_density: float = 0.15
    """Share of tokens that go."""
    mean_span_tokens: float = 3.0
    """Mean length of what a sentinel stands for."""

    purpose: ClassVar[str] = "span corruption"
    needs: ClassVar[tuple[str, ...]] = ("sentinels",)

    @property
    def attention(self) -> Literal["prefix"]:
        """See `Objective`."""
        return "prefix"

    def sentinels(self, sequence_length: int) -> int:
        """See `Objective`."""
        return self.counts(self.window_length(sequence_length))[1]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from check_shares(self, "noise_density", strictly=True)
        if self.mean_span_tokens < 1:
            yield "mean_span_tokens", "must be at least 1; try 3"

    def counts(self, tokens: int) -> tuple[int, int]:
        """How many of so many tokens go, and in how many spans (T5's `random_spans_noise_mask`)."""
        noise = min(max(round(tokens * self.noise_density), 1), tokens - 1)
        return noise, min(max(round(noise / self.mean_span_tokens), 1), tokens - noise)

    def lengths(self, tokens: int) -> tuple[int, int]:
        """Of what is read and what is written, ends included, for so many tokens (T5's `random_spans_helper`)."""
        noise, spans = self.counts(tokens)
        return tokens - noise + spans + 1, noise + spans + 1

    def window_length(self, sequence_length: int) -> int:
        """Tokens of text that fill a row of `sequence_length` positions, which is what windows are to hold.

        Raises:
          ValueError: not even two tokens fit.
        """
        found = self._fitting(sequence_length)
        if found < SHORTEST:
            raise ValueError(
                f"batch.sequence_length={sequence_length} is too short to corrupt spans; try batch.sequence_length=64."
            )
        return found

    def _fitting(self, positions: int) -> int:
        """Most tokens that become no more positions than these; fewer than `SHORTEST` if none do."""
        texts = range(SHORTEST, max(SHORTEST, positions))
        return SHORTEST - 1 + bisect.bisect_right(texts, positions + 1, key=lambda tokens: sum(self.lengths(tokens)))

    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """The window's inputs as a row with `prefix`: one text, or, where documents are isolated, one per document.

        Isolated documents need more positions than one text: the last ones, and those of one token, give way.

        Raises:
          ValueError: there are fewer sentinels than spans.
        """
        tokens, real = window
        tokens = tokens[:real]
        assert real <= self.window_length(frame.sequence_length), "the window is longer than window_length"
        texts = documents(tokens, frame.end_of_document) if frame.isolate_documents else [tokens]
        examples, space = [], frame.sequence_length
        for text in texts:
            text = text[: self._fitting(space)]
            if len(text) >= SHORTEST:
                read, written = self.corrupt(text, frame, draws)
                examples.append(Example(np.concatenate([read, written]), len(read)))
                space -= len(read) + len(written) - 1
        return examples_row(examples, frame, prefix=True)

    def corrupt(self, tokens: np.ndarray, frame: Frame, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """What is read and what is written, for a text of at least two tokens (int32 [n]). Raises: ValueError."""
        noise, spans = self.counts(len(tokens))
        sentinels = frame.specials.sentinels
        if len(sentinels) < spans:
            raise ValueError(
                f"specials.sentinels holds {len(sentinels)} tokens, but {len(tokens)} tokens lose {spans} spans; "
                f"add sentinels, or try mean_span_tokens={noise // max(len(sentinels), 1) + 1}."
            )
        stays, goes = _composition(len(tokens) - noise, spans, draws), _composition(noise, spans, draws)
        borders = np.cumsum(np.stack([stays, goes], axis=1).reshape(-1))[:-1]
        parts = np.split(tokens, borders)
        read = [piece for i in range(spans) for piece in (parts[2 * i], [sentinels[i]])]
        written = [piece for i in range(spans) for piece in ([sentinels[i]], parts[2 * i + 1])]
        end = [frame.end_of_document]
        return np.concatenate([*read, end]).astype(np.int32), np.concatenate([*written, end]).astype(np.int32)


def restore(read: np.ndarray, written: np.ndarray, specials: Specials) -> np.ndarray:
    """The text that `SpanCorruption.corrupt` made both sides from."""
    stays, goes = (
        np.split(side[:-1], np.flatnonzero(np.isin(side[:-1], specials.sentinels))) for side in (read, written)
    )
    without = [part[1:] for part in goes[1:]]
    return np.concatenate([stays[0], *(part for i, gone in enumerate(without) for part in (gone, stays[i + 1][1:]))])


def _composition(total: int, parts: int, draws: Draws) -> np.ndarray:
    """Lengths of at least 1 that sum to `total`, all ways as likely: int64 [parts]."""
    borders = np.sort(draws.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(borders, prepend=0, append=total)
