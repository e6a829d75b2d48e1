"""A seqio Task or Mixture by name, and what its module says of it: its splits, rates and vocabulary."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, ClassVar, Self

from data import tensorflow_process
from data.prepare.prepared import Prepared
from data.prepare.source import Fail, Skip
from data.sources.seqio_task import inside, vocabulary
from data.sources.seqio_task.inside import Recipe
from data.tensorflow_process import Wrong
from data.tokenizer.interface import Given, Tokenizer

HERE = "data.sources.seqio_task.inside"
PARTS = "mixture.manifest"
"""What a Mixture was when it was compiled, beside the folders of its tasks."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """seqio in the training process, for Tasks that give other examples in every epoch. A Mixture's rates then are
    shares of examples. What is read is a stream: its state is large, and one for each process that reads."""

    shuffle: bool = True
    """As seqio shuffles: files, and examples within each Task's buffer."""
    validation_tokens: int = 4_000_000
    """Of the validation split, how many tokens are read at the start and kept; what is behind them is left out."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.validation_tokens < 2:
            yield "validation_tokens", "must be at least 2; try 4000000"


@dataclass(frozen=True)
class SeqioVocabulary(Given):
    """The vocabulary that a Task names, known once its module was imported or from its copy beside the shards."""

    copy_name: ClassVar[str] = "seqio_vocabulary.json"

    task: "NamedTask"

    def original(self) -> Path:
        """See `Given`: the copy itself."""
        parts = self.task.compiled()
        return self.task.prepared_folder() / next(iter(parts), "") / self.copy_name

    def known(self) -> Tokenizer:
        """The tokenizer. Raises: ValueError if the Task cannot be described."""
        copy = self.original()
        return vocabulary.read(copy.read_bytes() if copy.is_file() else self.task.describe().vocabulary)

    @property
    def vocab_size(self) -> int:
        """See `Given`."""
        return self.known().vocab_size

    def has_special(self, name: str) -> bool:
        """See `Defined`."""
        return self.known().special(name) is not None

    def read(self, definition: bytes) -> Tokenizer:
        """See `Defined`."""
        return vocabulary.read(definition)

    def measure(self, definition: bytes) -> int:
        """See `Given`."""
        return vocabulary.read(definition).vocab_size


@dataclass(frozen=True)
class Described:
    """What a Task or Mixture is, once its module was imported."""

    tasks: Mapping[str, float]
    """Of each Task its rate; all rates are 1 together."""
    splits: Mapping[str, tuple[str, ...]]
    """Of each Task those of train, validation and test that it has."""
    is_mixture: bool
    vocabulary: bytes
    """The definition."""
    bytes: Mapping[str, Mapping[str, int]]
    """Of each Task and split (seqio's name) about how many are read; 0, where its source does not tell."""
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NamedTask(Prepared):
    """A Task or Mixture by its module and name, and what that module says of it."""

    elsewhere: ClassVar[tuple[str, ...]] = ("folder", "reader", "silence_s")
    in_workers: ClassVar[bool] = False
    most_workers: ClassVar[int | None] = 1

    module: str
    """The module that registers it, as in `import my_pkg.tasks`."""
    mixture: str
    """The Task or Mixture. A Mixture's rates become weights: shares of windows, so of tokens, not of examples."""
    feature: str = "targets"
    """The output feature whose tokens are documents."""
    split: str = "train"
    """seqio's name of the split that is trained on."""
    validation: str | None = "validation"
    """Of the split that is held out; None: none is."""
    test: str | None = None
    """Of one more."""
    sequence_length: int | None = None
    """For preprocessors that ask for one; whether they cut text to it is theirs. Nothing else is cut."""
    use_cached: bool = False
    """Read what seqio_cache_tasks wrote; the module names its folders (seqio.add_global_cache_dirs)."""
    seed: int = 0
    """Of preprocessors that draw random numbers: drawn once for shards, anew in every epoch of a live reader."""
    reader: Live | None = None
    """None: `prepare` compiles it to token shards, of which any sample is read at once, and training never imports
    TensorFlow. Live: seqio runs in the training process."""
    silence_s: float = 600.0
    """The process that runs seqio is taken to hang, and killed, after so many seconds without a document."""
    bad_records: Fail | Skip = Fail()
    """What happens at a document that cannot be used: with tokens outside the vocabulary."""
    folder: str | None = None
    """Where the shards are; None: prepared/ and a hash of the fields above that decide what is in them."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        wrong = list(self._fields())
        if not wrong and (self.reader is not None or not self.is_prepared()):
            try:
                self.describe()
            except Wrong as error:
                wrong = [error.args]
            except ValueError as error:
                wrong = [("module", f"cannot be used: {error}")]
        yield from wrong
        if not wrong:
            yield from super().check()

    def _fields(self) -> Iterator[tuple[str, str]]:
        for field in ("mixture", "feature", "split"):
            if not getattr(self, field):
                yield field, "is empty"
        if not all(part.isidentifier() for part in self.module.split(".")):
            yield "module", "is no name of a module; say it as in import, such as my_pkg.tasks"
        if self.sequence_length is not None and self.sequence_length < 1:
            yield "sequence_length", "must be at least 1, or None"
        if self.silence_s <= 0:
            yield "silence_s", "must be positive; try 600"
        if self.seed < 0:
            yield "seed", "must be at least 0"
        names = list(self.splits_read().values())
        if len(set(names)) < len(names):
            yield "validation", f"must be another split than the others: {', '.join(names)}"

    # What it is

    def recipe_of(self, task: str) -> Recipe:
        """What decides a Task's tokens."""
        fields = ("module", "feature", "sequence_length", "use_cached", "seed")
        return Recipe(mixture=task, **{name: getattr(self, name) for name in fields})

    def splits_read(self) -> dict[str, str]:
        """Field to seqio's name."""
        fields = ("split", "validation", "test")
        return {field: name for field in fields if (name := getattr(self, field)) is not None}

    def describe(self) -> Described:
        """Imports the module, unless it is read live in a process of its own, once.

        Raises: ValueError, Wrong for a wrong field.
        """
        if (key := self._key()) in _KNOWN:
            return _KNOWN[key]
        live = self.reader is not None
        arguments = {"recipe": self.recipe_of(self.mixture).plain(), "splits": self.splits_read(), "live": live}
        if live:
            (item,) = inside.describe(**arguments)
        else:
            now = fingerprint(self.module)
            if _IMPORTED.setdefault(self.module, now) != now:
                tensorflow_process.rest()  # it has imported what the module was
                _IMPORTED[self.module] = now
            (item,) = tensorflow_process.stream(
                f"{HERE}:describe", arguments, silence_s=self.silence_s, doing=self.described
            )
        assert isinstance(item, dict)
        _KNOWN[key] = found = Described(
            tasks={task["name"]: task["rate"] for task in item["tasks"]},
            splits={task["name"]: tuple(task["splits"]) for task in item["tasks"]},
            is_mixture=item["is_mixture"],
            vocabulary=item["vocabulary"].encode(),
            bytes={task["name"]: task["bytes"] for task in item["tasks"]},
            remarks=tuple(item["remarks"]),
        )
        for name, has in found.splits.items() if found.is_mixture else ():
            alone = replace(found, tasks={name: 1.0}, splits={name: has}, is_mixture=False, remarks=())
            _KNOWN[self.one_task(name, has)._key()] = alone
        return found

    def _key(self) -> str:
        plain = self.recipe_of(self.mixture).plain()
        return json.dumps([plain, self.splits_read(), fingerprint(self.module), type(self.reader).__name__])

    @property
    def vocab_size(self) -> int:
        """Number of tokens. Raises: ValueError."""
        return self.tokenizer.vocab_size

    @property
    def tokenizer(self) -> SeqioVocabulary:  # pyrefly: ignore[bad-override]
        """The vocabulary that the Task names."""
        return SeqioVocabulary(self)

    def definition(self) -> bytes:
        """See `Prepared`."""
        return self.describe().vocabulary

    # A Mixture

    def compiled(self) -> dict[str, Any]:
        """The tasks that were compiled of this Mixture, each with its weight and splits; none of a Task."""
        return self.mixture_manifest().get("tasks", {})

    def mixture_manifest(self) -> dict[str, Any]:
        """What a Mixture was when it was compiled; empty if it was not, or with another recipe."""
        try:
            said = json.loads((self.prepared_folder() / PARTS).read_bytes())
        except OSError:
            return {}
        return said if said["recipe"] == json.loads(json.dumps(self.recipe())) else {}

    def one_task(self, name: str, splits: Iterable[str]) -> Self:
        """One of a Mixture's tasks."""
        lacks = {field: None for field in ("validation", "test") if field not in splits}
        return replace(self, mixture=name, folder=str(self.prepared_folder() / name), **lacks)


_IMPORTED: dict[str, str] = {}
"""Fingerprints of modules that the process with TensorFlow may have imported."""
_KNOWN: dict[str, Described] = {}
"""What was found out in this process, by everything that decides it."""


def fingerprint(module: str) -> str:
    """Of the module's files, and of all others of its package; of nothing where it is not found."""
    content = hashlib.sha256()
    for path in files_of(module):
        content.update(str(path.name).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def files_of(module: str) -> list[Path]:
    """Found without importing anything."""
    top, _, inner = module.partition(".")
    try:
        spec = sys.modules[top].__spec__ if top in sys.modules else PathFinder.find_spec(top, tensorflow_process.path())
    except AttributeError:  # a module without one
        return []
    if spec is not None and spec.submodule_search_locations:
        return sorted(path for place in spec.submodule_search_locations for path in Path(place).rglob("*.py"))
    return [Path(spec.origin)] if spec is not None and spec.has_location and spec.origin and not inner else []
