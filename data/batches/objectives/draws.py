"""Random numbers of a sample: a function of (seed, purpose, source, epoch, index), equal on every machine.

Only the raw 64-bit words come from numpy, whose bit generators keep their streams from version to version; what is
made of them is spelled out here, because `numpy.random.Generator` keeps no such promise.
"""

import hashlib
import json

import numpy as np

ROUNDS = 6
"""Of the cipher that permutes numbers: Luby and Rackoff 1988 need four."""


class Draws:
    """The random numbers of one sample, in the order in which they are asked for (Philox: Salmon et al. 2011)."""

    def __init__(self, key: int) -> None:
        """key: 128 bits."""
        self._philox = np.random.Philox(key=key)

    def bits(self, count: int) -> np.ndarray:
        """uint64 [count]."""
        return np.asarray(self._philox.random_raw(count), np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count], multiples of 2^-53 in [0, 1)."""
        return (self.bits(count) >> np.uint64(11)) * 2.0**-53

    def below(self, limit: int, count: int) -> np.ndarray:
        """int64 [count] in [0, limit); for a limit far below 2^64 as likely as one another."""
        return (self.bits(count) % np.uint64(limit)).astype(np.int64)

    def permutation(self, count: int) -> np.ndarray:
        """0..count-1 in random order, int64 [count]."""
        return np.argsort(self.bits(count), kind="stable")


def generator(seed: int, purpose: str, source: str, epoch: int, index: int) -> Draws:
    """The draws of sample `index` of a source in an epoch, for one purpose; unrelated to those of any other."""
    name = json.dumps(["mtx sample", int(seed), purpose, source, int(epoch), int(index)])
    return Draws(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little"))


def permuted(draws: Draws, index: int, count: int) -> int:
    """Where a random permutation of 0..count-1 sends `index`. No permutation is kept, whatever the count.

    A Feistel cipher on the smallest even number of bits that holds them (at least 4), applied until it stays below
    the count (Black and Rogaway 2002, cycle walking).
    """
    assert 0 <= index < count, "there is no such index"
    half = max(2, ((count - 1).bit_length() + 1) // 2)
    keys = draws.bits(ROUNDS).tolist()
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> (64 - half))
        index = left << half | right
        if index < count:
            return index


def _mix(word: int) -> int:
    """64 bits, each of which depends on all (splitmix64's finalizer, Steele et al. 2014)."""
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1):
        word = (word ^ word >> shift) * factor % 2**64
    return word
