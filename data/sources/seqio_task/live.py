"""A seqio Task or Mixture read in the training process: what is trained on, and what it takes to go on elsewhere.

The examples' tokens are packed as those of shards are: documents end to end, each with its end behind it, cut into
windows. Nothing is trimmed and no converter of seqio's is used, so that id 0 is an id like others, and a document that
is longer than a row goes on in the next.
"""

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data import tensorflow_process
from data.batches.loader import Loader, Origin
from data.batches.objectives import WindowObjective
from data.batches.packing import Batch, Concatenate, Window
from data.batches.rows import Pick, windows_batch
from data.corpus import Corpus, OneSource, Split
from data.sources.seqio_task import inside, vocabulary
from data.sources.seqio_task.task import NamedTask, fingerprint

MOST_EMPTY = 1_000_000
"""Examples without tokens, one behind the other, after which the stream is taken to hold none."""
ONLY_FORWARD = "Compile the Task, of which any sample can be read: data.reader=None."


class LiveText(OneSource):
    """The text of a live reader: what is held out is in memory, what is trained on is a stream."""

    gzip_bits_per_byte = None

    def __init__(self, config: NamedTask) -> None:
        """Imports TensorFlow and the user's module, and reads what is held out. Raises: ValueError."""
        assert config.reader is not None
        self.tokenizer = vocabulary.read(config.describe().vocabulary)
        self.config, self._live = config, config.reader
        self.source = f"{config.mixture} of {config.module}"
        self._provider = inside.provider(config.module, config.mixture)
        names = {name: split for name in ("validation", "test") if (split := getattr(config, name)) is not None}
        self.splits = {name: split for name, said in names.items() if (split := self._held_out(said)) is not None}
        content = [config.recipe(), self._live.shuffle, fingerprint(config.module), self.tokenizer.digest]
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parts(self) -> Mapping[str, Corpus]:
        """What is held out, as of one source without a name."""
        corpus = Corpus(
            source=self.source,
            tokenizer=self.tokenizer,
            splits=self.splits,
            digest=self.digest,
            gzip_bits_per_byte=None,
        )
        return {"": corpus}

    def describe(self) -> str:
        """One line for the banner."""
        held_out = [
            f"the first {split.documents:,} documents of {name} held out" for name, split in self.splits.items()
        ]
        order = "shuffled" if self._live.shuffle else "in order"
        return f"{self.source}: read live, {order}; {', '.join(held_out) or 'none held out'}; digest {self.digest}"

    def examples(self, seed: int, part: int, parts: int) -> Any:
        """The endless tf.data.Dataset of tokens to train on, or one part of it. Raises: Wrong."""
        import seqio

        reads = self.config.recipe_of(self.config.mixture)
        shard = seqio.ShardInfo(part, parts) if parts > 1 else None
        more: dict[str, Any] = {"num_epochs": None, "shard_info": shard}
        if self._live.shuffle:
            more |= {"shuffle": True, "seed": reads.seed + seed}
        return inside.dataset(self._provider, reads, self.config.split, **more)

    def documents(self, iterator: Iterator[Any], split: str) -> Iterator[np.ndarray]:
        """The tokens of documents that have some, without ends. Raises: ValueError."""
        empty, doing = 0, f"{self.source}, split {split}"
        for number, example in enumerate(inside.examples(iterator, doing)):
            tokens = inside.document(example.numpy(), self.tokenizer.end_of_document)
            if not vocabulary.holds(self.tokenizer, tokens):
                why = f"holds tokens outside the vocabulary ({tokens.min()} to {tokens.max()})"
                raise ValueError(f"{doing}: document {number} {why}.")
            empty = 0 if len(tokens) else empty + 1
            if empty > MOST_EMPTY:
                raise ValueError(f"{doing}: {empty:,} documents without tokens follow one another.")
            if len(tokens):
                yield tokens

    def _held_out(self, split: str) -> Split | None:
        """Of each task that has the split, documents up to its share of the tokens that are kept."""
        parts = [task for task in inside.tasks(self._provider) if split in task.splits]
        kept: list[np.ndarray] = []
        for task in parts:
            found = inside.dataset(task, self.config.recipe_of(self.config.mixture), split)
            room = self._live.validation_tokens // len(parts)
            for tokens in self.documents(iter(found), split):
                if (room := room - len(tokens) - 1) < 0:
                    break
                kept.append(tokens)
        size = sum(self.tokenizer.text_bytes(tokens) for tokens in kept)
        return Split.of_documents(kept, self.tokenizer.end_of_document, size) if kept else None


@dataclass
class _Place:
    """How far a process has read."""

    part: int = 0
    parts: int = 1
    samples: int = 0
    """Of all processes, before the first that is yet to be given."""
    stream: "_Stream | None" = None
    given: deque[dict[int, Window]] = field(default_factory=lambda: deque(maxlen=2))
    """The last two batches, by the samples' numbers: one that is trained on, one that was made ahead."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, kw_only=True, eq=False)
class LiveLoader(Loader):
    """Rows of a live reader: samples are given in order, each batch once. As many processes as before have to read a
    run's stream on."""

    _place: _Place = field(default_factory=_Place, init=False, repr=False)

    def check(self) -> "LiveLoader":
        """Itself. Raises: ValueError for what a stream cannot do."""
        self._check_numbers()
        for name, wrong in (
            ("objective", not isinstance(self.objective, WindowObjective)),
            ("packing", not isinstance(self.packing, Concatenate)),
            ("curriculum", self.curriculum is not None),
        ):
            if wrong:
                what = type(getattr(self, name)).__name__
                raise ValueError(f"{name}={what} needs all rows at hand, and a live reader has none. {ONLY_FORWARD}")
        self.held_out("validation")
        return self

    @property
    def epoch_samples(self) -> Mapping[str, int]:
        """0: nobody counted how many there are."""
        return {"": 0}

    def epochs(self, samples: int) -> Mapping[str, float]:
        """Not a number: unknown."""
        return {"": float("nan")}

    @property
    def left_out(self) -> Mapping[str, tuple[int, int]]:
        """Nothing is."""
        return {}

    def origin(self, sample: int) -> Origin:
        """Raises: ValueError: it is not kept."""
        raise ValueError(f"a live reader does not know where sample {sample} came from. {ONLY_FORWARD}")

    @cached_property
    def _text(self) -> LiveText:
        assert isinstance(self.corpus, LiveText)
        return self.corpus

    # Samples

    is_stream: ClassVar[bool] = True

    def open(self, part: int, parts: int) -> None:
        """See `Loader`: processes that train on the same rows read the same part of the stream."""
        assert 0 <= part < parts and self._place.stream is None
        self._place.part, self._place.parts = part, parts

    def train(self, samples_B: np.ndarray | Sequence[int]) -> Batch:
        """This process's samples of the next batch, in the order of their numbers; those of the last one again.

        Raises: ValueError for others, for a process that reads more or less than its part, and for what goes wrong in
        seqio.
        """
        numbers, place = [int(sample) for sample in samples_B], self._place
        if not numbers:
            raise ValueError("samples_B must hold at least one number.")
        with place.lock:
            if not place.given or not place.given[-1].keys() >= set(numbers):
                self._refuse_other_than_next(numbers)
                place.stream = place.stream or _Stream(self._text, self.seed, place.part, place.parts)
                place.given.append({n: place.stream.window(self._window_length) for n in sorted(set(numbers))})
                place.samples += self.global_size
            given = place.given[-1]
        picks, windows = [Pick(0, n) for n in numbers], [given[n] for n in numbers]
        assert isinstance(self.objective, WindowObjective)
        return windows_batch(windows, picks, self.objective, self.frame, self.seed, "")

    @property
    def _window_length(self) -> int:
        assert isinstance(self.objective, WindowObjective)
        return self.objective.window_length(self.sequence_length)

    def _refuse_other_than_next(self, numbers: Sequence[int]) -> None:
        start, size, place = self._place.samples, self.global_size, self._place
        if not start <= min(numbers) <= max(numbers) < start + size:
            raise ValueError(
                f"samples {min(numbers)} to {max(numbers)} are asked for, and a live reader only goes forward: the "
                f"next it has are {start} to {start + size - 1}. {ONLY_FORWARD}"
            )
        if len(set(numbers)) * place.parts != size:
            raise ValueError(
                f"this process trains on {len(set(numbers))} of {size} rows, and reads part {place.part + 1} of "
                f"{place.parts} of the stream: each part must be an equal share of the batch."
            )

    # Its state

    def save(self, folder: Path, samples: int) -> None:
        """See `Loader`. What was read ahead of these samples is kept: a batch at the most."""
        place, rest = self._place, np.empty(0, np.int32)
        with place.lock:
            if place.stream is not None:
                place.stream.save(str(folder / f"{self._file}.iterator"))
                ahead = [tokens[:-1] for given in place.given for n, (tokens, _) in given.items() if n >= samples]
                rest = np.concatenate([*ahead, place.stream.rest])
        np.save(folder / f"{self._file}.npy", rest)
        said = {"digest": self.corpus.digest, "seed": self.seed, "samples": samples, "begun": place.stream is not None}
        (folder / f"{self._file}.json").write_text(json.dumps(said) + "\n")

    def restore(self, folder: Path, samples: int) -> None:
        """See `Loader`.

        Raises: ValueError if `save` was called with other data, or with more or fewer processes, or not at all.
        """
        path, place = folder / f"{self._file}.json", self._place
        if not path.is_file():
            others = {int(other.stem.rpartition("-of-")[2]) for other in folder.glob("seqio-*-of-*.json")}
            found = f"is of {min(others)}, this run has {place.parts}" if others else f"is not in {folder}"
            raise ValueError(
                "a live seqio reader has a state for each process that reads, and the state of this checkpoint "
                f"{found}. Go on with as many as before, or compile the Task: data.reader=None."
            )
        said = json.loads(path.read_text())
        now = {"digest": self.corpus.digest, "seed": self.seed, "samples": samples}
        for name, value in now.items():
            if said[name] != value:
                raise ValueError(
                    f"{path} is the state of another stream ({name} {said[name]}, not {value}): the place in it means "
                    "nothing in this one. Undo the change of the Task, its module or the seed, or start anew: --fresh."
                )
        with place.lock:
            place.given.clear()
            place.samples, place.stream = samples, None
            if said["begun"]:
                place.stream = _Stream(self._text, self.seed, place.part, place.parts)
                place.stream.restore(str(folder / f"{self._file}.iterator"), np.load(folder / f"{self._file}.npy"))

    @property
    def _file(self) -> str:
        return f"seqio-{self._place.part}-of-{self._place.parts}"


class _Stream:
    """Documents end to end, without end."""

    def __init__(self, text: LiveText, seed: int, part: int, parts: int) -> None:
        self._end = np.array([text.tokenizer.end_of_document], np.int32)
        self._iterator = iter(text.examples(seed, part, parts))
        self._documents = text.documents(self._iterator, text.config.split)
        self.rest = np.empty(0, np.int32)
        """Tokens that were read and were not targets yet, and the one before them."""

    def window(self, length: int) -> Window:
        """The next `length` targets, all real, and what precedes them. Raises: ValueError."""
        parts, held = [self.rest], len(self.rest)
        while held < length + 1:
            document = next(self._documents)
            parts += [document, self._end]
            held += len(document) + 1
        tokens = np.concatenate(parts) if len(parts) > 1 else self.rest
        self.rest = tokens[length:]
        return tokens[: length + 1], length

    def save(self, path: str) -> None:
        """tf.data's own state: its shuffle buffers, and where it stands in each file."""
        tensorflow_process.tensorflow().train.Checkpoint(iterator=self._iterator).write(path)

    def restore(self, path: str, rest: np.ndarray) -> None:
        """See `save`."""
        tensorflow_process.tensorflow().train.Checkpoint(iterator=self._iterator).read(path).assert_consumed()
        self.rest = rest
