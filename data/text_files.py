"""Text in files as a corpus: read once by `prepare`, which writes token shards; trained from by `load`.

The shards lie in a folder whose name is a hash of everything that decides what is in them, so that another
setting makes another folder, and coming back to a setting finds its shards again.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data import manifest as manifests
from data import shards, sources
from data.corpus import Corpus, Split, digest
from data.index import open_index
from data.manifest import Manifest
from data.records import Limits
from data.tokenizer import AnyTokenizer, Bytes, ByteTokenizer, Given, Tokenizer, read_file

SPLITS = ("train", "validation", "test")
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


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Your own text: JSON lines, plain text or parquet, tokenized once into shards that training reads."""

    paths: str
    """Files, folders or globs, separated by commas: .jsonl, .json (one object per line), .txt, each also .gz or .zst,
    .md and .parquet. Folders are read with all below them. UTF-8; a mark at a file's start is left out."""
    text_key: str = "text"
    """Key of a JSON object, or column of a parquet table, that holds a document's text."""
    tokenizer: AnyTokenizer = Bytes()
    """Text to tokens."""
    split: str = "949,50,1"
    """Shares of the documents for training, validation and test: two or three numbers, divided by their sum. A
    hash of its text decides where a document goes, so that copies fall on one side."""
    bad_records: Fail | Skip = Fail()
    """What happens at a record that cannot be used."""
    cut_text_bytes: int = 16384
    """Plain text is cut into documents behind the first blank line after so many bytes (behind a line, if there is
    none for as many again); 0: each file is one document."""
    max_record_bytes: int = 32 * 2**20
    """A longer line, or a longer document that is not cut, is a bad record. While a document is tokenized it takes
    some 140 times its size in memory (4 times as bytes)."""
    folder: str | None = None
    """Where the shards are; None: prepared/ and a hash of the fields above that decide what is in them."""

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

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not self.paths.strip(" ,"):
            yield "paths", "is empty; name files, folders or globs"
        if not self.text_key:
            yield "text_key", "is empty; name the key that holds the text"
        if self.cut_text_bytes < 0:
            yield "cut_text_bytes", "must be at least 0; 0 makes each file one document"
        if not 1 <= self.max_record_bytes <= 2**30:
            yield "max_record_bytes", f"must lie in 1..{2**30}; try {32 * 2**20}"
        elif self.cut_text_bytes > self.max_record_bytes // 2:
            yield "cut_text_bytes", f"must be at most half of max_record_bytes={self.max_record_bytes}"
        if self.folder == "":
            yield "folder", "is empty; name a folder, or None for prepared/ and a hash"
        for field in ("paths", "folder"):
            if re.match(r"\w+://", getattr(self, field) or ""):
                yield field, "is not on a file system, which memory maps need; copy the files, or mount the bucket"
        try:
            self.shares()
        except ValueError as error:
            yield "split", str(error)
        if isinstance(self.tokenizer, Given):
            try:
                self.vocab_size  # noqa: B018 (it raises)
            except ValueError as error:
                yield f"tokenizer.{self.tokenizer.named_by}", f"cannot be used: {error}"

    def shares(self) -> dict[str, Fraction]:
        """The split's parts by name, of 1, without those of 0. Raises: ValueError."""
        try:
            numbers = [Fraction(part.strip()) for part in self.split.split(",")]
        except (ValueError, ZeroDivisionError):
            numbers = []
        if len(numbers) not in (2, 3) or min(numbers) < 0 or numbers[0] == 0:
            raise ValueError("must be two or three numbers, the first above 0, none below; try 949,50,1 or 1,0")
        named = zip(SPLITS, numbers, strict=False)
        return {name: number / sum(numbers) for name, number in named if number}

    def limits(self) -> Limits:
        """How files are read."""
        return Limits(
            text_key=self.text_key,
            cut_text_bytes=self.cut_text_bytes,
            max_record_bytes=self.max_record_bytes,
        )

    def recipe(self) -> dict:
        """What decides the shards, as plain data."""
        return {name: value for name, value in manifests.plain(self).items() if name != "folder"}

    def prepared_folder(self) -> Path:
        """Where the shards are, or will be."""
        if self.folder is not None:
            return Path(self.folder).expanduser()
        content = manifests.canonical([manifests.FORMAT, self.recipe()])
        return Path("prepared", hashlib.sha256(content).hexdigest()[:12])

    def is_prepared(self) -> bool:
        """Whether shards are there; `load` says whether they are right."""
        return (self.prepared_folder() / manifests.NAME).is_file()

    def prepare(self, progress: Callable[[str], None]) -> None:
        """Writes the shards, unless there are right ones, every byte of which is then checked.

        Raises: ValueError for bad input, too little text, or a folder that another process is preparing.
        """
        from data import prepare

        prepare.run(self, progress)

    def manifest(self) -> Manifest:
        """What is in the folder, after the checks of `load`. Raises: ValueError."""
        folder = self.prepared_folder()
        if not self.is_prepared():
            raise ValueError(f"the text of data.paths={self.paths} has no shards in {folder}; {AGAIN} first.")
        manifest = Manifest.read(folder)
        recipe = self.recipe()
        for name in sorted(recipe.keys() | manifest.recipe.keys()):
            if recipe.get(name) != manifest.recipe.get(name):
                raise ValueError(
                    f"{folder} was prepared with data.{name}={_shown(manifest.recipe.get(name))}, not "
                    f"{_shown(recipe.get(name))}; {AGAIN} to replace it, or name another data.folder."
                )
        _check_sources(self.paths, manifest)
        return manifest

    def load(self) -> Corpus:
        """Opens the shards, after checks that cost little, whatever their size.

        Raises: ValueError if there are none, they are damaged, or the text or the settings have changed since.
        """
        folder, manifest = self.prepared_folder(), self.manifest()
        try:
            tokenizer = self._tokenizer(folder, manifest)
            splits = {name: _split(folder, name, shard) for name, shard in manifest.splits.items()}
        except ValueError as error:
            raise ValueError(f"{error} Damaged or replaced: {AGAIN} to write it again.") from error
        return Corpus(
            source=f"{self.paths} ({folder})",
            tokenizer=tokenizer,
            splits=splits,
            digest=digest(tokenizer, {name: shard.bin_sha256 for name, shard in manifest.splits.items()}),
            gzip_bits_per_byte=manifest.gzip_bits_per_byte,
        )

    def verify(self) -> None:
        """Reads every byte of the shards. Raises: ValueError that names a damaged file."""
        manifest, folder = self.manifest(), self.prepared_folder()
        self._tokenizer(folder, manifest)
        for name, shard in manifest.splits.items():
            shards.verify(folder, name, shard)

    def _tokenizer(self, folder: Path, manifest: Manifest) -> Tokenizer:
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


def _split(folder: Path, name: str, shard: shards.Shard) -> Split:
    tokens_N = shards.open_tokens(folder, name, shard)
    index = open_index(folder / f"{name}.idx", scan=False)
    return Split(tokens_N=tokens_N, lengths_S=index.lengths_S, documents_D=index.documents_D, bytes=shard.bytes)


def _check_sources(paths: str, manifest: Manifest) -> None:
    """That the text is still what was read; where none of it is (a node with shards alone), nothing is said."""
    then = {source.path: source for source in manifest.sources}
    if not any(map(os.path.lexists, then)):
        return
    now = set(sources.find(paths).files)
    changes = [f"{path} is new" for path in now - then.keys()] + [f"{path} is gone" for path in then.keys() - now]
    for path in now & then.keys():
        if file_state(path) != (then[path].bytes, then[path].mtime_ns):
            changes.append(f"{path} has changed")
    if changes:
        more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
        raise ValueError(f"{min(changes)} since the text was prepared{more}; {AGAIN}, which replaces the shards.")


def file_state(path: str) -> tuple[int, int]:
    """Size and time of change; zeros for a file that cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _shown(value: object) -> str:
    """A recipe's value as one would type it."""
    if isinstance(value, dict):
        fields = ", ".join(f"{name}={_shown(inner)}" for name, inner in value.items() if name != "class")
        return f"{value['class']}({fields})" if fields else value["class"]
    return str(value)
