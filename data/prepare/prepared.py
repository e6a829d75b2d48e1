"""Token shards of a source, which `prepare` writes and training reads.

The shards lie in a folder whose name is a hash of everything that decides what is in them (`recipe`), so that another
setting makes another folder, and coming back to a setting finds its shards again. With them lie a copy of the
tokenizer's definition and a manifest, so that who trains needs neither the text nor what read it. source.py says how a
new source is written.
"""

import abc
import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data.corpus import Corpus, Split, digest
from data.files.find import PREPARED
from data.prepare.pieces import Pieces
from data.prepare.run import write_shards
from data.prepare.source import TextSource
from data.shards import manifest as manifests
from data.shards.format import TEMPORARY, Shard, open_tokens, verify
from data.shards.index import open_index
from data.shards.manifest import Manifest
from data.tokenizer import Bytes, ByteTokenizer, Given, Tokenizer, read_file
from data.workers import cores

HASHED_BYTES = 256_000_000
"""Shards up to this size are read whole whenever they are opened, larger ones when `prepare` is run again."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
AGAIN = "run the same command with the verb prepare (python main.py prepare --config ...)"


class Prepared(TextSource):
    """Base of sources that are prepared."""

    @property
    @abc.abstractmethod
    def folder(self) -> str | None:
        """Where the shards are; None: prepared/ and a hash of what decides what is in them."""

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
        folder = self.prepared_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if self.is_prepared():
                    try:
                        self.verify()
                        Pieces(folder).remove_all()
                        progress(f"{folder} is up to date: every byte of its shards is as it was written")
                        return
                    except ValueError as error:
                        progress(f"prepares {folder} again: {error}")
                _remove_temporaries(folder)
                try:
                    write_shards(self, folder, progress, workers or cores())
                finally:
                    _remove_temporaries(folder)
        except OSError as error:
            kept = f"what is finished is kept in {Pieces(folder).folder}, and the same command goes on from it"
            todo = f" Free some, or set data.folder to a larger disk; {kept}." if error.errno in FULL else ""
            path, why = error.filename or folder, error.strerror or error
            raise ValueError(f"{path}: cannot be written: {why}.{todo}") from error

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
                    verify(folder, name, shard)
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
            verify(folder, name, shard)

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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparation a folder. The system frees the lock of a process that dies; the file stays, as a mark."""
    import fcntl

    with open(folder / PREPARED, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{folder} is being prepared by {holder}; wait for it, or stop it.") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()
    Pieces(folder).remove_temporaries()


def _split(folder: Path, name: str, shard: Shard) -> Split:
    tokens_N = open_tokens(folder, name, shard)
    index = open_index(folder / f"{name}.idx", scan=False)
    return Split(tokens_N=tokens_N, lengths_S=index.lengths_S, documents_D=index.documents_D, bytes=shard.bytes)


def _shown(value: object) -> str:
    """A recipe's value as one would type it."""
    if isinstance(value, dict):
        fields = ", ".join(f"{name}={_shown(inner)}" for name, inner in value.items() if name != "class")
        return f"{value['class']}({fields})" if fields else value["class"]
    return str(value)
