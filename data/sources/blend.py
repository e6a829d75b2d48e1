"""A blend of sources, and which sources a config has."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.corpus import Blended, Corpus, named
from data.mixing import LONGEST_PERIOD
from data.prepare.prepared import Prepared
from data.sources.megatron_shards import MegatronShards
from data.sources.python_docs import PythonDocs
from data.sources.seqio_task.config import SeqioTask
from data.sources.text_files import TextFiles
from data.sources.tfds_text import TfdsText

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

    def load(self) -> Blended:
        """Opens all sources. Raises: ValueError that names the source."""
        found: dict[str, Corpus] = {}
        for source in self.sources:
            with named(source.name):
                corpus = source.data.load()
                if not isinstance(corpus, Corpus):
                    raise ValueError(f"{corpus.source} is no single text; a blend has its tasks, compiled, as sources.")
                found[source.name] = corpus
        return self.blended(found)

    def blended(self, parts: Mapping[str, Corpus]) -> Blended:
        """What was loaded of each source, by name, as one. Raises: ValueError if the tokenizers are not one."""
        return Blended(
            parts,
            [source.weight for source in self.sources],
            phases=[(phase.start_sample, phase.weights) for phase in self.phases],
            max_epochs={source.name: source.max_epochs for source in self.sources},
            temperature=self.temperature,
        )


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
