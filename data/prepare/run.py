"""A source's text to token shards, by several processes, in pieces that outlast whoever makes them.

The text is cut into units. A first pass, where it is needed, reads all, finds what is bad, and keeps an 8-byte hash of
each document; sorted, they say below which hash the training split ends. The second tokenizes. Each leaves a finished
piece a unit (pieces.py); those of the second, joined in the order of the units, are the shards. Shards have
temporary names until the end, and the manifest comes last: a preparation that is killed leaves what was there before,
or no manifest, and pieces to go on from.
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.corpus import GZIP_BYTES, Gzip
from data.documents import Bad, Part, Slice
from data.prepare import passes
from data.prepare.jobs import Policy, Progress, Said, Stages, place, size_of, units_of
from data.prepare.passes import AT_REST, Found, Plan, Unit
from data.prepare.pieces import Pieces
from data.prepare.source import SPLITS, TextSource
from data.prepare.splitting import HASH, Borders, borders
from data.shards.format import CHUNK, TEMPORARY, Piece, Shard, Writer, dtype_of
from data.shards.manifest import NAME, Manifest, Source, sync
from data.tokenizer import COPY_NAMES, AnyTokenizer, Bytes, ByteTokenizer, Defined, Given, Learned, Tokenizer, read_file
from data.workers import Workers, cores

UNIT_BYTES = 32 << 20
"""About what a worker reads at once, and what is done again after a kill."""
ALONE_BYTES = 8 << 20
"""Less is sooner read than a worker started."""


def write_shards(config: TextSource, folder: Path, progress: Progress, wanted: int) -> None:
    """Writes the source's shards, tokenizer and manifest into a folder, with up to `wanted` worker processes.

    Raises: ValueError for bad input or too little text; OSError.
    """
    most = min(wanted, config.most_workers or wanted)
    if not config.in_workers and (wanted == 1 or sum(part.bytes for part in config.parts()) < ALONE_BYTES):
        most = 0
    policy = Policy(config)
    with Workers(most) as workers:
        stages = Stages(config, Pieces(folder), workers, progress)
        if ignored := stages.ask(config.ignored):
            names = ", ".join(ignored[:5]) + (", ..." if len(ignored) > 5 else "")
            progress(f"ignores {len(ignored)} hidden files or files of no known kind: {names}")
        if isinstance(config.tokenizer, Given):  # refused before hours of reading
            _save(_definition(config, folder), stages.ask(config.definition))
        text = _Text(stages.ask(config.parts))
        _cut(stages, text)
        ends = _survey(stages, text, policy)
        tokenizer = _tokenizer(stages, text, ends)
        pieces = _write(stages, text, policy, ends, tokenizer, most)
        if changed := set(stages.ask(config.parts)).symmetric_difference(text.parts):
            raise ValueError(f"{min(part.name for part in changed)} {AT_REST}")
    with contextlib.ExitStack() as open_files:
        writers = {}
        for name in ends:
            writers[name] = Writer(folder, name, dtype_of(tokenizer.vocab_size), tokenizer.end_of_document)
            open_files.callback(writers[name].close)
        splits = {name: _join(config, name, writer, pieces) for name, writer in writers.items()}
        manifest = Manifest(
            recipe=stages.recipe,
            sources=text.sources(policy),
            ignored=ignored,
            tokenizer=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            splits=splits,
            gzip_bits_per_byte=_yardstick(splits, pieces),
        )
        _publish(config.tokenizer, folder, writers.values(), manifest)
    stages.pieces.remove_all()


@dataclass
class _Text:
    """What becomes known of the text."""

    parts: list[Part]
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of parts, by name, that were read as a whole."""
    units: list[Unit] = field(default_factory=list)
    """Without what is bad as a whole."""
    found: dict[Slice, Found] = field(default_factory=dict)
    """In the last pass, of the slices in `units`."""

    def sources(self, policy: Policy) -> list[Source]:
        """For the manifest."""
        found: dict[str, list[Found]] = {part.name: [] for part in self.parts}
        for piece, one in self.found.items():
            found[piece.part.name].append(one)
        return [
            Source(
                name=part.name,
                fingerprint=part.fingerprint,
                bytes=part.bytes,
                sha256=self._sha256(part, found[part.name]),
                documents=dict(sum((Counter(one.splits) for one in found[part.name]), Counter())),
                empty=sum(one.empty for one in found[part.name]),
                bad=policy.of(part.name),
            )
            for part in self.parts
        ]

    def _sha256(self, part: Part, found: list[Found]) -> str | None:
        if len(found) < 2:
            return found[0].sha256 if found else None
        return self.hashes.get(part.name) or hashlib.sha256("".join(one.sha256 for one in found).encode()).hexdigest()


def _definition(config: TextSource, folder: Path) -> Path:
    """Where the tokenizer's definition is until the shards are."""
    assert isinstance(config.tokenizer, Defined)
    return folder / (config.tokenizer.copy_name + TEMPORARY)


def _save(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _cut(stages: Stages, text: _Text) -> None:
    """Large parts into slices, slices into units."""
    large = [part for part in text.parts if part.bytes > UNIT_BYTES]
    jobs = [
        stages.job("cut", [part.name, part.fingerprint, UNIT_BYTES], part.bytes, passes.cut, part, UNIT_BYTES)
        for part in large
    ]
    slices = {part.name: [Slice(part)] for part in text.parts}
    for part, said in zip(large, stages.run("cut", "looking", jobs), strict=True):
        slices[part.name] = [Slice(part, *place) for place in said["slices"]]
        if said["sha256"]:
            text.hashes[part.name] = said["sha256"]
    text.units = units_of([piece for pieces in slices.values() for piece in pieces], UNIT_BYTES)


def _survey(stages: Stages, text: _Text, policy: Policy) -> Borders:
    """The first pass: says where each split ends. With splits that are known there is none, but to learn from."""
    config = stages.config
    fixed = {part.split for part in text.parts}
    known = {name: 0 for name in SPLITS if name in fixed}
    if known and not isinstance(config.tokenizer, Learned):
        return known
    jobs = [
        stages.job("survey", [[place(piece) for piece in unit]], size_of(unit), passes.survey, unit, policy.most_bad)
        for unit in text.units
    ]
    broken = set()
    for unit, said in zip(text.units, stages.run("survey", "reading", jobs), strict=True):
        _take(unit, said, text, policy, broken)
    for name, counter in policy.counts.items():
        reasons = ", ".join(f"{reason} {n}" for reason, n in counter.most_common())
        stages.progress(f"leaves out {counter.total()} bad records of {name}: {reasons}")
    ends = known or _borders(stages, [stages.pieces.path(job.name) for job in jobs], text, broken)
    text.found = {piece: one for piece, one in text.found.items() if piece.part.name not in broken}
    text.units = [good for unit in text.units if (good := tuple(piece for piece in unit if piece in text.found))]
    return ends


def _take(unit: Unit, said: Said, text: _Text, policy: Policy, broken: set[str]) -> None:
    """What a piece says of its slices. Raises: ValueError for too many bad records."""
    for piece, one in zip(unit, map(Found.of, said["slices"]), strict=not said["stopped"]):
        text.found[piece] = one
        if piece.part.name in broken:
            continue
        for bad in one.bad:
            policy.report(Bad(piece.part.name, *bad))
        if one.broken:
            broken.add(piece.part.name)
    if said["stopped"]:
        raise ValueError(str(Bad(piece.part.name, *one.bad[-1])))


def _borders(stages: Stages, pieces: Sequence[Path], text: _Text, broken: set[str]) -> Borders:
    """Where the splits end, by the hashes of all documents."""
    path = stages.pieces.folder.parent / f"hashes{TEMPORARY}"
    with open(path, "wb") as spool:
        for piece, unit in zip(pieces, text.units, strict=True):
            hashes_N, at = np.fromfile(piece / passes.HASHES, HASH), 0
            for one in unit:
                end = at + text.found[one].documents
                if one.part.name not in broken:
                    spool.write(hashes_N[at:end].tobytes())
                at = end
        size = spool.tell()
    hashes_N = np.memmap(path, HASH, "r+") if size else np.empty(0, HASH)
    hashes_N.sort()  # in the file: the system writes back what memory does not hold
    try:
        return borders(hashes_N, stages.config.shares())
    except ValueError as error:
        raise stages.config.too_few(str(error)) from error


def _tokenizer(stages: Stages, text: _Text, ends: Borders) -> Tokenizer:
    """The tokenizer; its definition is put beside the shards, still under a temporary name."""
    wanted = stages.config.tokenizer
    if isinstance(wanted, Bytes):
        return ByteTokenizer()
    path = _definition(stages.config, stages.pieces.folder.parent)
    if isinstance(wanted, Learned):
        most, size = wanted.training_bytes(), sum(one.bytes for one in text.found.values())
        part = f"{most / 1e6:.0f} MB of the training text, spread over it" if size > most else "the training text"
        stages.progress(f"learning {wanted.vocab_size:,} tokens from {part}")
        slices = [piece for unit in text.units for piece in unit]
        content = [[[place(piece), text.found[piece].sha256] for piece in slices], ends]
        job = stages.job("tokenizer", content, size_of(slices), passes.learn, slices, ends, size)
        list(stages.run("tokenizer", "learning", [job]))
        _save(path, (stages.pieces.path(job.name) / passes.DEFINITION).read_bytes())
    return read_file(wanted, path)


def _write(
    stages: Stages, text: _Text, policy: Policy, ends: Borders, tokenizer: Tokenizer, workers: int
) -> dict[Path, Said]:
    """The second pass: the pieces of the shards, in order."""
    plain = isinstance(stages.config.tokenizer, Bytes)
    path = None if plain else _definition(stages.config, stages.pieces.folder.parent)
    threads = max(1, cores() // min(workers, len(text.units) or 1)) if workers else None
    plan = Plan(ends, path, tokenizer.digest, threads, None if text.found else policy.most_bad)
    jobs = []
    for unit in text.units:
        known = [text.found[piece].sha256 if text.found else None for piece in unit]
        content = [[place(piece) for piece in unit], known, ends, tokenizer.digest]
        jobs.append(stages.job("write", content, size_of(unit), passes.write, unit, known, plan))
    text.found, pieces = {}, {}
    for job, unit, said in zip(jobs, text.units, stages.run("write", "writing", jobs), strict=True):
        if plan.most_bad is not None:
            _take(unit, said, text, policy, set())
        text.found.update(zip(unit, map(Found.of, said["slices"]), strict=True))
        pieces[stages.pieces.path(job.name)] = said
    return pieces


def _join(config: TextSource, name: str, writer: Writer, pieces: dict[Path, Said]) -> Shard:
    for path, said in pieces.items():
        writer.append(Piece(**said["splits"][name]), path)
    if not writer.documents:
        raise config.too_few(f"no document of the {name} split has a token in this tokenizer.")
    return writer.finish()


def _yardstick(splits: dict[str, Shard], pieces: dict[Path, Said]) -> float | None:
    """See `Manifest`."""
    if "validation" not in splits or splits["validation"].bytes > GZIP_BYTES:
        return None
    yardstick = Gzip()
    for path in pieces:
        with open(path / passes.TEXT, "rb") as file:
            while block := file.read(CHUNK):
                yardstick.add(block)
    return yardstick.bits_per_byte()


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
