"""The order of training: which row of a source is its sample i, through Grain.

Grain computes sample i's row from (seed, i) alone, with a cipher instead of a stored permutation: any sample of any
epoch costs the same, the state of a run is the number of samples that it consumed, and processes that each read
their own rows agree without speaking.
"""

import hashlib
from typing import Protocol


class Shuffled(Protocol):
    """Sample number to row number, without end."""

    def __getitem__(self, index: int, /) -> int: ...


def shuffled(rows: int, seed: int, source: str) -> Shuffled:
    """An endless sequence in which each epoch is another permutation of 0..rows-1."""
    import grain  # 0.7 s and JAX: only for who trains

    return grain.MapDataset.range(rows).shuffle(seed=grain_seed(seed, source)).repeat()  # pyrefly: ignore


def grain_seed(seed: int, source: str) -> int:
    """32 bits for Grain. It shuffles epoch e with its seed + e: seed 0's epoch 1 would be seed 1's epoch 0."""
    name = f"mtx training order {seed}" + (f" of {source}" if source else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
