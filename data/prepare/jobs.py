"""Stages of a preparation: jobs that leave finished pieces, how far they are, and how much of the text is bad."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.documents import UNREADABLE, Bad, Slice
from data.prepare import passes
from data.prepare.passes import Count, Unit
from data.prepare.pieces import Pieces, name_of
from data.prepare.source import Skip, TextSource
from data.workers import Call, Workers

REPORT_S = 2.0
"""Between progress lines."""

Progress = Callable[[str], None]
Said = dict[str, Any]
"""What a piece says of itself."""


@dataclass
class Job:
    """A call, and the piece that it leaves."""

    name: str
    """The piece's."""
    call: Call
    bytes: int
    """About what it will count."""


class Stages:
    """What the stages of one preparation share."""

    def __init__(self, config: TextSource, pieces: Pieces, workers: Workers, progress: Progress) -> None:
        self.config, self.pieces, self.workers, self.progress = config, pieces, workers, progress
        self.recipe = config.recipe()

    def ask(self, method: Callable[[], Any]) -> Any:
        """Calls a method of the config where its packages may be loaded."""
        return self.workers.one(functools.partial(passes.ask, method)) if self.config.in_workers else method()

    def job(self, kind: str, content: Sequence[Any], size: int, call: Callable, *arguments: Any) -> Job:
        """A job that nothing but the recipe and `content` (plain data) decides."""
        name = name_of(kind, self.recipe, *content)
        return Job(name, functools.partial(call, self.config, *arguments, self.pieces.folder, name), size)

    def run(self, kind: str, verb: str, jobs: Sequence[Job]) -> Iterator[Said]:
        """What the pieces of the jobs say, in order; those that are not there are made, others of the kind removed.

        A job that is `stopped`, by too many bad records, leaves no piece, and none begins after it.
        """
        if removed := self.pieces.keep(kind, {job.name for job in jobs}):
            self.progress(f"removes {removed} pieces from {self.pieces.folder}: the text or the settings have changed")
        found = {job.name: self.pieces.find(job.name) for job in jobs}
        there = {name: said for name, said in found.items() if said is not None and not _is_out_of_date(said)}
        if there:
            self.progress(f"{verb}  finds {len(there)} of {len(jobs)} pieces in {self.pieces.folder}")
        done = sum((_count(job, there[job.name]) for job in jobs if job.name in there), Count())
        meter = Meter(self.progress, verb, sum(job.bytes for job in jobs), done)
        missing = [job.call for job in jobs if job.name not in there]
        for job in jobs:
            if job.name not in there:
                self.pieces.remove(job.name)
        made = self.workers.each(missing, meter.tell, last=lambda said: said.get("stopped", False))
        for job in jobs:
            yield there[job.name] if job.name in there else next(made)
        if missing:
            meter.say(end=True)


def _is_out_of_date(said: Said) -> bool:
    """Whether a part could not be read: now it may be, and no fingerprint says so."""
    slices = [one for one in said.get("slices", []) if isinstance(one, dict)]
    return any(reason == UNREADABLE for one in slices for _, reason, _ in one["bad"])


def place(piece: Slice) -> list[Any]:
    """A slice as plain data."""
    return [piece.part.name, piece.part.fingerprint, piece.start, piece.stop]


def size_of(slices: Iterable[Slice]) -> int:
    """About what will be counted while they are read."""
    return sum(piece.part.bytes if piece.bytes is None else piece.bytes for piece in slices)


def units_of(slices: Iterable[Slice], most_bytes: int) -> list[Unit]:
    """Slices in runs of about so many bytes."""
    units, unit, size = [], [], 0
    for piece in slices:
        more = size_of([piece])
        if unit and size + more > most_bytes:
            units.append(tuple(unit))
            unit, size = [], 0
        unit.append(piece)
        size += more
    return [*units, tuple(unit)] if unit else units


def _count(job: Job, said: Said) -> Count:
    """What a finished piece adds."""
    documents = sum(one["documents"] for one in said["slices"]) if job.name.startswith(("survey", "write")) else 0
    return Count(job.bytes, documents, sum(one["tokens"] for one in said.get("splits", {}).values()))


class Meter:
    """Progress lines."""

    def __init__(self, progress: Progress, verb: str, total_bytes: int, done: Count) -> None:
        self._progress, self._verb, self._total = progress, verb, total_bytes
        self._count, self._before = done, done.bytes
        self._started = self._said = time.monotonic()

    def tell(self, told: Count | None) -> None:
        """See `data.workers.Tell`."""
        if told:
            self._count += told
        if time.monotonic() - self._said > REPORT_S:
            self._said = time.monotonic()
            self.say()

    def say(self, *, end: bool = False) -> None:
        """A line; the last one of a stage has no time left."""
        count, seconds = self._count, max(time.monotonic() - self._started, 1e-9)
        speed = (count.bytes - self._before) / seconds
        parts = [f"{count.bytes / 1e6:,.1f} of {self._total / 1e6:,.1f} MB", f"{speed / 1e6:.1f} MB/s"]
        parts += [f"{n:,} {what}" for n, what in ((count.documents, "documents"), (count.tokens, "tokens")) if n]
        if not end and 100 * (count.bytes - self._before) > self._total:  # before, nobody knows
            parts.append(f"{_time((self._total - count.bytes) / speed)} left")
        self._progress(f"{self._verb}  {', '.join(parts)}")


def _time(seconds: float) -> str:
    minutes = max(round(seconds), 0) // 60
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min"


class Policy:
    """Counts bad records; raises at the first, or at one too many."""

    def __init__(self, config: TextSource) -> None:
        self._budget = config.bad_records.budget if isinstance(config.bad_records, Skip) else None
        self.most_bad = self._budget or 0
        self.counts: dict[str, Counter[str]] = {}

    def report(self, bad: Bad) -> None:
        """Raises: ValueError."""
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
