"""Text that `prepare` turns into token shards, and that training reads from them: what all such sources share.

The shards lie in a folder whose name is a hash of everything that decides what is in them (`recipe`), so that another
setting makes another folder, and coming back to a setting finds its shards again. With them lie a copy of the
tokenizer's definition and a manifest, so that who trains needs neither the text nor what read it.

A source is a frozen config derived from `Prepared`, with the fields listed there. It says what its text is made of:

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
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from data import manifest as manifests
from data import shards
from data.corpus import Corpus, Split, digest
from data.index import open_index
from data.manifest import Manifest
from data.streams import Bad
from data.tokenizer import AnyTokenizer, Bytes, ByteTokenizer, Given, Tokenizer, read_file

SPLITS = ("train", "validation", "test")
HASHED_BYTES = 256_000_000
"""Shards up to this size are read whole whenever they are opened, larger ones when `prepare` is run again."""
AGAIN = "run the same command with the verb prepare (python main.py prepare --config ...)"


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


class Prepared(abc.ABC):
    """Base of sources that are prepared; see the module. The first three are fields of a subclass, with defaults."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> AnyTokenizer:
        """Text to tokens."""

    @property
    @abc.abstractmethod
    def bad_records(self) -> Fail | Skip:
        """What happens at a record that cannot be used."""

    @property
    @abc.abstractmethod
    def folder(self) -> str | None:
        """Where the shards are; None: prepared/ and a hash of what decides what is in them."""

    elsewhere: ClassVar[tuple[str, ...]] = ("folder",)
    """Fields that decide nothing of what is in the shards."""
    in_workers: ClassVar[bool] = False
    """Whether reading needs packages that the process of `prepare` must not load."""
    most_workers: ClassVar[int | None] = None
    """How many worker processes may be used, where each costs much memory; None: as many as are wanted."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field that all have."""
        if self.folder == "":
            yield "folder", "is empty; name a folder, or None for prepared/ and a hash"
        elif re.match(r"\w+://", self.folder or ""):
            yield "folder", "is not on a file system, which memory maps need; mount the bucket"
        if isinstance(self.tokenizer, Given):
            try:
                self.vocab_size  # noqa: B018 (it raises)
            except ValueError as error:
                yield f"tokenizer.{self.tokenizer.named_by}", f"cannot be used: {error}"

    # What a source says

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
        return {name: value for name, value in manifests.plain(self).items() if name not in self.elsewhere}

    # What all share

    @property
    def vocab_size(self) -> int:
        """Number of tokens, known before anything is prepared.

        Raises: ValueError if there is neither the tokenizer's file nor its copy beside the shards.
        """
        if isinstance(self.tokenizer, Given) and not self.tokenizer.exists():
            copy = self.prepared_folder() / self.tokenizer.copy_name
            if copy.is_file():
                return self.tokenizer.size_of(copy)
        return self.tokenizer.vocab_size

    def prepared_folder(self) -> Path:
        """Where the shards are, or will be."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        content = manifests.canonical([manifests.FORMAT, self.recipe()])
        return Path("prepared", hashlib.sha256(content).hexdigest()[:12])

    def is_prepared(self) -> bool:
        """Whether shards are there; `load` says whether they are right."""
        return (self.prepared_folder() / manifests.NAME).is_file()

    def prepare(self, progress: Callable[[str], None], *, workers: int | None = None) -> None:
        """Writes the shards, unless there are right ones, every byte of which is then checked.

        `workers` processes (None: as many as this one has cores) change nothing of what is written.

        Raises: ValueError for bad input, too little text, or a folder that another process is preparing.
        """
        from data import prepare

        prepare.run(self, progress, workers=workers)

    def manifest(self) -> Manifest:
        """What is in the folder, after the checks of `load`. Raises: ValueError."""
        folder = self.prepared_folder()
        if not self.is_prepared():
            raise ValueError(f"the text of {self.described} has no shards in {folder}; {AGAIN} first.")
        manifest = Manifest.read(folder)
        recipe = self.recipe()
        for name in sorted(recipe.keys() | manifest.recipe.keys()):
            if recipe.get(name) != manifest.recipe.get(name):
                raise ValueError(
                    f"{folder} was prepared with data.{name}={_shown(manifest.recipe.get(name))}, not "
                    f"{_shown(recipe.get(name))}; {AGAIN} to replace it, or name another data.folder."
                )
        self._check_parts(manifest)
        return manifest

    def load(self) -> Corpus:
        """Opens the shards, after checks that take less than a second or so, whatever their size.

        Raises: ValueError if there are none, they are damaged, or the text or the settings have changed since.
        """
        folder, manifest = self.prepared_folder(), self.manifest()
        try:
            tokenizer = self.read_tokenizer(folder, manifest)
            for name, shard in manifest.splits.items():
                if shard.bin_bytes <= HASHED_BYTES:
                    shards.verify(folder, name, shard)
            splits = {name: _split(folder, name, shard) for name, shard in manifest.splits.items()}
        except ValueError as error:
            raise ValueError(f"{error} Damaged or replaced: {AGAIN} to write it again.") from error
        return Corpus(
            source=f"{self.described.partition('=')[2] or self.described} ({folder})",
            tokenizer=tokenizer,
            splits=splits,
            digest=digest(tokenizer, {name: shard.bin_sha256 for name, shard in manifest.splits.items()}),
            gzip_bits_per_byte=manifest.gzip_bits_per_byte,
        )

    def part_of(self, split: str, document: int) -> str | None:
        """The name of the part that a split's document of this number is of."""
        for source in Manifest.read(self.prepared_folder()).sources:
            if document < (here := source.documents.get(split, 0)):
                return source.name
            document -= here
        return None

    def verify(self) -> None:
        """Reads every byte of the shards. Raises: ValueError that names a damaged file."""
        manifest, folder = self.manifest(), self.prepared_folder()
        self.read_tokenizer(folder, manifest)
        for name, shard in manifest.splits.items():
            shards.verify(folder, name, shard)

    def read_tokenizer(self, folder: Path, manifest: Manifest) -> Tokenizer:
        """The tokenizer of the shards, from its copy. Raises: ValueError if it, or what it was copied from, changed."""
        if isinstance(self.tokenizer, Bytes):
            return ByteTokenizer()
        copy = folder / self.tokenizer.copy_name
        tokenizer = read_file(self.tokenizer, copy)
        if tokenizer.digest != manifest.tokenizer:
            raise ValueError(f"{copy} is not the tokenizer of the shards beside it.")
        if isinstance(self.tokenizer, Given) and self.tokenizer.exists():
            original = self.tokenizer.original()
            if read_file(self.tokenizer, original).digest != manifest.tokenizer:
                raise ValueError(f"{original} has changed since the shards in {folder} were written.")
        return tokenizer

    def _check_parts(self, manifest: Manifest) -> None:
        """That the text is still what was read; where none of it is (a node with shards alone), nothing is said."""
        then = {source.name: source.fingerprint for source in manifest.sources}
        if not self.is_here(then):
            return
        now = self.fingerprints(then)
        changes = [f"{name} is new" for name in now.keys() - then.keys()]
        changes += [f"{name} is gone" for name in then.keys() - now.keys()]
        changes += [f"{name} has changed" for name in now.keys() & then.keys() if now[name] != then[name]]
        if changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise ValueError(f"{min(changes)} since the text was prepared{more}; {AGAIN}, which replaces the shards.")


def _split(folder: Path, name: str, shard: shards.Shard) -> Split:
    tokens_N = shards.open_tokens(folder, name, shard)
    index = open_index(folder / f"{name}.idx", scan=False)
    return Split(tokens_N=tokens_N, lengths_S=index.lengths_S, documents_D=index.documents_D, bytes=shard.bytes)


def _shown(value: object) -> str:
    """A recipe's value as one would type it."""
    if isinstance(value, dict):
        fields = ", ".join(f"{name}={_shown(inner)}" for name, inner in value.items() if name != "class")
        return f"{value['class']}({fields})" if fields else value["class"]
    return str(value)
