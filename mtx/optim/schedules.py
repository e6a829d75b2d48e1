"""Learning-rate schedules, which may follow steps, samples or tokens, and the counters that they read."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtx.errors import Problem


class Counter(NamedTuple):
    """A count below 2^64 as two uint32 words: accelerators have no 64-bit integers by default."""

    high: jax.Array
    low: jax.Array

    @staticmethod
    def of(value: int) -> "Counter":
        return Counter(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))

    def plus(self, n: jax.Array) -> "Counter":
        """Add an array of uint32 (broadcast), carrying into the high word."""
        low = self.low + n.astype(jnp.uint32)
        return Counter(self.high + (low < self.low).astype(jnp.uint32), low)

    def as_float(self) -> jax.Array:
        """float32, within a relative 1e-7: for schedules, not for indices."""
        return self.high.astype(jnp.float32) * 2.0**32 + self.low.astype(jnp.float32)

    def __int__(self) -> int:
        return (int(self.high) << 32) + int(self.low)


class Progress(NamedTuple):
    """How far training is, in float32: what schedules look at."""

    steps: jax.Array
    samples: jax.Array
    tokens: jax.Array
    fraction: jax.Array
    """Of the run's steps, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """A length that is counted."""

    count: int
    """How many."""

    def check(self) -> Iterator[Problem]:
        if self.count < 0:
            yield "count", "must not be negative"

    @property
    def length(self) -> float:
        return float(max(self.count, 1))


@dataclass(frozen=True, kw_only=True)
class Steps(Count):
    """A length in optimizer steps."""

    def done(self, progress: Progress) -> jax.Array:
        return progress.steps / self.length


@dataclass(frozen=True, kw_only=True)
class Samples(Count):
    """A length in sequences."""

    def done(self, progress: Progress) -> jax.Array:
        return progress.samples / self.length


@dataclass(frozen=True, kw_only=True)
class Tokens(Count):
    """A length in tokens."""

    def done(self, progress: Progress) -> jax.Array:
        return progress.tokens / self.length


@dataclass(frozen=True, kw_only=True)
class Fraction:
    """A length as a share of the whole run's steps."""

    share: float
    """0 to 1."""

    def check(self) -> Iterator[Problem]:
        if not 0 <= self.share <= 1:
            yield "share", "must lie between 0 and 1"

    def done(self, progress: Progress) -> jax.Array:
        return progress.fraction / self.length

    @property
    def length(self) -> float:
        return max(self.share, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up from 0 to the peak, then what the subclass does."""

    peak_lr: float = 3e-4
    """Learning rate at the end of warm-up."""
    warmup: Steps | Samples | Tokens | Fraction = Fraction(share=0.02)
    """Length of the linear warm-up."""

    def check(self) -> Iterator[Problem]:
        if self.peak_lr <= 0:
            yield "peak_lr", "must be positive, such as 3e-4"

    def rate(self, progress: Progress) -> jax.Array:
        """The learning rate, a float32 scalar."""
        return self.peak_lr * jnp.minimum(1.0, self.warmup.done(progress)) * self.decay(progress)

    def decay(self, progress: Progress) -> jax.Array:
        """Factor on the peak after warm-up."""
        return jnp.ones((), jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Warm-up, then the peak."""


@dataclass(frozen=True, kw_only=True)
class Decaying(Schedule):
    """Warm-up, then a fall from the peak to `final_share` of it at `end`."""

    final_share: float = 0.1
    """The last learning rate, as a share of the peak."""
    end: Steps | Samples | Tokens | Fraction = Fraction(share=1.0)
    """Where the fall ends, counted from the run's start."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if not 0 <= self.final_share <= 1:
            yield "final_share", "must lie between 0 and 1"
        if type(self.end) is type(self.warmup):
            (before,), (after,) = dataclasses.astuple(self.warmup), dataclasses.astuple(self.end)
            if before >= after:
                yield "warmup", f"must end before the decay does ({after})"
        elif 0 in dataclasses.astuple(self.end):
            yield "end", "must be positive"

    def fallen(self, progress: Progress) -> jax.Array:
        """How much of the fall is done, 0 to 1. It starts where warm-up ends, whatever the two count in: both
        grow in proportion, so that one over the other is what `end` has done when `warmup` is done."""
        warm, done = self.warmup.done(progress), self.end.done(progress)
        start = done / jnp.maximum(warm, 1e-9)
        return jnp.clip((done - start) / jnp.maximum(1.0 - start, 1e-9), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cosine(Decaying):
    """Half a cosine down to the final learning rate."""

    def decay(self, progress: Progress) -> jax.Array:
        curve = 0.5 * (1.0 + jnp.cos(jnp.pi * self.fallen(progress)))
        return self.final_share + (1.0 - self.final_share) * curve


@dataclass(frozen=True, kw_only=True)
class Linear(Decaying):
    """A straight line down to the final learning rate."""

    def decay(self, progress: Progress) -> jax.Array:
        return 1.0 - (1.0 - self.final_share) * self.fallen(progress)
