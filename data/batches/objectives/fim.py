"""Fill in the middle: part of a document moves to its end, so that a causal model learns to insert."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data.batches.objectives.draws import Draws
from data.batches.objectives.row import (
    Codec,
    Frame,
    Row,
    Specials,
    WindowObjective,
    check_shares,
    documents,
    window_row,
)
from data.batches.packing import Window

UNREADABLE = "\ufffd"
"""What a tokenizer decodes bytes to that are no UTF-8: a window may cut a character."""


@dataclass(frozen=True, kw_only=True)
class FillInTheMiddle(WindowObjective):
    """Documents of a window cut in three at two random places, as prefix, suffix, middle (Bavarian et al. 2022).

    PSM is `<prefix> p <suffix> s <middle> m`, SPM `<prefix> <suffix> s <middle> p m` (their appendix D, the second
    variant). The window's last documents give way to what the row gains in tokens; what stays inverts exactly.
    """

    rate: float = 0.5
    """Share of documents that are cut; their section 4.1 finds left-to-right loss unharmed up to 0.9."""
    spm_rate: float = 0.5
    """Share of SPM among these."""
    characters: bool = True
    """Cut between characters and encode the three parts anew; False: between tokens. A document, or a part of one
    that a window holds, whose text does not survive that to the letter is cut between tokens all the same."""

    purpose: ClassVar[str] = "fill in the middle"
    needs: ClassVar[tuple[str, ...]] = ("fim_prefix", "fim_middle", "fim_suffix")

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from check_shares(self, "rate", "spm_rate")

    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """The window as a row, each of its documents as it is or permuted.

        Raises:
          ValueError: a special token or, for cuts between characters, the codec is missing.
        """
        tokens, real = window
        found = documents(tokens[: real + 1], frame.end_of_document)
        chances = draws.uniform(4 * len(found)).reshape(-1, 4)
        space = frame.sequence_length + 1
        row_S = np.full(space, frame.pad, np.int32)
        at = 0
        for number, (document, chance) in enumerate(zip(found, chances, strict=True), start=1):
            kept = document
            while len(new := self.transform(kept, chance, frame)) > space - at:
                kept = kept[: max(0, len(kept) - (len(new) - (space - at)))]
            row_S[at : at + len(new)] = new
            at += len(new)
            if number == len(found) or len(kept) < len(document) or at == space:
                break
            row_S[at] = frame.end_of_document
            at += 1
        return window_row((row_S, max(at - 1, 0)), frame)

    def transform(self, document: np.ndarray, chance: np.ndarray, frame: Frame) -> np.ndarray:
        """A document without its end (int32 [n]), as it is or permuted.

        chance: float64 [4] in [0, 1): whether to permute, in which order, and the two cuts.
        """
        if chance[0] >= self.rate or not len(document):
            return document
        cuts = sorted(chance[2:])
        parts = _between_characters(document, cuts, _codec(frame)) if self.characters else None
        before, middle, after = parts or _thirds(document, cuts)
        start, mid, end = ([frame.special(name)] for name in ("fim_prefix", "fim_middle", "fim_suffix"))
        if chance[1] < self.spm_rate:
            order = [start, end, after, mid, before, middle]
        else:
            order = [start, before, end, after, mid, middle]
        return np.concatenate(order).astype(np.int32)


def invert(document: np.ndarray, specials: Specials) -> np.ndarray:
    """What `FillInTheMiddle.transform` made a document from, in the tokens of its parts; others stay as they are."""
    if not len(document) or document[0] != specials.fim_prefix:
        return document
    end, mid = (int(np.flatnonzero(document == token)[0]) for token in (specials.fim_suffix, specials.fim_middle))
    return np.concatenate([document[1:end], document[mid + 1 :], document[end + 1 : mid]])


def _thirds(document, cuts):
    """Cut where two numbers in [0, 1) fall among the places before, between and behind its items."""
    first, second = (int(cut * (len(document) + 1)) for cut in cuts)
    return document[:first], document[first:second], document[second:]


def _between_characters(document: np.ndarray, cuts: list[float], codec: Codec) -> list[list[int]] | None:
    """The tokens of three parts of a document's text, None if they would not say the same."""
    text = codec.decode(document.tolist())
    parts = _thirds(text, cuts)
    encoded = [codec.encode(part) for part in parts]
    exact = UNREADABLE not in text and all(codec.decode(e) == part for e, part in zip(encoded, parts, strict=True))
    return encoded if exact else None


def _codec(frame: Frame) -> Codec:
    if frame.codec is None:
        raise ValueError("cuts between characters need a tokenizer that decodes and encodes; try characters=false.")
    return frame.codec
