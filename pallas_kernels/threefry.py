"""Counter-based random bits: elementwise over index arrays, so any shard or kernel block makes its own."""

from typing import TypeAlias

import jax
import numpy as np

Words: TypeAlias = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: Words, counter: Words) -> Words:
    """Twenty rounds of Threefry on uint32 words that broadcast against each other.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the same function as
    JAX's default generator.
    """
    k0, k1 = key
    keys = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    x0, x1 = counter[0] + k0, counter[1] + k1
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def keep_mask(rate: float, key: Words, counter: Words) -> jax.Array:
    """True with probability 1 - rate, per element of the broadcast counters."""
    bits, _ = threefry2x32(key, counter)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
