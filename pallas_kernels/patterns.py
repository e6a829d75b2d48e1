"""Block-sparse patterns: which blocks of keys a block of queries sees, as boolean matrices known before compiling.

A pattern says nothing of order: `Blocks(...) & Causal()` hides what comes later. Each is exact for any length; the
last block may be partly filled.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Pattern(abc.ABC):
    """What the patterns share."""

    block: int = 128
    """Positions per block, of queries and of keys. Kernels skip whole tiles, so a multiple of theirs is quickest."""

    def check(self) -> Iterator[tuple[str, str]]:
        """(field, what is wrong with it)."""
        for name, value in vars(self).items():
            least = 1 if name in ("block", "stride", "dilation") else 0
            if isinstance(value, int) and value < least:
                yield name, f"must be at least {least}"

    def reach(self) -> int:
        """How many positions it can speak of; a formula of any."""
        return np.iinfo(np.int32).max

    @abc.abstractmethod
    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        """bool of q broadcast against k, block indices; every pattern but `Chosen` is a formula of them."""

    def matrix(self, queries: int, keys: int) -> np.ndarray:
        """bool[query blocks, key blocks] for so many positions."""
        rows, columns = (np.arange(-(-n // self.block)) for n in (queries, keys))
        return np.broadcast_to(self.seen(rows[:, None], columns[None, :]), (rows.size, columns.size))


@dataclass(frozen=True, kw_only=True)
class Fixed(Pattern):
    """One's own group of `stride` blocks, and the last `summary` of every group (Child et al. 2019, section 4.2)."""

    stride: int = 4
    summary: int = 1

    def check(self) -> Iterator[tuple[str, str]]:
        yield from super().check()
        if self.summary > self.stride:
            yield "summary", f"must be at most stride={self.stride}"

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return (q // self.stride == k // self.stride) | (k % self.stride >= self.stride - self.summary)


@dataclass(frozen=True, kw_only=True)
class Strided(Pattern):
    """The `stride` nearest blocks, and every `stride`-th from one's own (Child et al. 2019, section 4.2)."""

    stride: int = 4

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return (abs(q - k) < self.stride) | ((q - k) % self.stride == 0)


@dataclass(frozen=True, kw_only=True)
class LocalGlobal(Pattern):
    """`window` blocks on either side; the first `globals` blocks see all and are seen by all."""

    window: int = 1
    globals: int = 1

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        return (abs(q - k) <= self.window) | (q < self.globals) | (k < self.globals)


@dataclass(frozen=True, kw_only=True)
class Longformer(LocalGlobal):
    """As `LocalGlobal`, of a `dilation` times wider window every `dilation`-th (Beltagy et al. 2020, section 3.1)."""

    dilation: int = 1

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        near = (abs(q - k) <= self.window * self.dilation) & ((q - k) % self.dilation == 0)
        return near | (q < self.globals) | (k < self.globals)


@dataclass(frozen=True, kw_only=True)
class BigBird(LocalGlobal):
    """As `LocalGlobal`, and for every block of queries `random` blocks at or before it (Zaheer et al. 2020, section 2).

    Drawn of what comes before, so that a block's draw is the same in a sequence of any length.
    """

    random: int = 3
    seed: int = 0

    def check(self) -> Iterator[tuple[str, str]]:
        yield from super().check()
        if self.seed >= 1 << 48:
            yield "seed", "must be below 2**48"

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        word = (q.astype(np.uint64) << np.uint64(32)) ^ k.astype(np.uint64) ^ (np.uint64(self.seed) << np.uint64(16))
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):  # splitmix64's finalizer
            word = (word ^ (word >> np.uint64(30))) * np.uint64(multiplier)
        word = np.where(k <= q, word, np.iinfo(np.uint64).max)
        rank = np.argsort(np.argsort(word, axis=1, kind="stable"), axis=1)
        return super().seen(q, k) | ((rank < self.random) & (k <= q))


@dataclass(frozen=True, kw_only=True)
class Chosen(Pattern):
    """Any boolean matrix of blocks."""

    rows: tuple[tuple[bool, ...], ...]
    """rows[i][j]: whether query block i sees key block j. Must be at least as large as the sequence needs."""

    def check(self) -> Iterator[tuple[str, str]]:
        yield from super().check()
        if not self.rows or not self.rows[0] or len({len(row) for row in self.rows}) > 1:
            yield "rows", "must be rows of equal length, at least 1 x 1"

    def reach(self) -> int:
        return min(len(self.rows), len(self.rows[0])) * self.block

    def seen(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        given = np.array(self.rows, bool)
        if given.shape[0] < q.size or given.shape[1] < k.size:
            there, needed = f"{given.shape[0]} x {given.shape[1]}", f"{q.size} x {k.size}"
            raise ValueError(f"Chosen.rows has {there} blocks of {self.block}; {needed} are needed")
        return given[: q.size, : k.size]
