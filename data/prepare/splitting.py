"""Which documents are trained on and which are held out: by the rank of a hash of their text.

Copies of a document fall on one side. The order of documents and files does not matter, and a few new documents
move few others. Shares are exact, in different documents.
"""

import hashlib
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np

HASH = np.dtype("<u8")
"""Two different texts with one hash are merely kept together."""
LAST = 2**64
CHUNK = 1 << 20
"""Hashes looked at at once."""

Borders = Mapping[str, int]
"""Split name -> the hash below which it ends, increasing; the last is `LAST`."""


def text_hash(text: bytes) -> int:
    """Uniform in 0..2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=HASH.itemsize, person=b"mtx split").digest(), "little")


def split_of(text: bytes, borders: Borders) -> str:
    """The split that a document belongs to."""
    found = text_hash(text)
    return next(name for name, border in borders.items() if found < border)


def counts(distinct: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """How many of `distinct` different documents each split gets: its share, rounded, and at least one.

    Raises:
      ValueError: there are fewer documents than splits.
    """
    if distinct < len(shares):
        raise ValueError(f"{len(shares)} splits need {len(shares)} different documents; the text has {distinct}.")
    held_out = {name: max(1, round(share * distinct)) for name, share in shares.items() if name != "train"}
    while sum(held_out.values()) >= distinct:
        held_out[max(held_out, key=lambda name: held_out[name])] -= 1
    return {"train": distinct - sum(held_out.values())} | held_out


def borders(hashes_N: np.ndarray, shares: Mapping[str, Fraction]) -> Borders:
    """Where each split ends, of the sorted hashes of all documents (which may be a memory map).

    Raises:
      ValueError: see `counts`.
    """
    wanted = counts(sum(len(chunk) for chunk in _different(hashes_N)), shares)
    ends = np.cumsum(list(wanted.values()))[:-1].tolist()  # ranks of the first document of the next split
    found, seen = [], 0
    for chunk in _different(hashes_N):
        while ends and ends[0] < seen + len(chunk):
            found.append(int(chunk[ends.pop(0) - seen]))
        seen += len(chunk)
    return dict(zip(wanted, [*found, LAST], strict=True))


def _different(hashes_N: np.ndarray) -> Iterator[np.ndarray]:
    """The values of a sorted array, each once, in chunks."""
    for start in range(0, len(hashes_N), CHUNK):
        chunk = np.asarray(hashes_N[start : start + CHUNK])
        first = np.ones(len(chunk), bool)
        first[1:] = chunk[1:] != chunk[:-1]
        first[0] = start == 0 or chunk[0] != hashes_N[start - 1]
        yield chunk[first]
