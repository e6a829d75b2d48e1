"""The order of training: which window is sample i, and its tokens, through Grain.

Grain computes sample i's window from (seed, i) alone, with a cipher instead of a stored permutation: any sample
of any epoch costs the same, the state of a run is the number of samples that it consumed, and processes that
each read their own rows agree without speaking.
"""

import hashlib
from typing import Protocol

import numpy as np

from data.packing import Window, cut, window_count


class Order(Protocol):
    """Sample number to window, without end."""

    def __getitem__(self, index: int, /) -> Window: ...


class Windows:
    """A stream's windows, by number: what Grain reads."""

    def __init__(self, stream_N: np.ndarray, sequence_length: int) -> None:
        self._stream_N, self._sequence_length = stream_N, sequence_length

    def __len__(self) -> int:
        return window_count(len(self._stream_N), self._sequence_length)

    def __getitem__(self, index: int) -> Window:
        return cut(self._stream_N, index, self._sequence_length)


def shuffled(windows: Windows, seed: int) -> Order:
    """An endless sequence in which each epoch is another permutation of `windows`."""
    import grain  # 0.7 s and JAX: only for who trains

    return grain.MapDataset.source(windows).shuffle(seed=grain_seed(seed)).repeat()  # pyrefly: ignore


def grain_seed(seed: int) -> int:
    """32 bits for Grain. It shuffles epoch e with its seed + e: seed 0's epoch 1 would be seed 1's epoch 0."""
    return int.from_bytes(hashlib.sha256(f"mtx training order {seed}".encode()).digest()[:4], "big")
