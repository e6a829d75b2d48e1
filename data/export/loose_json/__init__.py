"""Loose JSON lines as a TFDS dataset: a store of documents with a name, a version and splits that can be sliced.

    from data.export.loose_json import LooseJson
    LooseJson(name="my_corpus", paths="text/*.jsonl.gz", data_dir="tfds").download_and_prepare()

or `python -m data.export.loose_json "text/*.jsonl.gz" --name my_corpus --data-dir tfds`. It writes ArrayRecord, which
is read without TensorFlow; `file_format="tfrecord"` (`--tfrecord`) is for who reads with `tf.data`, and imports
TensorFlow.

TFDS reads what lies in the folder of a builder's module: this one has a folder of its own.
"""

import re
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from data.documents import Bad, BadFile, Reading
from data.files.find import find
from data.files.records import Limits, documents

TEXT = "text"
"""The one feature."""


class LooseJson(tfds.core.GeneratorBasedBuilder):
    """Documents of loose JSON lines, plain text or parquet: one feature, `text`, and one split, `train`.

    TFDS orders documents by a hash of their place in the files, so that every slice of `train` is a random one.
    """

    def __init__(
        self,
        *,
        name: str,
        paths: str,
        version: str = "1.0.0",
        text_key: str = "text",
        cut_text_bytes: int = 16384,
        max_record_bytes: int = 32 * 2**20,
        file_format: str = "array_record",
        **rest: Any,
    ) -> None:
        """The fields are those of `TextFiles`; `rest` is TFDS's, such as `data_dir`. Raises: ValueError."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"name={name!r} must be small letters, digits and _, as TFDS has them; try my_corpus.")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise ValueError(f"version={version!r} must be three numbers; try 1.0.0.")
        self.name = name
        self.VERSION = tfds.core.Version(version)
        self._paths = paths
        self._limits = Limits(text_key=text_key, cut_text_bytes=cut_text_bytes, max_record_bytes=max_record_bytes)
        super().__init__(file_format=file_format, **rest)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({TEXT: tfds.features.Text()})
        description = f"Documents of {self._paths}."
        return tfds.core.DatasetInfo(builder=self, description=description, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Every document, by the number of its file and its own. Raises: ValueError that names a bad record."""

        def refuse(bad: Bad) -> None:
            raise ValueError(f"{bad} Mend it first.")

        for i, path in enumerate(find(self._paths).files):
            reading = Reading(path, refuse, lambda found: None)
            try:
                for j, (text,) in enumerate(documents(reading, self._limits)):
                    if text.strip():
                        yield f"{i}:{j}", {TEXT: text}
            except BadFile as error:
                refuse(error.bad)
