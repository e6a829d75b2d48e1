"""A seqio Task or Mixture as a source: compiled to token shards by `prepare`, or read live."""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data import tensorflow_process
from data.batches.loader import Text
from data.corpus import Blended, named
from data.documents import Bad, Document, Part, Reading, Slice, Tokenized
from data.sources.seqio_task.live import LiveText
from data.sources.seqio_task.task import HERE, PARTS, Described, NamedTask, files_of, fingerprint


@dataclass(frozen=True, kw_only=True)
class SeqioTask(NamedTask):
    """A Task or Mixture of your own seqio module."""

    # A Mixture

    def tasks(self) -> dict[str, "SeqioTask"]:
        """The tasks of a compiled Mixture as sources of a blend, by name; else itself, without one."""
        parts = self.compiled() if self.reader is None else {}
        if not parts:
            return {"": self}
        return {re.sub(r"[^\w.-]", ".", name): self.one_task(name, part["splits"]) for name, part in parts.items()}

    def is_current(self) -> bool:
        """Whether a compiled Mixture is what its module says now, as far as that is here."""
        return self.mixture_manifest().get("module") == fingerprint(self.module) or not files_of(self.module)

    def is_prepared(self) -> bool:
        """Whether shards are there, of a Mixture those of all its tasks; a live reader needs none."""
        if self.reader is not None:
            return True
        if not self.compiled():
            return super().is_prepared()
        return all(task.is_prepared() for task in self.tasks().values())

    def prepare(self, progress: Callable[[str], None], *, workers: int | None = None) -> None:
        """See `Prepared`; of a Mixture, each Task in a folder of its own."""
        if self.reader is not None:
            progress(f"{self.described} is read live, and needs no preparation")
            return
        if self.is_prepared() and not self.compiled():
            super().prepare(progress, workers=workers)
            return
        found = self.describe()
        for remark in found.remarks:
            progress(f"note: {remark}")
        if found.is_mixture:
            self._prepare_mixture(found, progress, workers)
        else:
            super().prepare(progress, workers=workers)

    def _prepare_mixture(self, found: Described, progress: Callable[[str], None], workers: int | None) -> None:
        for name, splits in found.splits.items():
            if "split" not in splits:
                progress(f"note: {name} is left out, as seqio does: it has no split {self.split}")
        kept = {name: rate for name, rate in found.tasks.items() if "split" in found.splits[name] and rate > 0}
        whole = sum(kept.values())
        parts = {name: {"weight": rate / whole, "splits": list(found.splits[name])} for name, rate in kept.items()}
        for number, (name, part) in enumerate(parts.items(), 1):
            progress(f"task {number} of {len(parts)}: {name}, weight {part['weight']:.4g}")
            self.one_task(name, part["splits"]).prepare(progress, workers=workers)
        said = {"recipe": self.recipe(), "module": fingerprint(self.module), "tasks": parts}
        temporary = self.prepared_folder() / f"{PARTS}.tmp"
        temporary.write_text(json.dumps(said, indent=1))
        temporary.rename(self.prepared_folder() / PARTS)

    # What `Prepared` asks for

    def load(self) -> Text:  # pyrefly: ignore[bad-override]
        """See `Prepared`; of a Mixture a blend of its tasks, and a stream where it is read live."""
        if self.reader is not None:
            return LiveText(self)
        if not (parts := self.compiled()):
            return super().load()
        loaded = {}
        for name, task in self.tasks().items():
            with named(name):
                loaded[name] = NamedTask.load(task)
        return Blended(loaded, [part["weight"] for part in parts.values()])

    @property
    def described(self) -> str:
        """See `Prepared`."""
        return f"data.mixture={self.mixture} of {self.module}"

    def parts(self) -> list[Part]:
        """The splits; the files of the module tell whether they may have changed."""
        now, sizes = fingerprint(self.module), self.describe().bytes[self.mixture]
        return [
            Part(f"{self.mixture} {name}", now, sizes[name], "train" if field == "split" else field)
            for field, name in self.splits_read().items()
        ]

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """See `Prepared`; training must not import seqio."""
        return dict.fromkeys(names, fingerprint(self.module))

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether the module is."""
        return bool(files_of(self.module))

    def read(self, piece: Slice, reading: Reading) -> Iterator[Document]:
        """See `Prepared`."""
        split = next(name for name in self.splits_read().values() if piece.part.name == f"{self.mixture} {name}")
        arguments = {"recipe": self.recipe_of(self.mixture).plain(), "split": split}
        doing = f"{self.described}, split {split}"
        numbers = itertools.count(-1)  # the first item says that the others are coming
        for number, item in zip(
            numbers,
            tensorflow_process.stream(f"{HERE}:documents", arguments, silence_s=self.silence_s, doing=doing),
            strict=False,
        ):
            if isinstance(item, dict):
                continue
            assert isinstance(item, np.ndarray)
            size, tokens = int(item[0]), item[1:]
            if size < 0:
                why = f"holds tokens outside the vocabulary ({tokens.min()} to {tokens.max()})."
                reading.report(Bad(reading.name, f"document {number}", "outside the vocabulary", why))
                continue
            reading.count(size)
            yield Tokenized([tokens], size)
