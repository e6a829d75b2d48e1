"""TFDS datasets by name and split: their texts in shards, and what is refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data import Bpe, Corpus, Skip, TfdsText
from data.documents import Part, Reading
from data.export.loose_json import LooseJson

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = 200


class Reviews(tfds.core.GeneratorBasedBuilder):
    """A dataset as others write them: two splits, two texts, and what is none, or lies deeper."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "review": tfds.features.Text(),
            "title": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["good", "bad"]),
            "numbers": tfds.features.Sequence({"name": tfds.features.Text(), "number": np.int32}),
            "more": {"text": tfds.features.Text()},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train", 40), "test": self._generate_examples("test", 10)}

    def _generate_examples(self, split: str, count: int):
        for i in range(count):
            more = {"numbers": [{"name": "one", "number": 1}] * 3, "more": {"text": "inner"}}
            yield i, {"review": f"{split} review {i}", "title": f"title {i}", "label": i % 2} | more


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where datasets lie, and Python works."""
    folder = tmp_path_factory.mktemp("place")
    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.jsonl").write_text("".join(f'{{"text": "document {i} héron"}}\n' for i in range(DOCUMENTS)))
        LooseJson(name="toy", paths="text.jsonl", data_dir="tfds").download_and_prepare()
        yield folder


def toy(**fields) -> TfdsText:
    return TfdsText(**{"name": "toy", "data_dir": "tfds"} | fields)


THIRDS = {"split": "train[:80%]", "validation": "train[80%:95%]", "test": "train[95%:]"}


def texts(config: TfdsText, split: str = "train") -> list[str]:
    """A split's documents, out of its shards."""
    corpus = config.load()
    assert isinstance(corpus, Corpus)
    tokens, tokenizer = corpus.splits[split].tokens_N, corpus.tokenizer
    return tokenizer.decode(tokens.tolist()).split("\n")[:-1]


def test_slices_become_splits_in_the_order_of_the_dataset(place: Path) -> None:
    config = toy(**THIRDS)
    assert list(config.check()) == []
    config.prepare(lambda line: None)
    source: Any = tfds.builder("toy", data_dir="tfds").as_data_source(split="train")
    whole = [example["text"].decode() for example in source]
    assert [texts(config, name) for name in ("train", "validation", "test")] == [
        whole[:160],
        whole[160:190],
        whole[190:],
    ]
    assert config.load().splits["test"].bytes == sum(len(text.encode()) for text in whole[190:])


def test_a_tokenizer_is_learned_from_the_training_split_alone(place: Path) -> None:
    config = toy(**THIRDS, tokenizer=Bpe(vocab_size=280))
    config.prepare(lambda line: None)
    assert texts(config) == texts(_prepared(toy(**THIRDS)))


def _prepared(config: TfdsText) -> TfdsText:
    config.prepare(lambda line: None)
    return config


def test_large_datasets_are_read_in_parts(place: Path) -> None:
    """By rows, so that several processes can read them, and the rows do not depend on how many do."""
    config = toy(**THIRDS)
    part = config.parts()[0]
    reading = Reading(part.name, lambda bad: None, lambda found: None)
    slices = config.slices(part, part.bytes // 6, reading)
    assert len(slices) == 7 and (slices[0].start, slices[-1].stop) == (0, 160)
    assert [piece.start for piece in slices[1:]] == [piece.stop for piece in slices[:-1]]
    read = [document[0] for piece in slices for document in config.read(piece, reading)]
    assert [text.decode() for text in read] == texts(_prepared(config))


def test_training_from_it_imports_neither_tensorflow_nor_tfds_and_preparing_no_tensorflow(place: Path) -> None:
    Reviews(data_dir="tfds", file_format="array_record").download_and_prepare()
    config = _prepared(toy(**THIRDS))
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from data import *
from data.prepare.source import Fail
config = {config!r}
assert list(config.check()) == []
loader = Loader(corpus=config.load(), sequence_length=16, global_size=4).check()
assert loader.train(np.arange(4))["tokens"].shape == (4, 16)
assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & sys.modules.keys()
TfdsText(name="reviews", data_dir="tfds", text_key="review", folder="alone").prepare(print)
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=place, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_only_the_text_of_other_peoples_datasets_is_read(place: Path) -> None:
    Reviews(data_dir="tfds", file_format="array_record").download_and_prepare()
    config = TfdsText(name="reviews", data_dir="tfds", split="train", validation="test", text_key="review")
    assert list(config.check()) == []
    config.prepare(lambda line: None)
    assert sorted(texts(config)) == sorted(f"train review {i}" for i in range(40))
    assert sorted(texts(config, "validation")) == sorted(f"test review {i}" for i in range(10))
    assert config.recipe()["name"] == "reviews"


@pytest.mark.parametrize(
    ("fields", "field", "why"),
    [
        (
            {"name": "toys"},
            "name",
            "is no dataset in tfds; did you mean toy? If TFDS knows it, data.download=true fetches",
        ),
        ({"name": "toy:3.0.0"}, "name", "is no dataset in tfds; did you mean toy:1.0.0?"),
        ({"name": "zebra"}, "name", "is no dataset in tfds; there is "),
        ({"data_dir": "tfsd"}, "data_dir", "is no folder; name the one that TFDS keeps datasets in"),
        ({"split": "trian[:50%]"}, "split", "is no split or slice of toy/1.0.0; did you mean train[:50%]?"),
        ({"split": "test"}, "split", "is no split or slice of toy/1.0.0; splits are train; try train[:90%]"),
        ({"split": "train[:50]%"}, "split", "is no split or slice of toy/1.0.0; splits are train; try train[:90%]"),
        (
            {"validation": "train[:5%]"},
            "validation",
            "has 10 examples in common with data.split=train, so that what is",
        ),
        (
            {"split": "train[:50%]", "test": "train[49%:]"},
            "test",
            "has 2 examples in common with data.split=train[:50%]",
        ),
        ({"split": "train[5:5]"}, "split", "holds no example; train have 200"),
        (
            {"text_key": "txt"},
            "text_key",
            "must be a feature of toy/1.0.0 that holds a text, and is not there; did you m",
        ),
        ({"silence_s": 0}, "silence_s", "must be positive"),
    ],
)
def test_mistakes_are_named(place: Path, fields: dict, field: str, why: str) -> None:
    ((found, said),) = toy(**fields).check()
    assert found == field and why in said


def test_a_feature_that_is_no_text_is_refused(place: Path) -> None:
    Reviews(data_dir="tfds", file_format="array_record").download_and_prepare()
    ((field, why),) = TfdsText(name="reviews", data_dir="tfds", text_key="label").check()
    assert field == "text_key" and why.endswith("and is not one; those are review, title")


def test_bad_texts_are_counted_or_refused(place: Path) -> None:
    builder = LooseJson(name="bad", paths="text.jsonl", data_dir="tfds")

    def examples() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield from [
            ("a", {"text": b"good"}),
            ("b", {"text": b"\xff"}),
            ("c", {"text": b"nul \0"}),
            ("d", {"text": b" "}),
        ]

    builder._generate_examples = examples
    builder.download_and_prepare()
    config = TfdsText(name="bad", data_dir="tfds", bad_records=Skip(budget=2))
    config.prepare(lambda line: None)
    assert texts(config) == ["good"]
    (source,) = config.manifest().sources
    assert (source.empty, source.bad) == (1, {"NUL": 1, "not UTF-8": 1})
    with pytest.raises(ValueError, match=r"tfds/bad/1\.0\.0#train, example \d: (is not UTF-8|holds a NUL) at byte"):
        TfdsText(name="bad", data_dir="tfds").prepare(lambda line: None)


def test_a_dataset_that_changed_is_noticed_and_one_that_is_gone_is_not_missed(place: Path) -> None:
    LooseJson(name="moving", paths="text.jsonl", data_dir="tfds").download_and_prepare()
    config = _prepared(TfdsText(name="moving", data_dir="tfds"))
    info = place / "tfds/moving/1.0.0/dataset_info.json"
    os.utime(info, (1, 1))
    with pytest.raises(ValueError, match=r"tfds/moving/1\.0\.0#train has changed since the text was prepared"):
        config.load()
    Path("tfds/moving").rename("tfds/elsewhere")
    assert len(texts(config)) == DOCUMENTS


def test_parts_have_names_that_say_where_they_are(place: Path) -> None:
    names = [part.name for part in toy(**THIRDS).parts()]
    assert names == [f"tfds/toy/1.0.0#{said}" for said in THIRDS.values()]
    assert {type(part) for part in toy().parts()} == {Part}


@pytest.mark.slow
def test_tfrecord_is_read_in_a_process_with_tensorflow(place: Path) -> None:
    """The same documents in the same order; this process imports no TensorFlow."""
    words = ["text.jsonl", "--name", "records", "--data-dir", "tfds", "--tfrecord"]
    subprocess.run(
        [sys.executable, "-m", "data.export.loose_json", *words], check=True, capture_output=True, env=_env()
    )
    config = _prepared(TfdsText(name="records", data_dir="tfds", **THIRDS))
    other = _prepared(toy(**THIRDS))
    assert [texts(config, name) for name in ("train", "validation", "test")] == [
        texts(other, name) for name in ("train", "validation", "test")
    ]
    assert config.load().digest == other.load().digest


def _env() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_what_tfds_cannot_fetch_is_said(place: Path) -> None:
    config = TfdsText(name="toyy", data_dir="tfds", download=True)
    assert list(config.check()) == []
    with pytest.raises(ValueError, match=r"data\.name=toyy: TFDS cannot fetch it: DatasetNotFoundError"):
        config.prepare(lambda line: None)
