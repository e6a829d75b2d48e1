"""BERT's objectives: guessing masked tokens, and whether two pieces of text belong together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from data.batches.objectives.draws import Draws
from data.batches.objectives.row import Frame, Objective, Row, WindowObjective, check_shares, window_row
from data.batches.packing import Window


@dataclass(frozen=True, kw_only=True)
class MaskedLm(WindowObjective):
    """Some tokens from all others (Devlin et al. 2018, section 3.1); a target is at its token's own position."""

    rate: float = 0.15
    """Share of a row's tokens that are to be guessed, specials and ends of documents not counted; at least one."""
    mask_rate: float = 0.8
    """Share of these that become the mask."""
    random_rate: float = 0.1
    """Share of these that become any token; the rest stays as it is."""
    max_predictions: int | None = None
    """Most tokens of a row that are to be guessed; None: as the rate says. BERT has 20 at 128 tokens, 80 at 512."""
    whole_words: bool = False
    """Guess all tokens of a word or none; words that would exceed the row's number are passed over, all of them if
    none is so short."""

    purpose: ClassVar[str] = "masked"
    needs: ClassVar[tuple[str, ...]] = ("mask",)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from check_shares(self, "rate", strictly=True)
        yield from check_shares(self, "mask_rate", "random_rate")
        if self.mask_rate + self.random_rate > 1:
            yield "random_rate", f"must be at most 1 - mask_rate={self.mask_rate}; try 0.1"
        if self.max_predictions is not None and self.max_predictions < 1:
            yield "max_predictions", "must be at least 1; None sets no limit"

    @property
    def attention(self) -> Literal["both"]:
        """See `Objective`."""
        return "both"

    @property
    def by_word(self) -> bool:
        """See `Objective`."""
        return self.whole_words

    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """The window's inputs as a row, for attention in both directions.

        Raises:
          ValueError: the mask or, for whole words, `starts_word_V` is missing.
        """
        row = window_row(window, frame)
        words = (row["segments"] > 0) & (row["tokens"] != frame.end_of_document)
        return row | self.mask(row["tokens"], words, frame, draws)

    def mask(self, tokens_T: np.ndarray, words_T: np.ndarray, frame: Frame, draws: Draws) -> Row:
        """`tokens`, `targets` and `weights` of a row; only tokens where `words_T` (bool [T]) and no specials count."""
        places = np.flatnonzero(words_T & ~np.isin(tokens_T, frame.specials.tokens()))
        chosen = self._choose(places, tokens_T, frame, draws)
        fate = draws.uniform(len(chosen))
        anything = draws.below(frame.vocab_size, len(chosen))
        guessed = np.where(fate < self.mask_rate + self.random_rate, anything, tokens_T[chosen])
        tokens, weights = tokens_T.copy(), np.zeros(len(tokens_T), np.float32)
        tokens[chosen] = np.where(fate < self.mask_rate, frame.special("mask"), guessed)
        weights[chosen] = 1
        return {"tokens": tokens, "targets": tokens_T.copy(), "weights": weights}

    def _choose(self, places: np.ndarray, tokens_T: np.ndarray, frame: Frame, draws: Draws) -> np.ndarray:
        wanted = min(max(1, round(self.rate * len(places))), self.max_predictions or len(places), len(places))
        if not self.whole_words:
            return places[draws.permutation(len(places))[:wanted]]
        if frame.starts_word_V is None:
            raise ValueError("whole words need to know which tokens start one; try whole_words=false.")
        starts = frame.starts_word_V[tokens_T[places]] | (np.diff(places, prepend=-2) > 1)
        words = np.split(places, np.flatnonzero(starts)[1:])
        chosen: list[int] = []
        for word in draws.permutation(len(words)):
            if len(chosen) + len(words[word]) <= wanted:
                chosen.extend(words[word])
            if len(chosen) == wanted:
                break
        return np.array(chosen, np.int64)


class Chunk(NamedTuple):
    """Consecutive sentences of a document, at least two: what a sample of `SentencePairs` is made from."""

    document: int
    first: int
    """Its first sentence."""
    end: int
    """The sentence behind its last."""


@dataclass(frozen=True, kw_only=True)
class SentencePairs(Objective):
    """`[CLS] a [SEP] b [SEP]`, masked; half of the time b does not follow a, and `label` is 1 instead of 0.

    a and b are pieces of text, of a sentence or many. A row also has `types`, 0 up to the first `[SEP]`, then 1.
    """

    negative: Literal["random", "swapped"] = "random"
    """What b is where it does not follow a: text of another document (next-sentence prediction, Devlin et al. 2018), or
    what precedes a (sentence order, Lan et al. 2019)."""
    masking: MaskedLm = MaskedLm()
    """How tokens of both are masked."""
    short_rate: float = 0.1
    """Share of pairs that are shorter than the row, from 2 tokens on."""

    purpose: ClassVar[str] = "sentence pairs"
    needs: ClassVar[tuple[str, ...]] = ("mask", "cls", "sep")

    @property
    def attention(self) -> Literal["both"]:
        """See `Objective`."""
        return "both"

    @property
    def by_word(self) -> bool:
        """See `Objective`."""
        return self.masking.whole_words

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from check_shares(self, "short_rate")

    def chunks(self, sentence_tokens: Sequence[Sequence[int]], sequence_length: int) -> list[Chunk]:
        """The samples of an epoch, from each document's sentences' lengths: as many sentences as fill a row.

        A last sentence left alone takes the one before it, which then is in two chunks; a document of one has none.
        """
        most, found = _most(sequence_length), []
        for document, lengths in enumerate(sentence_tokens):
            first = total = 0
            for sentence, length in enumerate(lengths):
                total += length
                if sentence == len(lengths) - 1:
                    first = min(first, sentence - 1)
                elif total < most or sentence == first:
                    continue
                if first >= 0:
                    found.append(Chunk(document, first, sentence + 1))
                first, total = sentence + 1, 0
        return found

    def row(self, documents: Sequence[Sequence[np.ndarray]], chunk: Chunk, frame: Frame, draws: Draws) -> Row:
        """A chunk of these documents, each its sentences' tokens (int [n], none empty), as a row.

        Where b is of another document, the chunk's sentences behind a are left out of this epoch.

        Raises:
          ValueError: a special token is missing, or there is no other document.
        """
        most = _most(frame.sequence_length)
        short, half, cut, other, start = draws.uniform(5)
        target = 2 + int(short / self.short_rate * (most - 1)) if short < self.short_rate else most
        sentences = _fill(documents[chunk.document][chunk.first : chunk.end], target, at_least=2)
        border = 1 + int(cut * (len(sentences) - 1))
        a, b = sentences[:border], sentences[border:]
        label = int(half < 0.5)
        if label and self.negative == "swapped":
            a, b = b, a
        elif label:
            b = _of_another(documents, chunk.document, target - sum(map(len, a)), other, start)
        a, b = truncated(np.concatenate(a), np.concatenate(b), most, draws)
        return self._framed(a, b, frame, draws) | {"label": np.full(frame.sequence_length, label, np.int32)}

    def _framed(self, a: np.ndarray, b: np.ndarray, frame: Frame, draws: Draws) -> Row:
        cls, sep = ([frame.special(name)] for name in ("cls", "sep"))
        border, used = len(a) + 2, len(a) + len(b) + 3
        times_T = np.arange(frame.sequence_length)
        tokens_T = np.full(frame.sequence_length, frame.pad, np.int32)
        tokens_T[:used] = np.concatenate([cls, a, sep, b, sep])
        real_T = times_T < used
        row = {
            "segments": real_T.astype(np.int32),
            "positions": np.where(real_T, times_T, 0).astype(np.int32),
            "types": (real_T & (times_T >= border)).astype(np.int32),
        }
        return row | self.masking.mask(tokens_T, real_T, frame, draws)


def _most(sequence_length: int) -> int:
    """Tokens of text in a row. Raises: ValueError if two do not fit."""
    if sequence_length < 5:
        raise ValueError(
            f"batch.sequence_length={sequence_length} is too short for two sentences; try batch.sequence_length=128."
        )
    return sequence_length - 3


def _fill(sentences: Sequence[np.ndarray], target: int, at_least: int) -> Sequence[np.ndarray]:
    """The first sentences, up to the one with which they hold `target` tokens."""
    held = list(accumulate(map(len, sentences)))
    return sentences[: max(at_least, 1 + sum(tokens < target for tokens in held))]


def _of_another(
    documents: Sequence[Sequence[np.ndarray]], document: int, target: int, other: float, start: float
) -> Sequence[np.ndarray]:
    """Sentences of another document from a random one on, chosen by two numbers in [0, 1)."""
    if len(documents) < 2:
        raise ValueError('text of another document needs two documents; try negative="swapped".')
    found = documents[(document + 1 + int(other * (len(documents) - 1))) % len(documents)]
    return _fill(found[int(start * len(found)) :], target, at_least=1)


def truncated(a: np.ndarray, b: np.ndarray, most: int, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to `most` tokens, always the longer one, at its front or back by chance (BERT's `truncate_seq_pair`)."""
    left_a = min(len(a), max(most - len(b), most // 2))
    left_b = min(len(b), most - left_a)
    cut = []
    for tokens, left in (a, left_a), (b, left_b):
        front = int((draws.bits(len(tokens) - left) >> np.uint64(63)).sum())
        cut.append(tokens[front : front + left])
    return cut[0], cut[1]
