"""Predicting the next token: of all, or of what follows a prefix that is read both ways."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from data.batches.objectives.draws import Draws
from data.batches.objectives.row import Frame, Row, WindowObjective, window_row
from data.batches.packing import Window


@dataclass(frozen=True, kw_only=True)
class CausalLm(WindowObjective):
    """Every token from those before it: `packing.pack`, a window at a time."""

    purpose: ClassVar[str] = "causal"

    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """The window as a row; it needs no draws."""
        return window_row(window, frame)


@dataclass(frozen=True, kw_only=True)
class PrefixLm(WindowObjective):
    """What follows a prefix of random length, whose tokens see one another (Raffel et al. 2019, section 3.2.1).

    Each segment of the row, a document or all of it, has a prefix: 1 token to all but the last target, as likely.
    """

    purpose: ClassVar[str] = "prefix"

    @property
    def attention(self) -> Literal["prefix"]:
        """See `Objective`."""
        return "prefix"

    def row(self, window: Window, frame: Frame, draws: Draws) -> Row:
        """The window as a row with `prefix`; targets inside a prefix weigh 0, the first behind it does not."""
        row, real = window_row(window, frame), window[1]
        own = row["segments"][:real] - 1
        count = int(own.max(initial=-1)) + 1
        targets = np.bincount(own, row["weights"][:real], count).astype(np.int64)
        lengths = 1 + (draws.uniform(count) * np.maximum(targets, 1)).astype(np.int64)
        ends = np.searchsorted(own, np.arange(count)) + lengths
        row["prefix"] = np.full(frame.sequence_length, ends[-1] if count else 0, np.int32)
        row["prefix"][:real] = ends[own]
        row["weights"] *= np.arange(1, frame.sequence_length + 1) >= row["prefix"]
        return row
