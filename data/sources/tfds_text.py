"""A TFDS dataset with a text feature, by name and split, as a source.

Datasets in ArrayRecord are read without TensorFlow, in any order. TFRecord needs it: that is read from its start to
its end in a process of its own (`data/tensorflow_process.py`).
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data import tensorflow_process
from data.documents import Bad, Document, Part, Reading, Slice
from data.prepare.prepared import Prepared
from data.prepare.source import SPLITS, Fail, Skip
from data.tensorflow_process import Wrong
from data.tokenizer import AnyTokenizer, Bytes

HERE = "data.sources.tfds_text"
TOGETHER = 256
"""Examples that are read at once."""
DOWNLOAD_S = 24 * 3600.0
"""TFDS says nothing of itself while it fetches and unpacks."""


@dataclass(frozen=True, kw_only=True)
class TfdsText(Prepared):
    """A TFDS dataset that is on disk: your own (`python -m data.export.loose_json`), or one that TFDS knows by name."""

    elsewhere: ClassVar[tuple[str, ...]] = ("folder", "download", "silence_s")

    name: str
    """As TFDS has it: my_corpus, imdb_reviews/plain_text, c4/en:3.1.0."""
    split: str = "train"
    """What is trained on; slices as TFDS has them, such as train[:94.9%] or train+unsupervised."""
    validation: str | None = None
    """What is held out, such as train[94.9%:] or test; None: nothing is."""
    test: str | None = None
    """One more."""
    text_key: str = "text"
    """The feature that holds a document's text."""
    data_dir: str | None = None
    """Where TFDS keeps datasets; None: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    download: bool = False
    """Whether TFDS may fetch a dataset that is not there."""
    tokenizer: AnyTokenizer = Bytes()
    """Text to tokens."""
    silence_s: float = 600.0
    """The process that reads TFRecord is taken to hang, and killed, after so many seconds without a document."""
    bad_records: Fail | Skip = Fail()
    """What happens at a document that cannot be used: one that is not UTF-8, or holds a NUL."""
    folder: str | None = None
    """Where the shards are; None: prepared/ and a hash of the fields above that decide what is in them."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if self.silence_s <= 0:
            yield "silence_s", "must be positive; try 600"
        if not self.is_prepared():
            try:
                if not self._is_fetched_later():
                    self.parts()
            except Wrong as wrong:
                yield wrong.args
        yield from super().check()

    # The dataset

    def _splits(self) -> dict[str, str]:
        """Field to slice."""
        return {field: said for field in ("split", *SPLITS[1:]) if (said := getattr(self, field)) is not None}

    def _is_fetched_later(self) -> bool:
        try:
            return self.download and self.builder() is None
        except Wrong:
            return self.download

    def builder(self) -> Any:
        """TFDS's, for reading only. Raises: Wrong."""
        import tensorflow_datasets as tfds

        if self.data_dir is not None and not os.path.isdir(os.path.expanduser(self.data_dir)):
            raise Wrong("data_dir", "is no folder; name the one that TFDS keeps datasets in")
        place = os.path.expanduser(self.data_dir or tfds.core.constants.DATA_DIR)
        try:
            return tfds.core.read_only_builder.builder_from_files(self.name, data_dir=place)
        except (tfds.core.DatasetNotFoundError, ValueError, FileNotFoundError) as error:
            found = _on_disk(place)
            near = difflib.get_close_matches(self.name, found, n=1)
            names = ", ".join([name for name in found if ":" not in name][:12])
            hint = f"did you mean {near[0]}?" if near else f"there is {names or 'none'}."
            fetch = " If TFDS knows it, data.download=true fetches it" if not self.download else ""
            raise Wrong("name", f"is no dataset in {place}; {hint}{fetch}") from error

    def _check_feature(self, builder: Any) -> None:
        features = builder.info.features
        texts = sorted(name for name, feature in features.items() if _is_text(feature))
        if self.text_key in texts:
            return
        near = difflib.get_close_matches(self.text_key, texts, n=1)
        hint = f"did you mean {near[0]}?" if near else f"those are {', '.join(texts) or 'none'}"
        what = "is not one" if self.text_key in features else "is not there"
        raise Wrong("text_key", f"must be a feature of {builder.info.full_name} that holds a text, and {what}; {hint}")

    def _check_splits(self, builder: Any) -> None:
        """Raises: Wrong for a split that is not there, is empty, or is held out and trained on."""
        taken: dict[str, list[tuple[str, int, int]]] = {}
        for field, said in self._splits().items():
            _, taken[field] = _slice(builder, field, said)
            for other in taken.keys() - {field}:
                if shared := _shared(taken[field], taken[other]):
                    why = f"has {shared:,} examples in common with data.{other}={getattr(self, other)}"
                    raise Wrong(field, f"{why}, so that what is held out would be trained on; name other slices")

    # What `Prepared` asks for

    def prepare(self, progress: Callable[[str], None], *, workers: int | None = None) -> None:
        """See `Prepared`; with `download`, what is not there is fetched first."""
        if not self.is_prepared() and self._is_fetched_later():
            progress(f"TFDS fetches {self.name}")
            arguments = {"name": self.name, "data_dir": self.data_dir}
            for _ in tensorflow_process.stream(
                f"{HERE}:fetch", arguments, silence_s=DOWNLOAD_S, doing=f"data.name={self.name}"
            ):
                pass
        super().prepare(progress, workers=workers)

    @property
    def most_workers(self) -> int | None:  # pyrefly: ignore[bad-override]
        """Each reader of TFRecord has TensorFlow in memory."""
        return None if _is_random_access(self.builder()) else 1

    @property
    def described(self) -> str:
        """See `Prepared`."""
        return f"data.name={self.name}"

    def parts(self) -> list[Part]:
        """The splits. Raises: Wrong."""
        builder = self.builder()
        self._check_feature(builder)
        self._check_splits(builder)
        return [
            Part(
                f"{builder.data_path}#{said}",
                _fingerprint(str(builder.data_path)),
                _bytes(builder, said),
                "train" if field == "split" else field,
            )
            for field, said in self._splits().items()
        ]

    def slices(self, part: Part, most_bytes: int, reading: Reading) -> list[Slice]:
        """Equal numbers of examples; TFRecord is read from its start, so that it is one."""
        builder = self.builder()
        if not _is_random_access(builder):
            return [Slice(part)]
        count, _ = _slice(builder, "split", _place(part.name)[1])
        step = -(-count // max(1, -(-part.bytes // most_bytes)))
        starts = range(0, count, step)
        return [
            Slice(part, start, min(start + step, count), bytes=part.bytes * min(step, count - start) // count)
            for start in starts
        ]

    def read(self, piece: Slice, reading: Reading) -> Iterator[Document]:
        """See `Prepared`."""
        builder, said = self.builder(), _place(piece.part.name)[1]
        read = self._from_records if _is_random_access(builder) else self._from_tensorflow
        for number, text in enumerate(read(builder, said, piece), piece.start):
            reading.count(len(text))
            try:
                text.decode()
                at, reason, what = text.find(b"\0"), "NUL", "holds a NUL at byte {}; is it text?"
            except UnicodeDecodeError as error:
                at, reason, what = error.start, "not UTF-8", f"is not UTF-8 at byte {{}} ({error.reason})."
            if at < 0:
                yield [text]
            else:
                reading.report(Bad(reading.name, f"example {number}", reason, what.format(at)))

    def _from_records(self, builder: Any, said: str, piece: Slice) -> Iterator[bytes]:
        import tensorflow_datasets as tfds

        only = tfds.features.FeaturesDict({self.text_key: builder.info.features[self.text_key]})
        source = builder.as_data_source(split=said, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        for start in range(piece.start, stop := len(source) if piece.stop is None else piece.stop, TOGETHER):
            for record in source.__getitems__(range(start, min(start + TOGETHER, stop))):
                example: Any = only.deserialize_example_np(record)
                yield example[self.text_key]

    def _from_tensorflow(self, builder: Any, said: str, piece: Slice) -> Iterator[bytes]:
        arguments = {"folder": str(builder.data_path), "split": said, "text_key": self.text_key}
        doing = f"data.name={self.name}, split {said}"
        for item in tensorflow_process.stream(f"{HERE}:texts", arguments, silence_s=self.silence_s, doing=doing):
            if isinstance(item, bytes):
                yield item

    def is_here(self, names: Iterable[str]) -> bool:
        """Whether the dataset is."""
        return any(os.path.isdir(_place(name)[0]) for name in names)

    def fingerprints(self, names: Iterable[str]) -> dict[str, str]:
        """See `Prepared`; training must not import TFDS."""
        return {name: _fingerprint(_place(name)[0]) for name in names if os.path.isdir(_place(name)[0])}

    def too_few(self, why: str) -> ValueError:
        """See `Prepared`."""
        return ValueError(f"{self.described}, {self._splits()}: {why} Name larger slices.")


def _on_disk(place: str) -> list[str]:
    """Names of datasets, with the config where they have some, and each with its versions."""
    found = set()
    for info in [*Path(place).glob("*/*/dataset_info.json"), *Path(place).glob("*/*/*/dataset_info.json")]:
        *name, version = info.parent.relative_to(place).parts
        found |= {"/".join(name), f"{'/'.join(name)}:{version}"}
    return sorted(found)


def _is_text(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Text)


def _is_random_access(builder: Any) -> bool:
    return builder.info.file_format.value == "array_record"


def _slice(builder: Any, field: str, said: str) -> tuple[int, list[tuple[str, int, int]]]:
    """How many examples a slice has, and which: (split, first, behind the last). Raises: Wrong."""
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    known = ", ".join(splits)
    try:
        absolute = tfds.core.ReadInstruction.from_spec(said).to_absolute(splits)
        count = splits[said].num_examples
    except (ValueError, KeyError) as error:
        base = next((part for part in re.findall(r"\w+", said) if part not in splits), said)
        near = difflib.get_close_matches(base, list(splits), n=1)
        hint = f"did you mean {said.replace(base, near[0])}?" if near else f"splits are {known}; try train[:90%]"
        raise Wrong(field, f"is no split or slice of {builder.info.full_name}; {hint}") from error
    taken = []
    for part in absolute:
        size = splits[part.splitname].num_examples
        taken.append((part.splitname, part.from_ or 0, size if part.to is None else part.to))
    if not count:
        raise Wrong(field, f"holds no example; {known} have {', '.join(str(s.num_examples) for s in splits.values())}")
    return count, taken


def _shared(one: list[tuple[str, int, int]], other: list[tuple[str, int, int]]) -> int:
    """How many examples are in both."""
    return sum(max(0, min(b, d) - max(a, c)) for name, a, b in one for same, c, d in other if name == same)


def _bytes(builder: Any, said: str) -> int:
    """About how many a slice has."""
    parts = builder.info.splits[said].file_instructions
    sizes = [(os.path.getsize(file.filename), file.take, max(file.examples_in_shard, 1)) for file in parts]
    return sum(size if take == -1 else size * take // whole for size, take, whole in sizes)


def _fingerprint(folder: str) -> str:
    """Of what TFDS says about a dataset, and of its files."""
    content = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        status = path.stat()
        content.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\0".encode())
    return content.hexdigest()[:16]


def _place(name: str) -> tuple[str, str]:
    """The dataset's folder and the slice, of a part's name."""
    folder, _, said = name.rpartition("#")
    return folder, said


# In a process with TensorFlow


def texts(folder: str, split: str, text_key: str) -> Iterator[bytes | dict[str, str]]:
    """The texts of a split, in the order of its files."""
    tf = tensorflow_process.tensorflow()
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    decoders = tfds.decode.PartialDecoding({text_key: True})
    found = builder.as_dataset(split=split, shuffle_files=False, read_config=order, decoders=decoders)
    yield {"ready": folder}
    try:
        yield from found.map(lambda example: example[text_key]).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise ValueError(f"{folder}, split {split}: {error.message}") from error


def fetch(name: str, data_dir: str | None) -> Iterator[dict[str, str]]:
    """Downloads a dataset that TFDS knows, and writes it as ArrayRecord. Raises: ValueError."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()
    except Exception as error:
        said = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"data.name={name}: TFDS cannot fetch it: {type(error).__name__}: {said[0]}") from error
    yield {"ready": name}
