"""Text that can be prepared: what a source of it says, from which `prepare` writes token shards.

A source is a frozen config derived from `Prepared` (prepared.py), with the fields `tokenizer`, `bad_records` and
`folder`, which have defaults. It says what its text is made of:

- `parts()`: named parts in the order of the shards, each with a fingerprint that says if it may have changed, and
  with a split, if all of its documents go to one. Else a hash of each document's text decides, which costs a pass over
  the text before the one that writes.
- `slices(part, most_bytes, reading)`: how a large part is cut so that several processes can read it; the part and
  `most_bytes` alone decide. Without it a part is read in one go.
- `read(slice, reading)`: a slice's documents in order, the same every time: each a list of texts (UTF-8, checked:
  valid, without NUL) or `Tokenized`. A record that cannot be used is told to `reading.report(Bad(...))` and left out;
  `BadFile` is raised for a part of which nothing is to be used. What is read is told to `reading.count(bytes)`.
- `described`: the text in a few words of the config, for errors.

A document is usually one sequence, a list of one text. Several (a prompt and what follows it) stay apart in the index
of the shards, and the token that ends a document is put behind its last one by `prepare`, never by a source.

Where these run: `slices` and `read` in worker processes or in the one of `prepare`; with `in_workers = True` never in
the latter, nor do `parts`, `ignored` and `definition`, so that a source may import TensorFlow there (inside the
functions: the module itself is imported everywhere). The config is pickled to get there. `load`, which training calls,
imports nothing of it: it calls `parts` only if `is_here` says that there is something to compare with, so a source
whose `parts` needs heavy packages returns False.

A tokenizer is a config of data/tokenizer: the field `tokenizer`, or a property that makes a `Given` of its own, with
`read`, `measure`, `original` and `copy_name`. Sources that bring tokens need one too: it has the vocabulary's size, its
digest, the token that ends a document, and turns tokens into text. Override `definition` where it is no file.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from data.documents import Document, Part, Reading, Slice
from data.shards.manifest import plain
from data.tokenizer import AnyTokenizer, Given, read_file

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Fail:
    """A bad record ends the preparation; the error names its file and line."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Bad records are left out and counted, by file and reason; too many end the preparation."""

    budget: int = 100
    """How many are left out at most, over all files; a file that cannot be read counts as one."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.budget < 1:
            yield "budget", "must be at least 1; data.bad_records=Fail skips none"


class TextSource(abc.ABC):
    """What a source says of its text; see the module."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> AnyTokenizer:
        """Text to tokens."""

    @property
    @abc.abstractmethod
    def bad_records(self) -> Fail | Skip:
        """What happens at a record that cannot be used."""

    elsewhere: ClassVar[tuple[str, ...]] = ("folder",)
    """Fields that decide nothing of what is in the shards."""
    in_workers: ClassVar[bool] = False
    """Whether reading needs packages that the process of `prepare` must not load."""
    most_workers: ClassVar[int | None] = None
    """How many worker processes may be used, where each costs much memory; None: as many as are wanted."""

    @property
    @abc.abstractmethod
    def described(self) -> str:
        """The text in a few words of the config: "data.paths=notes/"."""

    @abc.abstractmethod
    def parts(self) -> list[Part]:
        """What the text is made of, in the order of the shards. Raises: ValueError that says what to type."""

    def slices(self, part: Part, most_bytes: int, reading: Reading) -> list[Slice]:
        """How a part is cut, into slices of about `most_bytes` each that are it end to end.

        `reading.sha256`, if set, is what the manifest says of the part; else it is a hash of the slices' hashes.
        """
        return [Slice(part)]

    @abc.abstractmethod
    def read(self, piece: Slice, reading: Reading) -> Iterator[Document]:
        """A slice's documents in order. Raises: BadFile, and ValueError for what cannot be skipped."""

    def ignored(self) -> list[str]:
        """What was found and is not read, for the manifest."""
        return []

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether any of the parts of these names is still there to compare with, and `parts` may be called."""
        return True

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the parts that are there now, by name; `names` are those that were read."""
        return {part.name: part.fingerprint for part in self.parts()}

    def shares(self) -> dict[str, Fraction]:
        """Of 1, by split, where a hash of each text decides: train first, none of 0."""
        return {}

    def too_few(self, why: str) -> ValueError:
        """The error of a split that no document is left for."""
        return ValueError(f"{self.described}: {why} Give more text.")

    def sequences(self, document: Sequence[bytes]) -> Sequence[bytes]:
        """The texts that a document's sequences are made of, which end to end are its own."""
        return document

    def definition(self) -> bytes:
        """The definition of a tokenizer that was `Given`. Raises: ValueError that names what is wrong with it."""
        assert isinstance(self.tokenizer, Given)
        read_file(self.tokenizer, self.tokenizer.original())
        return self.tokenizer.original().read_bytes()

    def recipe(self) -> dict:
        """What decides the shards, as plain data."""
        return {name: value for name, value in plain(self).items() if name not in self.elsewhere}
