"""The documents that a source gives, the parts and slices of its text that hold them, and its bad records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

UNREADABLE = "cannot be read"
"""A reason: see `Bad`."""


@dataclass(frozen=True)
class Bad:
    """One bad record, or a whole bad file."""

    path: str
    where: str
    """line 3 (byte 120), row 5; nothing for a file."""
    reason: str
    """A few words, by which bad records are counted."""
    what: str
    """What is wrong, as the rest of a sentence."""

    def __str__(self) -> str:
        return f"{self.path}{', ' if self.where else ''}{self.where}: {self.what}"


class BadFile(Exception):
    """The file breaks off, or was never one of its kind: nothing of it is to be used."""

    def __init__(self, bad: Bad) -> None:
        super().__init__(str(bad))
        self.bad = bad


@dataclass(frozen=True)
class Part:
    """A part of a source's text: a file, a slice of a data set."""

    name: str
    """For people and the manifest: a file's path, "imdb/plain_text:1.0.0 train"; no two are alike."""
    fingerprint: str
    """Another one says that the content may have changed. Asked for at every load: it must cost little."""
    bytes: int
    """About what will be counted while it is read: shows progress, and is what work is shared out by."""
    split: str | None = None
    """train, validation or test for all of its documents. None: by a hash of each text (all parts, or none)."""


@dataclass(frozen=True)
class Slice:
    """Some of a part, in what the source counts it by: bytes, rows, examples."""

    part: Part
    start: int = 0
    stop: int | None = None
    """None: to the end."""
    lines: int = 0
    """How many lines precede it, where a source counts them."""
    bytes: int | None = None
    """About what will be counted while it is read; None: all of the part's."""


@dataclass
class Reading:
    """What a source tells, and what it finds out, while it reads a slice."""

    name: str
    """Of the part."""
    report: Callable[[Bad], None]
    """Is told of a bad record: counts it, or raises what no source catches."""
    count: Callable[[int], None]
    """Is told how many bytes were read, as they are."""
    sha256: str | None = None
    """Of what was read, once it was read to its end; a source may leave it to `prepare`, which hashes documents."""


class Tokenized(NamedTuple):
    """A document whose source brings its tokens."""

    sequences: Sequence[np.ndarray]
    """Integer tokens, without one that ends the document."""
    bytes: int
    """Of the text in UTF-8: what bits per byte are divided by."""


Document = Sequence[bytes] | Tokenized
"""The texts of its sequences, or their tokens."""
