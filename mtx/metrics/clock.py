"""Where a run's seconds go: per step, since the last console line, and in the long run."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Some steps and the wall seconds that they took, without evaluation and saving."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0
    """Of them, in which the loop waited for the next batch; the device may have had work meanwhile."""

    def __add__(self, other: "Pace") -> "Pace":
        return Pace(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.data_wait_s + other.data_wait_s,
        )


class Clock:
    """Seconds of the steps of one process, from any first step on; time is monotonic.

    `step` is called when a step's metrics have arrived. What the loop does besides goes into `excluded`, after
    the step before it has arrived. The first step compiles: it counts neither in `since_line` nor in the ETA.
    """

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.away: float | None = None
        """Since when the loop does something else than steps."""
        self.excluded_s = 0.0
        self.data_wait_s = 0.0
        self.lap = Pace()
        self.line = Pace()
        self.steady: Pace | None = None

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around what waits for the next batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.data_wait_s += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Around evaluation, saving, sampling: seconds that belong to no step. One may hold another."""
        if self.away is not None:
            yield
            return
        self.away, waited = time.perf_counter(), self.data_wait_s
        try:
            yield
        finally:
            self.excluded_s += time.perf_counter() - self.away
            self.data_wait_s, self.away = waited, None

    def step(self, tokens: int) -> Pace:
        """A step of so many tokens has arrived; returns its own pace."""
        now = time.perf_counter()
        if self.away is not None:
            self.excluded_s += now - self.away
            self.away = now
        seconds = now - self.last - self.excluded_s
        self.lap = Pace(1, tokens, seconds, self.data_wait_s)
        self.last, self.excluded_s, self.data_wait_s = now, 0.0, 0.0
        if self.steady is None:
            self.steady = Pace()
        else:
            self.steady += self.lap
            self.line += self.lap
        return self.lap

    def since_line(self) -> Pace:
        """The pace since this was last asked; of the last step alone if none came since, or only the first."""
        pace, self.line = self.line, Pace()
        return pace if pace.steps else self.lap

    def remaining_s(self, steps: int) -> float:
        """Seconds for so many more steps; not a number before the second step."""
        if self.steady is None or not self.steady.steps:
            return math.nan
        return steps * self.steady.seconds / self.steady.steps


def duration(seconds: float) -> str:
    """`1:02:03`, or `--` when unknown."""
    if not math.isfinite(seconds):
        return "--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
