"""A blend of sources as a config, and what it loads."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from data.blend import LONGEST_PERIOD, Order, capped
from data.corpus import Corpus
from data.megatron_shards import MegatronShards
from data.prepared import Prepared
from data.python_docs import PythonDocs
from data.seqio_task.config import SeqioTask
from data.text_files import TextFiles
from data.tfds_text import TfdsText
from data.tokenizer import Tokenizer

Source = PythonDocs | TextFiles | TfdsText | SeqioTask | MegatronShards
"""What a blend can be made of."""


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """A source of a blend."""

    name: str
    """For metrics, such as val/wiki/loss, and for its random numbers."""
    data: Source
    """Where its tokens come from."""
    weight: float = 1.0
    """Its share of the samples, in any unit; 0: none, until a phase says otherwise."""
    max_epochs: float | None = None
    """It is left out after so many passes, and the others go on with their weights; None: as many as it takes."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not re.fullmatch(r"[\w.-]+", self.name):
            yield "name", "must be letters, digits, _, . or -, for it names metrics; try wiki"
        if self.weight < 0:
            yield "weight", "must be at least 0"
        if self.max_epochs is not None and self.max_epochs <= 0:
            yield "max_epochs", "must be positive; None sets no limit"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Other weights from a sample on; before it nothing changes, so that a run can get one on its way."""

    start_sample: int
    """The first sample of training that has these weights; samples count sequences, not steps."""
    weights: tuple[float, ...]
    """One for each source, in their order."""


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Several sources in each batch. Of any first N samples each has its weight's share, to within one sample."""

    sources: tuple[Weighted, ...]
    """What is blended. All have the same tokenizer."""
    phases: tuple[Phase, ...] = ()
    """Changes of the weights during the run."""
    temperature: float | None = None
    """Weights are multiplied by each source's tokens to the power of 1 / temperature: 1 goes by size, more evens out
    (Arivazhagan et al. 2019). None: weights are what they are."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        names = [source.name for source in self.sources]
        if not names:
            yield "sources", "is empty; give at least one Weighted(name=..., data=...)"
        elif twice := sorted({name for name in names if names.count(name) > 1}):
            yield "sources", f"has the name {twice[0]} twice; each needs its own"
        elif not any(source.weight > 0 for source in self.sources):
            yield "sources", "has no weight above 0"
        elif least := [s for s in self.sources if 0 < s.weight * LONGEST_PERIOD < sum(s.weight for s in self.sources)]:
            yield (
                "sources",
                f"gives {least[0].name} less than one sample in {LONGEST_PERIOD:,}, the finest share there is",
            )
        if self.temperature is not None and self.temperature <= 0:
            yield "temperature", "must be positive; None takes the weights as they are"
        starts = [phase.start_sample for phase in self.phases]
        if starts != sorted(set(starts)) or min(starts, default=1) < 1:
            yield "phases", "must start at rising samples above 0"
        for phase in self.phases:
            if len(phase.weights) != len(self.sources) or min(phase.weights, default=0) < 0 or not any(phase.weights):
                yield "phases", f"must give each of the {len(self.sources)} sources a weight of at least 0, one above 0"

    @property
    def tokenizer(self) -> Any:
        """The config of the first source's."""
        return self.sources[0].data.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, known without loading."""
        return max(source.data.vocab_size for source in self.sources)

    def is_prepared(self) -> bool:
        """Whether `load` will do."""
        return all(source.data.is_prepared() for source in self.sources)

    def load(self) -> "Blended":
        """Opens all sources. Raises: ValueError that names the source."""
        found: dict[str, Corpus] = {}
        for source in self.sources:
            with named(source.name):
                corpus = source.data.load()
                if not isinstance(corpus, Corpus):
                    raise ValueError(f"{corpus.source} is no single text; a blend has its tasks, compiled, as sources.")
                found[source.name] = corpus
        return Blended(self, found)


def sources_of(config: Source | Blend) -> Mapping[str, Source]:
    """The sources of a config's data by name; one without a name where it is no blend."""
    if isinstance(config, Blend):
        return {source.name: source.data for source in config.sources}
    return config.tasks() if isinstance(config, SeqioTask) and config.is_current() else {"": config}


def shards_of(source: Prepared) -> list[Prepared]:
    """What lies in one folder of shards each: of a seqio Mixture its tasks; nothing of what is read live."""
    if not isinstance(source, SeqioTask):
        return [source]
    return list(source.tasks().values()) if source.reader is None else []


class Blended:
    """Several corpora that are trained on together."""

    gzip_bits_per_byte = None

    def __init__(self, config: Blend, parts: Mapping[str, Corpus]) -> None:
        """Raises: ValueError if the tokenizers are not one."""
        self._config, self.parts = config, parts
        first, *others = parts
        for name in others:
            if parts[name].tokenizer.digest != parts[first].tokenizer.digest:
                raise ValueError(
                    f"sources {first} and {name} have different tokenizers, so that a token means two things; give all "
                    "the same, such as the file that one of them learned: tokenizer=TokenizerFile(path=...)."
                )

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens and back."""
        return next(iter(self.parts.values())).tokenizer

    @property
    def source(self) -> str:
        """What the text is, for people."""
        return " + ".join(f"{name} ({part.source})" for name, part in self.parts.items())

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any token of any source, and with their names."""
        lines = [f"{name} {part.digest}" for name, part in self.parts.items()]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def order(self, rows: Mapping[str, int]) -> Order:
        """Which source each sample of training comes from, of sources with so many rows."""
        starts, weights = zip(*self._phases(), strict=True)
        limits = [
            None if source.max_epochs is None else int(Fraction(str(source.max_epochs)) * rows[source.name])
            for source in self._config.sources
        ]
        return capped(Order(starts, weights), limits)

    def _phases(self) -> list[tuple[int, tuple[float, ...]]]:
        """The first sample and the weights of each."""
        config = self._config
        sizes = [len(part.splits["train"].tokens_N) for part in self.parts.values()]
        factors = [1.0 if config.temperature is None else size ** (1 / config.temperature) for size in sizes]
        phases = [(0, tuple(source.weight for source in config.sources))]
        phases += [(phase.start_sample, phase.weights) for phase in config.phases]
        return [(start, tuple(w * f for w, f in zip(each, factors, strict=True))) for start, each in phases]

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources, in the last phase."""
        return self._phases()[-1][1]

    def describe(self) -> str:
        """For the banner."""
        parts = "".join(f"\n              {name}: {part.describe()}" for name, part in self.parts.items())
        return f"a blend of {len(self.parts)} sources, digest {self.digest}{parts}"


@contextlib.contextmanager
def named(source: str) -> Iterator[None]:
    """Errors get the source's name, if it has one."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"source {source}: {error}" if source else str(error)) from error
