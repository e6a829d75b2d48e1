"""Curricula: which samples may be drawn, and how long rows are, while training goes on."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from data.batches.objectives import generator, permuted
from data.batches.packing import Batch


class Pacing(Protocol):
    """Step to difficulty, which never decreases."""

    @property
    def last_step(self) -> int:
        """From here on it stays."""
        ...

    def check(self) -> Iterator[tuple[str, str]]: ...
    def difficulty(self, step: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class FixedRoot:
    """first + (last - first) (step / steps)^(1 / degree), in multiples (DeepSpeed's `fixed_root`)."""

    first: int
    """Difficulty at step 0."""
    last: int
    """Difficulty from step `steps` on."""
    steps: int
    """How many steps it takes; DeepSpeed calls its first step 1."""
    degree: int = 2
    """2: it grows as the square root."""
    multiple: int = 1
    """Difficulties are rounded down to multiples of it, though not below `first`; the last one is as it is."""

    @property
    def last_step(self) -> int:
        """From here on it stays."""
        return self.steps

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        for field in ("first", "steps", "degree", "multiple"):
            if getattr(self, field) < 1:
                yield field, "must be at least 1"
        if self.last < self.first:
            yield "last", f"must be at least first={self.first}"

    def difficulty(self, step: int) -> int:
        """In integers throughout: the same on every machine."""
        if step >= self.steps:
            return self.last
        span = self.last - self.first
        rises = range(1, span + 1)
        rise = bisect.bisect_right(rises, span**self.degree * step, key=lambda rise: rise**self.degree * self.steps)
        reached = (self.first + rise) // self.multiple * self.multiple
        lowest = -(-self.first // self.multiple) * self.multiple
        return min(max(reached, lowest), self.last)


@dataclass(frozen=True, kw_only=True)
class FixedLinear:
    """first + (last - first) step / steps, in multiples (DeepSpeed's `fixed_linear`)."""

    first: int
    """Difficulty at step 0."""
    last: int
    """Difficulty from step `steps` on."""
    steps: int
    """How many steps it takes."""
    multiple: int = 1
    """As in `FixedRoot`."""

    @property
    def last_step(self) -> int:
        """From here on it stays."""
        return self.steps

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        yield from self._root().check()

    def difficulty(self, step: int) -> int:
        """In integers throughout: the same on every machine."""
        return self._root().difficulty(step)

    def _root(self) -> FixedRoot:
        return FixedRoot(first=self.first, last=self.last, steps=self.steps, degree=1, multiple=self.multiple)


@dataclass(frozen=True, kw_only=True)
class FixedDiscrete:
    """One difficulty after another (DeepSpeed's `fixed_discrete`)."""

    difficulties: tuple[int, ...]
    """In ascending order."""
    until_steps: tuple[int, ...]
    """The last step of each but the last, which stays."""

    @property
    def last_step(self) -> int:
        """From here on it stays."""
        return self.until_steps[-1] + 1 if self.until_steps else 0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not self.difficulties or sorted(self.difficulties) != list(self.difficulties) or self.difficulties[0] < 1:
            yield "difficulties", "must ascend from 1 or more; try 1,50,100"
        if len(self.until_steps) != len(self.difficulties) - 1:
            yield "until_steps", "must hold one step less than there are difficulties"
        elif sorted(self.until_steps) != list(self.until_steps) or min(self.until_steps, default=0) < 0:
            yield "until_steps", "must ascend from 0 or more"

    def difficulty(self, step: int) -> int:
        """The difficulty at this step."""
        return self.difficulties[bisect.bisect_left(self.until_steps, step)]


def easiest_first(metric_N: np.ndarray | Sequence[float]) -> np.ndarray:
    """Samples in the order of a difficulty, int64 [N]; equal ones in the order of their numbers."""
    return np.argsort(np.asarray(metric_N), kind="stable")


@dataclass(frozen=True, kw_only=True)
class Length:
    """Tokens of a row's longest document: DeepSpeed's `seqlen`."""

    def measure(self, batch: Batch, counts_V: np.ndarray) -> np.ndarray:
        """float64 [B]."""
        segments_BT = batch["segments"]
        return np.array([np.bincount(row)[1:].max(initial=0) for row in segments_BT], np.float64)


@dataclass(frozen=True, kw_only=True)
class Rarity:
    """Mean of -log p over a row's tokens, p being a token's share of the training text: DeepSpeed's `vocabularyrarity`
    divided by the tokens, so that padding makes nothing easy."""

    def measure(self, batch: Batch, counts_V: np.ndarray) -> np.ndarray:
        """float64 [B]; counts_V: how often the training text has each token."""
        surprise_V = -np.log(np.maximum(counts_V, 1) / counts_V.sum())
        real_BT = batch["segments"] > 0
        surprise_BT = surprise_V[np.minimum(batch["tokens"], len(counts_V) - 1)] * real_BT
        return surprise_BT.sum(axis=1) / np.maximum(real_BT.sum(axis=1), 1)


@dataclass(frozen=True, kw_only=True)
class MetricFile:
    """Your own: an .npy with a number for each row of the training split."""

    path: str
    """The file."""

    def read(self, rows: int) -> np.ndarray:
        """float64 [rows]. Raises: ValueError that names the file."""
        try:
            metric_N = np.load(self.path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"curriculum.metric.path={self.path} cannot be read: {error}.") from error
        if metric_N.shape != (rows,) or metric_N.dtype.kind not in "iuf" or not np.isfinite(metric_N).all():
            raise ValueError(
                f"curriculum.metric.path={self.path} holds {metric_N.dtype} {list(metric_N.shape)}; it must hold a "
                f"finite number for each of the {rows} rows of the training split."
            )
        return metric_N.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Easy samples first: a pool of the easiest ones that grows (Li et al. 2022, "DeepSpeed Data Efficiency").

    While a pool stays the same, samples are drawn from it in an order of their own, none twice before all once.
    """

    pacing: FixedLinear | FixedRoot | FixedDiscrete
    """Step to the difficulty that is permitted."""
    metric: Length | Rarity | MetricFile = Length()
    """How difficult a sample is."""
    by: Literal["percentile", "value"] = "percentile"
    """What a difficulty is: percent of the samples, or the most that a sample's metric may be."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if any(self.pacing.check()):
            return
        if self.by == "percentile" and self.pacing.difficulty(self.pacing.last_step) != 100:
            yield "pacing", "must end at 100 percent, or some samples are never drawn"

    def permitted(self, step: int, metric_N: np.ndarray) -> int:
        """How many of the easiest samples may be drawn at a step, at least 1. metric_N: their metrics, sorted."""
        difficulty = self.pacing.difficulty(step)
        if self.by == "value":
            return max(1, int(np.searchsorted(metric_N, difficulty, side="right")))
        return max(1, min(difficulty, 100) * len(metric_N) // 100)

    def pool(self, step: int, metric_N: np.ndarray) -> tuple[int, int]:
        """How many of the easiest samples may be drawn at a step, and the step since which it has been so many."""
        pool = self.permitted(step, metric_N)
        steps = range(self.pacing.last_step + 1)
        return pool, bisect.bisect_left(steps, pool, key=lambda step: self.permitted(step, metric_N))

    def draw(self, seed: int, source: str, pool: int, sample: int) -> int:
        """The rank among the easiest that a source's sample has, counted from where its pool became what it is:
        `easiest_first(...)[rank]` is its number.

        A function of its arguments alone, at the same cost for any sample.
        """
        epoch, index = divmod(sample, pool)
        return permuted(generator(seed, "curriculum", source, epoch, pool), index, pool)


@dataclass(frozen=True, kw_only=True)
class LengthWarmup:
    """Short rows first (Li et al. 2021, "The stability-efficiency dilemma"): rows are cut to one of a few lengths,
    each of which is compiled once; what is behind is dropped."""

    lengths: tuple[int, ...]
    """Positions, in ascending order; the last one is the whole row."""
    pacing: FixedLinear | FixedRoot | FixedDiscrete
    """Step to the length that is reached; rows have the longest of `lengths` that is no longer, or the first."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not self.lengths or sorted(set(self.lengths)) != list(self.lengths) or self.lengths[0] < 1:
            yield "lengths", "must ascend from 1 or more; try 128,512,1024"
        elif not any(self.pacing.check()) and self.pacing.difficulty(self.pacing.last_step) < self.lengths[-1]:
            yield "pacing", f"must reach the whole row; try pacing.last={self.lengths[-1]}"

    def length(self, step: int) -> int:
        """Positions of the rows of a step."""
        return self.lengths[max(0, bisect.bisect_right(self.lengths, self.pacing.difficulty(step)) - 1)]

    def first_steps(self) -> list[int]:
        """The step from which on rows have at least each of the lengths."""
        steps = range(self.pacing.last_step + 1)
        return [bisect.bisect_left(steps, length, key=self.length) for length in self.lengths]

    def tokens(self, steps: int, global_size: int) -> tuple[int, int]:
        """Positions that the first `steps` steps of `global_size` rows train on, and those that they drop."""
        ends = [min(step, steps) for step in [*self.first_steps()[1:], steps]]
        starts = [min(step, steps) for step in self.first_steps()]
        trained = sum(length * (end - start) for length, start, end in zip(self.lengths, starts, ends, strict=True))
        return trained * global_size, (self.lengths[-1] * steps - trained) * global_size
