"""Batches: which row of which source a sample is, and what measures a source.

Sample i is a function of (seed, data, objective, packing, sequence length, i): of nothing that was read before, and not
of processes, devices or the size of batches. So all that a run has to keep is how many samples it has consumed.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from data.batches.curriculum import Curriculum, MetricFile, Rarity, easiest_first
from data.batches.objectives import AnyObjective, CausalLm, Frame
from data.batches.packing import Batch, BestFit, Concatenate
from data.batches.rows import Completions, Pick, Rows, Span, rows_of
from data.batches.shuffle import Shuffled, shuffled
from data.batches.special_tokens import frame_of
from data.corpus import Corpus, Split
from data.mixing import Order
from data.tokenizer import Tokenizer

CHUNK = 1 << 22
"""Tokens counted at once."""
POOLS = 1024
"""Pools of a curriculum that are remembered, each of a step and a source."""
MEASURED = 256
"""Rows measured at once."""


class Text(Protocol):
    """What is loaded: a `Corpus`, or several of them blended."""

    @property
    def parts(self) -> Mapping[str, Corpus]: ...
    @property
    def digest(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def gzip_bits_per_byte(self) -> float | None: ...
    @property
    def weights(self) -> tuple[float, ...]: ...
    def order(self, rows: Mapping[str, int]) -> Order: ...
    def describe(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


class Origin(NamedTuple):
    """Where a sample comes from."""

    source: str
    """Its name; nothing where there is one."""
    epoch: int | None
    """How often the source was gone through before; None with a curriculum, which has no epochs."""
    row: int
    """Which of the source's rows it is."""
    spans: list[Span]
    """The tokens of the source's training split that are in it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loader:
    """Rows of a corpus, to train on and to measure with."""

    corpus: Text
    sequence_length: int
    """Positions of a row, T."""
    objective: AnyObjective = CausalLm()
    packing: Concatenate | BestFit = Concatenate()
    curriculum: Curriculum | None = None
    global_size: int = 1
    """Samples of a step, by which a curriculum goes."""
    seed: int = 0
    _pools: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    _held_out: dict[str, Mapping[str, tuple[Rows, Split]]] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> "Loader":
        """Itself. Raises: ValueError if the training text does not fill a row, or the seed is wrong."""
        self._check_numbers()
        for name, part in self.corpus.parts.items():
            longest = len(part.splits["train"].tokens_N) - 1
            if self.sequence_length > longest:
                whose = f" of source {name}" if name else ""
                raise ValueError(
                    f"batch.sequence_length={self.sequence_length} is longer than the whole training text{whose}; "
                    f"try batch.sequence_length={longest} or less."
                )
            if not len(self._training[name]):
                raise ValueError(f"no row can be made of {part.source}: its documents are too short or too long.")
        self.held_out("validation")
        if self.curriculum is not None:
            self._refuse_what_is_never_drawn(self.curriculum)
        return self

    def _check_numbers(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be an integer >= 0; try seed=0.")
        if self.sequence_length < 1:
            raise ValueError(
                f"batch.sequence_length={self.sequence_length} must be >= 1; try batch.sequence_length=256."
            )

    def _refuse_what_is_never_drawn(self, curriculum: Curriculum) -> None:
        for name, (metric_N, _) in self._difficulties.items():
            whose = f" of source {name}" if name else ""
            first, last = (curriculum.pacing.difficulty(step) for step in (0, curriculum.pacing.last_step))
            if curriculum.by == "value" and first < metric_N[0]:
                raise ValueError(
                    f"curriculum.pacing starts at {first}, and the easiest row{whose} is at {metric_N[0]:.6g}; start "
                    f"at {math.ceil(metric_N[0])} or more."
                )
            if curriculum.by == "value" and last < metric_N[-1]:
                raise ValueError(
                    f"curriculum.pacing ends at {last}, and the hardest row{whose} is at {metric_N[-1]:.6g}, which "
                    f"would never be drawn; end at {math.ceil(metric_N[-1])} or more."
                )

    @cached_property
    def metric_digest(self) -> str | None:
        """16 hexadecimal digits of a curriculum's numbers, where they come from a file."""
        if self.curriculum is None or not isinstance(self.curriculum.metric, MetricFile):
            return None
        content = [metric_N.tobytes() + easiest_N.tobytes() for metric_N, easiest_N in self._difficulties.values()]
        return hashlib.sha256(b"".join(content)).hexdigest()[:16]

    @cached_property
    def frame(self) -> Frame:
        """What all rows have in common."""
        return frame_of(self.corpus.tokenizer, self.objective, self.packing, self.sequence_length)

    @cached_property
    def _training(self) -> Mapping[str, Rows]:
        return {name: self._rows(part.splits["train"], name) for name, part in self.corpus.parts.items()}

    def _rows(self, split: Split, source: str) -> Rows:
        return rows_of(split, self.objective, self.packing, self.frame, seed=self.seed, source=source)

    @cached_property
    def _orders(self) -> Sequence[tuple[str, Shuffled, int]]:
        return [(name, shuffled(len(rows), self.seed, name), len(rows)) for name, rows in self._training.items()]

    @cached_property
    def blend(self) -> Order:
        """Which source each sample of training comes from."""
        return self.corpus.order(self.epoch_samples)

    @property
    def left_out(self) -> Mapping[str, tuple[int, int]]:
        """Of sources of prompts and completions, how many pairs are longer than a row, and all; if there are any."""
        pairs = {name: rows.left_out for name, rows in self._training.items() if isinstance(rows, Completions)}
        return {name: (left_out, whole) for name, (left_out, whole) in pairs.items() if left_out}

    def epochs(self, samples: int) -> Mapping[str, float]:
        """How often each source is gone through in so many samples."""
        counts = self.blend.counts(samples)
        return {name: int(n) / rows for n, (name, rows) in zip(counts, self.epoch_samples.items(), strict=True)}

    @property
    def epoch_samples(self) -> Mapping[str, int]:
        """Samples in one epoch of each source."""
        return {name: len(rows) for name, rows in self._training.items()}

    def train(self, samples_B: np.ndarray | Sequence[int]) -> Batch:
        """The samples of these numbers (int64 [B], in any order) of the endless order of training.

        Raises: ValueError for no sample, or one below 0.
        """
        samples = [int(sample) for sample in samples_B]
        if not samples or min(samples) < 0:
            raise ValueError(f"samples_B={samples[:3]}... must hold at least one number, and none below 0.")
        picked: dict[str, list[tuple[int, Pick]]] = {}
        for place, sample in enumerate(samples):
            source, pick = self._pick(sample)
            picked.setdefault(source, []).append((place, pick))
        parts = {source: self._training[source].batch([pick for _, pick in picks]) for source, picks in picked.items()}
        if len(parts) == 1:
            return next(iter(parts.values()))
        places = np.argsort([place for picks in picked.values() for place, _ in picks])
        first = next(iter(parts.values()))
        return {name: np.concatenate([part[name] for part in parts.values()])[places] for name in first}

    def origin(self, sample: int) -> Origin:
        """Where a sample of training comes from."""
        source, pick = self._pick(sample)
        return Origin(
            source, pick.epoch if self.curriculum is None else None, pick.row, self._training[source].spans(pick.row)
        )

    def _pick(self, sample: int) -> tuple[str, Pick]:
        source, own = self.blend.locate(sample)
        name, order, rows = self._orders[source]
        if self.curriculum is None:
            return name, Pick(own // rows, order[own])
        _, easiest_N = self._difficulties[name]
        pool, before = self._pool(sample // self.global_size, name, source)
        rank = self.curriculum.draw(self.seed, name, pool, own - before)
        return name, Pick(own, int(easiest_N[rank]))  # an epoch of its own: small pools come back soon

    def _pool(self, step: int, name: str, source: int) -> tuple[int, int]:
        """How many of a source's easiest rows may be drawn at a step, and how many samples it had before they were."""
        if (step, name) not in self._pools:
            assert self.curriculum is not None
            pool, since_step = self.curriculum.pool(step, self._difficulties[name][0])
            before = int(self.blend.counts(since_step * self.global_size)[source])
            while len(self._pools) > POOLS:
                self._pools.pop(next(iter(self._pools)))
            self._pools[step, name] = pool, before
        return self._pools[step, name]

    @cached_property
    def _difficulties(self) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Of each source, how difficult its rows are, in ascending order, and which they are."""
        found = {}
        for name, rows in self._training.items():
            metric_N = self._measured(rows, self.corpus.parts[name].splits["train"])
            easiest_N = easiest_first(metric_N)
            found[name] = metric_N[easiest_N], easiest_N
        return found

    def _measured(self, rows: Rows, split: Split) -> np.ndarray:
        assert self.curriculum is not None
        metric = self.curriculum.metric
        if isinstance(metric, MetricFile):
            return metric.read(len(rows))
        counts_V = np.zeros(self.frame.vocab_size, np.int64)
        for i in range(0, len(split.tokens_N) if isinstance(metric, Rarity) else 0, CHUNK):
            counts_V += np.bincount(split.tokens_N[i : i + CHUNK], minlength=len(counts_V))
        chunks = (range(i, min(i + MEASURED, len(rows))) for i in range(0, len(rows), MEASURED))
        return np.concatenate(
            [metric.measure(rows.batch([Pick(0, row) for row in chunk]), counts_V) for chunk in chunks]
        )

    # What a reader of streams keeps; here a sample's number is all there is to know.

    is_stream: ClassVar[bool] = False
    """Whether samples come in order only, so that `open`, `save` and `restore` have something to do."""

    def open(self, part: int, parts: int) -> None:
        """Before the first sample: which part of every batch this process reads, of how many."""

    def save(self, folder: Path, samples: int) -> None:
        """Writes what it takes, besides the number, to go on behind the first `samples` samples of all processes."""

    def restore(self, folder: Path, samples: int) -> None:
        """Goes on where `save` was called. Raises: ValueError."""

    def held_out(self, split: str) -> Mapping[str, tuple[Rows, Split]]:
        """The rows of a split that is measured with, by source; sources without one are left out.

        Raises: ValueError if its documents are not of the kind that the objective is for.
        """
        if split not in self._held_out:
            found = {name: part.splits[split] for name, part in self.corpus.parts.items() if split in part.splits}
            rows = {
                name: self._training[name] if split == "train" else self._rows(there, f"{name}/{split}")
                for name, there in found.items()
            }
            self._held_out[split] = {name: (rows[name], there) for name, there in found.items() if len(rows[name])}
        return self._held_out[split]
