"""Files of text to token shards, in two passes that hold one batch of documents, whatever the text's size.

The first reads everything, finds what is bad, and writes an 8-byte hash of each document to a file; sorted, it
says below which hash the training split ends. The second tokenizes and writes. All has temporary names until the
end, and the manifest comes last: a preparation that is killed leaves what was there before, or no manifest.
"""

import contextlib
import errno
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import sources
from data.corpus import Gzip
from data.manifest import NAME, Manifest, Source, sync
from data.prepared import SPLITS, Document, Part, Prepared, Skip, Slice, Tokenized
from data.records import Reading
from data.shards import TEMPORARY, Shard, Writer, dtype_of
from data.splitting import HASH, Borders, borders, split_of, text_hash
from data.streams import Bad, BadFile
from data.tokenizer import COPY_NAMES, AnyTokenizer, Bytes, ByteTokenizer, Defined, Given, Tokenizer, read_file

BATCH_BYTES = 1 << 20
"""Text that is tokenized at once; `tokenizers` needs some hundred times as much meanwhile."""
REPORT_S = 2.0
"""Between progress lines."""
SPOOL_BYTES = 1 << 20
"""Buffer of the file of hashes."""

Progress = Callable[[str], None]


def run(config: Prepared, progress: Progress, *, workers: int | None = None) -> None:
    """See `Prepared.prepare`."""
    folder = config.prepared_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if config.is_prepared():
                try:
                    config.verify()
                    progress(f"{folder} is up to date: every byte of its shards is as it was written")
                    return
                except ValueError as error:
                    progress(f"prepares {folder} again: {error}")
            _remove_temporaries(folder)
            try:
                _prepare(config, folder, progress)
            finally:
                _remove_temporaries(folder)
    except OSError as error:
        raise ValueError(f"{error.filename or folder}: cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One preparation a folder. The system frees the lock of a process that dies; the file stays, as a mark."""
    import fcntl

    with open(folder / sources.PREPARED, "a+") as file:
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


class _Meter:
    """Progress lines."""

    def __init__(self, progress: Progress, verb: str, total_bytes: int) -> None:
        self._progress, self._verb, self._total = progress, verb, total_bytes
        self._started = self._said = time.monotonic()
        self.bytes, self.documents, self.tokens = 0, 0, 0

    def count(self, found: int) -> None:
        self.bytes += found
        if time.monotonic() - self._said > REPORT_S:
            self._said = time.monotonic()
            self.say()

    def say(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        self._progress(
            f"{self._verb}  {self.bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, "
            f"{self.bytes / 1e6 / seconds:.1f} MB/s, {self.documents:,} documents{tokens}"
        )


class _Policy:
    """Counts bad records; raises at the first, or at one too many."""

    def __init__(self, config: Prepared) -> None:
        self._budget = config.bad_records.budget if isinstance(config.bad_records, Skip) else None
        self.counts: dict[str, Counter[str]] = {}

    def report(self, bad: Bad) -> None:
        if self._budget is None:
            raise ValueError(f"{bad} Mend it, or leave such records out: data.bad_records=Skip.")
        self.counts.setdefault(bad.path, Counter())[bad.reason] += 1
        total = sum(counter.total() for counter in self.counts.values())
        if total > self._budget:
            reasons = ", ".join(f"{reason} {n}" for reason, n in sum(self.counts.values(), Counter()).most_common())
            raise ValueError(
                f"{total} bad records ({reasons}) are more than data.bad_records.budget={self._budget}; the last: "
                f"{bad} Mend them, or set a larger budget."
            )

    def of(self, path: str) -> dict[str, int]:
        """A file's bad records by reason."""
        return dict(sorted(self.counts.get(path, Counter()).items()))


@dataclass
class _Source:
    """A part while it is prepared."""

    part: Part
    sha256: str | None = None
    documents: int = 0
    empty: int = 0


def _prepare(config: Prepared, folder: Path, progress: Progress) -> None:
    if ignored := config.ignored():
        names = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
        progress(f"ignores {len(ignored)} hidden files or files of no known kind: {names}")
    if isinstance(config.tokenizer, Given):  # refused before hours of reading
        read_file(config.tokenizer, config.tokenizer.original())
    files = [_Source(part) for part in config.parts()]
    policy = _Policy(config)
    ends, text_bytes = _survey(config, files, folder, policy, progress)
    tokenizer = _tokenizer(config, files, folder, ends, text_bytes, progress)
    writers = {name: Writer(folder, name, dtype_of(tokenizer.vocab_size), tokenizer.end_of_document) for name in ends}
    yardstick = Gzip()
    try:
        splits = _write(config, files, writers, tokenizer, ends, yardstick, progress)
    finally:
        for writer in writers.values():
            writer.close()
    manifest = Manifest(
        recipe=config.recipe(),
        sources=[
            Source(
                file.part.name,
                file.part.fingerprint,
                file.part.bytes,
                file.sha256,
                file.documents,
                file.empty,
                policy.of(file.part.name),
            )
            for file in files
        ],
        ignored=ignored,
        tokenizer=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        splits=splits,
        gzip_bits_per_byte=yardstick.bits_per_byte(),
    )
    _publish(config.tokenizer, folder, writers.values(), manifest)


def _survey(
    config: Prepared, files: list[_Source], folder: Path, policy: _Policy, progress: Progress
) -> tuple[Borders, int]:
    """The first pass: reads everything, fills in `files`, and says where each split ends and how long the text is."""
    path = folder / f"hashes{TEMPORARY}"
    meter = _Meter(progress, "reading", sum(file.part.bytes for file in files))
    text_bytes = 0
    with open(path, "wb", buffering=SPOOL_BYTES) as spool:
        for file in files:
            start, text_bytes_before = spool.tell(), text_bytes
            reading = Reading(file.part.name, policy.report, meter.count)
            content = hashlib.sha256()
            try:
                for document in config.read(Slice(file.part), reading):
                    content.update(_content(document))
                    if _is_empty(document):
                        file.empty += 1
                        continue
                    spool.write(text_hash(_content(document)).to_bytes(HASH.itemsize, "little"))
                    file.documents += 1
                    meter.documents += 1
                    text_bytes += _text_bytes(document)
                file.sha256 = reading.sha256 or content.hexdigest()
            except BadFile as error:
                policy.report(error.bad)
                meter.documents -= file.documents
                file.documents, file.empty, text_bytes = 0, 0, text_bytes_before
                spool.seek(start)
                spool.truncate()
    meter.say()
    for bad, counter in policy.counts.items():
        reasons = ", ".join(f"{reason} {n}" for reason, n in counter.most_common())
        progress(f"leaves out {counter.total()} bad records of {bad}: {reasons}")
    if (fixed := {file.part.split for file in files}) != {None}:
        assert None not in fixed, "all parts have a split, or none"
        return {name: 0 for name in SPLITS if name in fixed}, text_bytes
    hashes_N = np.memmap(path, HASH, "r+") if meter.documents else np.empty(0, HASH)
    hashes_N.sort()  # in the file: the system writes back what memory does not hold
    try:
        return borders(hashes_N, config.shares()), text_bytes
    except ValueError as error:
        raise config.too_few(str(error)) from error


def _content(document: Document) -> bytes:
    """What tells documents apart."""
    if isinstance(document, Tokenized):
        return b"\0".join(np.asarray(tokens, "<i8").tobytes() for tokens in document.sequences)
    return b"\0".join(document)


def _is_empty(document: Document) -> bool:
    """Whether its last sequence is: what follows a prompt."""
    if isinstance(document, Tokenized):
        return not len(document.sequences[-1])
    return not document[-1].strip()


def _text_bytes(document: Document) -> int:
    return document.bytes if isinstance(document, Tokenized) else sum(map(len, document))


def _split(file: _Source, document: Document, ends: Borders) -> str:
    return file.part.split or split_of(_content(document), ends)


def _tokenizer(
    config: Prepared, files: list[_Source], folder: Path, ends: Borders, text_bytes: int, progress: Progress
) -> Tokenizer:
    """The tokenizer; its definition is put beside the shards, still under a temporary name."""
    wanted = config.tokenizer
    if isinstance(wanted, Bytes):
        return ByteTokenizer()
    temporary = folder / (wanted.copy_name + TEMPORARY)
    if isinstance(wanted, Given):
        definition = config.definition()
    else:
        most = wanted.training_bytes()
        part = f"{most / 1e6:.0f} MB of the training text, spread over it" if text_bytes > most else "the training text"
        progress(f"learning {wanted.vocab_size:,} tokens from {part}")
        definition = wanted.learn(_training_texts(config, files, ends, text_bytes, most))
    _save(temporary, definition)
    return read_file(wanted, temporary)


def _save(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _training_texts(
    config: Prepared, files: list[_Source], ends: Borders, text_bytes: int, most_bytes: int
) -> Iterator[str]:
    """Documents of the training split, all or, of a longer text, as many bytes from every part of it."""
    seen, taken = 0, 0
    for file, document in _documents(config, files, lambda found: None):
        assert not isinstance(document, Tokenized), "who brings tokens has a tokenizer"
        if _split(file, document, ends) == "train" and taken * text_bytes <= seen * most_bytes:
            for text in document:
                part = text[: most_bytes - taken].decode(errors="ignore")  # a character that the cut goes through
                taken += len(text)
                yield part
                if taken >= most_bytes:
                    return
        seen += _text_bytes(document)


def _documents(
    config: Prepared, files: list[_Source], count: Callable[[int], None]
) -> Iterator[tuple[_Source, Document]]:
    """What the first pass found good and not empty, again."""
    for file in files:
        if file.sha256 is None:
            continue
        reading = Reading(file.part.name, lambda bad: None, count)
        content = hashlib.sha256()
        try:
            for document in config.read(Slice(file.part), reading):
                content.update(_content(document))
                if not _is_empty(document):
                    yield file, document
        except BadFile as error:
            raise ValueError(f"{error} It changed while it was read; prepare it when it is at rest.") from error
        if (reading.sha256 or content.hexdigest()) != file.sha256:
            raise ValueError(f"{file.part.name} changed while it was read; prepare it when it is at rest.")


def _batches(items: Iterable[tuple[_Source, Document]]) -> Iterator[list[tuple[_Source, Document]]]:
    """Lists of about `BATCH_BYTES` of text."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += _text_bytes(item[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    config: Prepared,
    files: list[_Source],
    writers: dict[str, Writer],
    tokenizer: Tokenizer,
    ends: Borders,
    yardstick: Gzip,
    progress: Progress,
) -> dict[str, Shard]:
    """The second pass: tokenizes into the writers."""
    meter = _Meter(progress, "writing", sum(file.part.bytes for file in files))
    for batch in _batches(_documents(config, files, meter.count)):
        for (file, document), tokens in zip(batch, _tokens(tokenizer, [item[1] for item in batch]), strict=True):
            if not len(tokens[-1]):
                file.documents, file.empty = file.documents - 1, file.empty + 1
                continue
            name = _split(file, document, ends)
            writers[name].add(tokens, _text_bytes(document))
            if name == "validation" and not isinstance(document, Tokenized):
                for text in document:
                    yardstick.add(text)
            meter.documents += 1
            meter.tokens += sum(map(len, tokens)) + 1
    meter.say()
    for name, writer in writers.items():
        if not writer.documents:
            raise config.too_few(f"no document of the {name} split has a token in this tokenizer.")
    return {name: writer.finish() for name, writer in writers.items()}


def _tokens(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[Sequence[np.ndarray]]:
    """The sequences of each document."""
    texts = [text for document in documents if not isinstance(document, Tokenized) for text in document]
    encoded = iter(tokenizer.encode_batch(texts))
    for document in documents:
        if isinstance(document, Tokenized):
            yield document.sequences
        else:
            yield [next(encoded) for _ in document]


def _publish(tokenizer: AnyTokenizer, folder: Path, writers: Iterable[Writer], manifest: Manifest) -> None:
    """Gives all files their names. Between the first line and the last, the folder counts as not prepared."""
    (folder / NAME).unlink(missing_ok=True)
    sync(folder)
    for writer in writers:
        writer.publish()
    mine = tokenizer.copy_name if isinstance(tokenizer, Defined) else None
    for name in COPY_NAMES - {mine}:
        (folder / name).unlink(missing_ok=True)  # of what the folder held before
    if mine is not None:
        (folder / (mine + TEMPORARY)).rename(folder / mine)
    manifest.write(folder)
