"""Several sources in one stream of samples: which source sample i comes from, and which of its own samples that is.

Weights are shares of samples, that is of windows, and so of tokens: never of documents, whose lengths differ. Of any
first N samples each source has its share to within one sample, shares being rounded to parts of `LONGEST_PERIOD`. The
order repeats after a period in which every source has exactly its share, so that any sample of an endless run is found
at once, and nothing is stored of a run but how many samples it consumed.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ENDLESS = 1 << 62
"""More samples than any run has."""
LONGEST_PERIOD = 1 << 16
"""Weights whose common denominator is larger are rounded to parts of this."""


class Period(NamedTuple):
    """One period of an order."""

    source_P: np.ndarray
    """int: the source of each sample of it."""
    before_P: np.ndarray
    """int64: how many samples of that source precede it in the period."""
    counts_S: np.ndarray
    """int64: how many each source has."""


@lru_cache(maxsize=64)
def period(weights: tuple[float, ...]) -> Period:
    """The order for weights (positive or 0, in any unit).

    At every sample, of the sources that may have it without running ahead the one whose deadline is next (Tijdeman
    1980, "The chairman assignment problem"): like the greedy choice of the source furthest behind, but within one
    sample of its share whatever the weights.
    """
    counts = _shares(weights)
    length, sources = sum(counts), [j for j, n in enumerate(counts) if n]
    margin = Fraction(1, max(2 * len(sources) - 2, 1))
    up, down = margin.numerator, margin.denominator
    taken = dict.fromkeys(sources, 0)
    order = np.empty(length, np.int32)
    for i in range(length):
        best, best_key = sources[0], None
        for j in sources:
            behind = counts[j] * (i + 1) - taken[j] * length  # in parts of 1 / length
            if behind * down < up * length:
                continue  # it would run ahead
            key = ((down - up) * length - behind * down) / counts[j]
            if best_key is None or key < best_key:
                best, best_key = j, key
        taken[best] += 1
        order[i] = best
    before = np.empty(length, np.int64)
    for j in sources:
        where = order == j
        before[where] = np.arange(where.sum())
    return Period(order, before, np.array(counts, np.int64))


def _shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers of samples of one period."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * unit) for weight in exact]
    common = math.gcd(*whole)
    whole = [n // common for n in whole]
    if (total := sum(whole)) <= LONGEST_PERIOD:
        return whole
    ideal = [Fraction(n * LONGEST_PERIOD, total) for n in whole]
    found = [max(int(n), 1) if n else 0 for n in ideal]  # nobody is lost to rounding
    rest = LONGEST_PERIOD - sum(found)
    nearest = sorted(range(len(found)), key=lambda j: (found[j] - ideal[j], j), reverse=rest < 0)
    for j in [j for j in nearest if found[j] > 1 or rest > 0][: abs(rest)]:
        found[j] += 1 if rest > 0 else -1
    return found


@dataclass(frozen=True)
class Order:
    """The endless order of samples through phases, each with its weights."""

    starts: tuple[int, ...]
    """The first sample of each phase; the first is 0."""
    weights: tuple[tuple[float, ...], ...]
    """Of each phase, one for each source."""
    end: int | None = None
    """From this sample on no source has anything left; None: there is no end."""

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, which of its samples, counted through all phases and epochs)."""
        phase = bisect.bisect_right(self.starts, sample) - 1
        order = period(self.weights[phase])
        periods, i = divmod(sample - self.starts[phase], len(order.source_P))
        source = int(order.source_P[i])
        own = self.counts(self.starts[phase])[source] + periods * order.counts_S[source] + order.before_P[i]
        return source, int(own)

    def counts(self, samples: int) -> np.ndarray:
        """int64: how many of the first `samples` each source has."""
        return _counts(self, samples)


def capped(order: Order, most: Sequence[int | None]) -> Order:
    """The same order, but each source drops out once it has had so many samples (None: never), as one more phase."""
    left_out: set[int] = set()
    while True:
        reached = {
            source: _first_with(order, source, limit)
            for source, limit in enumerate(most)
            if limit is not None and source not in left_out
        }
        reached = {source: sample for source, sample in reached.items() if sample is not None}
        if not reached:
            return order
        sample = min(reached.values())
        left_out |= {source for source in reached if reached[source] == sample}
        order = _without(order, sample, left_out)
        if order.end is not None:
            return order


def _first_with(order: Order, source: int, limit: int) -> int | None:
    """After how many samples a source has had `limit`; None: never."""
    samples = range(ENDLESS)
    found = bisect.bisect_left(samples, limit, key=lambda sample: int(order.counts(sample)[source]))
    return found if found < ENDLESS else None


def _without(order: Order, sample: int, sources: set[int]) -> Order:
    """From a sample on, weight 0 for these."""
    phases = list(zip(order.starts, order.weights, strict=True))
    here = [weights for start, weights in phases if start <= sample][-1]
    later = [(sample, here)] + [(start, weights) for start, weights in phases if start > sample]
    later = [(start, tuple(0.0 if s in sources else w for s, w in enumerate(weights))) for start, weights in later]
    end = next((start for start, weights in later if not any(weights)), None)
    kept = [phase for phase in phases if phase[0] < sample] + [
        phase for phase in later if end is None or phase[0] < end
    ]
    return Order(tuple(start for start, _ in kept), tuple(weights for _, weights in kept), end)


@lru_cache(maxsize=1024)
def _counts(order: Order, samples: int) -> np.ndarray:
    total = np.zeros(len(order.weights[0]), np.int64)
    for phase, start in enumerate(order.starts):
        stop = order.starts[phase + 1] if phase + 1 < len(order.starts) else samples
        if (here := min(stop, samples) - start) <= 0:
            break
        found = period(order.weights[phase])
        periods, rest = divmod(here, len(found.source_P))
        total += periods * found.counts_S + np.bincount(found.source_P[:rest], minlength=len(total))
    return total
