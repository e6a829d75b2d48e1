"""What the worker processes of `prepare` do with units of the text: each leaves a finished piece (pieces.py).

A unit is some slices, in order: a part of a large file, or many small ones. The text alone decides which, never the
number of workers, and each piece depends on nothing but its unit, so that pieces end to end are the same shards,
whoever made them and when.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus import GZIP_BYTES
from data.documents import Bad, BadFile, Document, Part, Reading, Slice, Tokenized
from data.prepare.pieces import Draft
from data.prepare.source import TextSource
from data.prepare.splitting import HASH, Borders, split_of, text_hash
from data.shards.format import Writer, dtype_of
from data.tokenizer import Bytes, ByteTokenizer, Defined, Learned, Tokenizer, read_file
from data.workers import Tell

Unit = tuple[Slice, ...]

BATCH_BYTES = 1 << 20
"""Text that is tokenized at once; `tokenizers` needs some hundred times as much meanwhile."""
SPOOL_BYTES = 1 << 20
"""Buffer of a file of hashes."""
TELL_S = 0.2
"""Between two words of a worker about how far it is."""
HASHES, TEXT, DEFINITION = "hashes", "text", "definition"
"""Files of pieces: of documents' texts; of the validation split, to measure it by; of a tokenizer."""
LOTS = 1 << 60
"""Of bad records, where somebody else counts them."""
AT_REST = "changed while it was read; prepare it when it is at rest."


@dataclass
class Found:
    """What reading a slice gave."""

    documents: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    """Of these, in the second pass, those of each split."""
    empty: int = 0
    bytes: int = 0
    """Of text."""
    sha256: str = ""
    bad: list[tuple[str, str, str]] = field(default_factory=list)
    """See `Bad`, the path left out."""
    broken: bool = False
    """The last bad one is the whole part."""

    @classmethod
    def of(cls, said: dict[str, Any]) -> "Found":
        """From a piece."""
        return cls(**said)


@dataclass
class Count:
    """How far a call is."""

    bytes: int = 0
    """Read of the source, as it counts."""
    documents: int = 0
    tokens: int = 0

    def __add__(self, more: "Count") -> "Count":
        return Count(self.bytes + more.bytes, self.documents + more.documents, self.tokens + more.tokens)


class _Teller:
    """Passes counts on, not too often."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._count, self._said = tell, Count(), time.monotonic()

    def count(self, found: int = 0, *, documents: int = 0, tokens: int = 0) -> None:
        self._count += Count(found, documents, tokens)
        if time.monotonic() - self._said > TELL_S:
            self.flush()

    def flush(self) -> None:
        self._tell(self._count)
        self._count, self._said = Count(), time.monotonic()


class TooMany(Exception):
    """More bad records than are allowed."""


def ask(method: Callable[[], Any], tell: Tell) -> Any:
    """A method that wants to know nothing."""
    return method()


# Cutting


def cut(config: TextSource, part: Part, most_bytes: int, pieces: Path, name: str, tell: Tell) -> dict[str, Any]:
    """Slices of a large part, and its SHA-256 where it was read for that."""
    teller = _Teller(tell)
    reading = Reading(part.name, lambda bad: None, teller.count)
    try:
        slices = config.slices(part, most_bytes, reading)
    except BadFile:
        slices, reading.sha256 = [Slice(part)], None  # who reads it says what is wrong
    teller.flush()
    said = {
        "slices": [[piece.start, piece.stop, piece.lines, piece.bytes] for piece in slices],
        "sha256": reading.sha256 if len(slices) > 1 else None,
    }
    Draft(pieces, name).finish(said)
    return said


# The first pass


def survey(config: TextSource, unit: Unit, most_bad: int, pieces: Path, name: str, tell: Tell) -> dict[str, Any]:
    """Reads all, keeps a hash of each document. With more bad records than allowed: breaks off, without a piece."""
    draft, teller, found = Draft(pieces, name), _Teller(tell), []
    stopped = False
    with open(draft.folder / HASHES, "wb", buffering=SPOOL_BYTES) as spool:
        try:
            for piece in unit:
                found.append(Found())
                start, allowed = spool.tell(), most_bad - sum(len(one.bad) for one in found)
                for document in _read(config, piece, found[-1], allowed, teller):
                    spool.write(text_hash(_content(document)).to_bytes(HASH.itemsize, "little"))
                if found[-1].broken:
                    spool.seek(start)
                    spool.truncate()
        except TooMany:
            stopped = True
    teller.flush()
    said = {"slices": [asdict(one) for one in found], "stopped": stopped}
    if not stopped:
        draft.finish(said)
    return said


def _read(config: TextSource, piece: Slice, found: Found, most_bad: int, teller: _Teller) -> Iterator[Document]:
    """The documents of a slice that hold text; fills in `found`. Raises: TooMany."""

    def report(bad: Bad) -> None:
        found.bad.append((bad.where, bad.reason, bad.what))
        if len(found.bad) > most_bad:
            raise TooMany

    reading, content = Reading(piece.part.name, report, teller.count), hashlib.sha256()
    try:
        for document in config.read(piece, reading):
            content.update(_content(document))
            if _is_empty(document):
                found.empty += 1
            else:
                found.documents += 1
                found.bytes += _text_bytes(document)
                teller.count(documents=1)
                yield document
    except BadFile as error:
        report(error.bad)
        teller.count(documents=-found.documents)
        found.documents, found.empty, found.bytes, found.broken = 0, 0, 0, True
    else:
        found.sha256 = reading.sha256 or content.hexdigest()


def _content(document: Document) -> bytes:
    """What tells documents apart."""
    if isinstance(document, Tokenized):
        return b"\0".join(np.asarray(tokens, "<i8").tobytes() for tokens in document.sequences)
    return b"\0".join(document)


def _is_empty(document: Document) -> bool:
    """Whether its last sequence is: what follows a prompt."""
    return not (document.sequences[-1].size if isinstance(document, Tokenized) else document[-1].strip())


def _text_bytes(document: Document) -> int:
    return document.bytes if isinstance(document, Tokenized) else sum(map(len, document))


# The second pass


@dataclass(frozen=True)
class Plan:
    """What all units of the second pass share."""

    ends: Borders
    """Its keys are the splits."""
    definition: Path | None
    """File of the tokenizer's definition; None: bytes."""
    digest: str
    """The tokenizer's."""
    threads: int | None
    """That a call may use; None: all cores."""
    most_bad: int | None
    """Bad records that are allowed; None: a first pass has counted them."""


def write(
    config: TextSource, unit: Unit, known: Sequence[str | None], plan: Plan, pieces: Path, name: str, tell: Tell
) -> dict[str, Any]:
    """Tokenizes what the first pass found (`known`: its hashes; None: there was none) into pieces of shards."""
    if plan.threads:
        os.environ["RAYON_NUM_THREADS"] = str(plan.threads)  # see data.tokenizer.interface.threads
        os.environ["TOKENIZERS_PARALLELISM"] = str(plan.threads > 1).lower()
    tokenizer = _tokenizer(config.tokenizer, plan.definition, plan.digest)
    draft, teller, found = Draft(pieces, name), _Teller(tell), [Found() for _ in unit]
    dtype, end = dtype_of(tokenizer.vocab_size), tokenizer.end_of_document
    with contextlib.ExitStack() as files:
        writers = {split: Writer(draft.folder, split, dtype, end) for split in plan.ends}
        for writer in writers.values():
            files.callback(writer.close)
        text = files.enter_context(open(draft.folder / TEXT, "wb"))
        try:
            for batch in _batches(_again(config, unit, known, plan, found, teller)):
                for (at, document), sequences in zip(batch, _sequences(config, tokenizer, batch), strict=True):
                    if not len(sequences[-1]):
                        found[at].documents, found[at].empty = found[at].documents - 1, found[at].empty + 1
                        continue
                    split = unit[at].part.split or split_of(_content(document), plan.ends)
                    writers[split].add(sequences, _text_bytes(document))
                    found[at].splits[split] = found[at].splits.get(split, 0) + 1
                    teller.count(tokens=sum(map(len, sequences)) + 1)
                    if split == "validation" and not isinstance(document, Tokenized) and text.tell() <= GZIP_BYTES:
                        text.write(b"".join(document))
        except TooMany:
            return {"slices": [asdict(one) for one in found], "stopped": True}
        finally:
            teller.flush()
        written = {split: asdict(writer.keep()) for split, writer in writers.items()}
    said = {"slices": [asdict(one) for one in found], "splits": written, "stopped": False}
    draft.finish(said)
    return said


@functools.lru_cache(maxsize=1)
def _tokenizer(wanted: Bytes | Defined, definition: Path | None, digest: str) -> Tokenizer:
    if definition is None:
        return ByteTokenizer()
    assert isinstance(wanted, Defined)
    tokenizer = read_file(wanted, definition)
    assert tokenizer.digest == digest
    return tokenizer


def _again(
    config: TextSource, unit: Unit, known: Sequence[str | None], plan: Plan, found: list[Found], teller: _Teller
) -> Iterator[tuple[int, Document]]:
    """The unit's documents, each with the number of its slice.

    Raises: ValueError if they are others than in the first pass, or without one for a part that is bad; TooMany.
    """
    for at, piece in enumerate(unit):
        allowed = LOTS if plan.most_bad is None else plan.most_bad - sum(len(one.bad) for one in found)
        for document in _read(config, piece, found[at], allowed, teller):
            yield at, document
        if plan.most_bad is None and found[at].sha256 != known[at]:
            raise ValueError(f"{piece.part.name} {AT_REST}")
        if found[at].broken:
            raise ValueError(str(Bad(piece.part.name, *found[at].bad[-1])))


def _batches(items: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
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


def _sequences(
    config: TextSource, tokenizer: Tokenizer, batch: list[tuple[int, Document]]
) -> Iterator[Sequence[np.ndarray]]:
    """The tokens of each document's sequences."""
    texts = [[] if isinstance(document, Tokenized) else config.sequences(document) for _, document in batch]
    encoded = iter(tokenizer.encode_batch([text for sequences in texts for text in sequences]))
    for (_, document), sequences in zip(batch, texts, strict=True):
        if isinstance(document, Tokenized):
            yield document.sequences
        else:
            tokens = [next(encoded) for _ in sequences]
            whole = len(sequences) == len(document)
            yield tokens if whole else [part for part in tokens if len(part)] or tokens[-1:]


# Learning a tokenizer


def learn(
    config: TextSource, unit: Unit, ends: Borders, text_bytes: int, pieces: Path, name: str, tell: Tell
) -> dict[str, Any]:
    """Learns the tokenizer from the training text, all or, of a longer one, as many bytes from every part of it."""
    wanted, teller = config.tokenizer, _Teller(tell)
    assert isinstance(wanted, Learned)
    definition = wanted.learn(_training_texts(config, unit, ends, text_bytes, wanted.training_bytes(), teller))
    teller.flush()
    draft = Draft(pieces, name)
    (draft.folder / DEFINITION).write_bytes(definition)
    draft.finish({})
    return {}


def _training_texts(
    config: TextSource, unit: Unit, ends: Borders, text_bytes: int, most_bytes: int, teller: _Teller
) -> Iterator[str]:
    seen, taken = 0, 0
    for piece in unit:
        for document in _read(config, piece, Found(), LOTS, teller):
            assert not isinstance(document, Tokenized), "who brings tokens has a tokenizer"
            split = piece.part.split or split_of(_content(document), ends)
            if split == "train" and taken * text_bytes <= seen * most_bytes:
                for text in document:
                    part = text[: most_bytes - taken].decode(errors="ignore")  # a character that the cut goes through
                    taken += len(text)
                    yield part
                    if taken >= most_bytes:
                        return
            seen += _text_bytes(document)
