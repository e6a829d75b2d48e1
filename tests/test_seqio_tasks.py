"""Sources of ours as seqio Tasks, and a Task's metrics over a model's answers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import corpora
import numpy as np
import pytest
import seqio_project

from data import Blend, Phase, SentencePiece, SeqioTask, TextFiles, Weighted
from data.sources.seqio_task import metrics
from data.sources.seqio_task.metrics import Question

seqio = pytest.importorskip("seqio", reason="needs the seqio extra")


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    with seqio_project.entered() as folder:
        for name in "ab":
            source(name).prepare(lambda line: None)
        yield folder


def source(name: str, **fields) -> TextFiles:
    return TextFiles(
        paths=f"my_tasks/{name}_train.txt", cut_text_bytes=64, split="8,2", folder=f"ours_{name}", **fields
    )


@pytest.mark.parametrize("block", [1000, 1 << 18])
def test_a_registered_source_gives_its_documents(project: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.export import seqio_tasks

    monkeypatch.setattr(seqio_tasks, "BLOCK", block)
    task = seqio_tasks.register(f"ours_{block}", source("a"))
    corpus = source("a").load()
    for name, split in corpus.splits.items():
        found = [example["targets"] for example in task.get_dataset(split=name, shuffle=False).as_numpy_iterator()]
        assert np.array_equal(np.concatenate(found) - 1, split.tokens_N)  # byte 0 is a token, seqio's 0 is padding
        assert [len(tokens) for tokens in found] == split.lengths_S.tolist()
        assert task.num_input_examples(name) == split.documents
    vocabulary = task.output_features["targets"].vocabulary
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id) == (258, 257, 0)
    assert (
        vocabulary.decode(vocabulary.encode("héron"))
        == "héron"
        == vocabulary.decode([0, *vocabulary.encode("héron"), 257])
    )


def test_seqios_own_packing_loses_no_token(project: Path) -> None:
    from data.export import seqio_tasks

    seqio_tasks.register("packed", source("b"))
    converter = seqio.LMFeatureConverter(pack=True)
    rows = list(seqio.get_dataset("packed", {"targets": 512}, converter, "train", shuffle=False).as_numpy_iterator())
    tokens = np.concatenate([row["decoder_target_tokens"] for row in rows])
    stream = source("b").load().splits["train"].tokens_N
    assert np.array_equal(np.sort(tokens[tokens > 0]), np.sort(stream.astype(np.int32) + 1))


def test_a_vocabulary_with_a_padding_id_is_not_shifted(project: Path) -> None:
    from data.export import seqio_tasks

    learned = TextFiles(
        paths="my_tasks/a_train.txt",
        cut_text_bytes=64,
        split="1,0",
        tokenizer=SentencePiece(vocab_size=295),
        folder="sp",
    )
    learned.prepare(lambda line: None)
    task = seqio_tasks.register("pieces", learned)
    (*_, last) = task.get_dataset(split="train", shuffle=False).as_numpy_iterator()
    assert last["targets"][-1] == 1 == task.output_features["targets"].vocabulary.eos_id
    with pytest.raises(NotImplementedError, match="this tokenizer is not in TensorFlow"):
        task.output_features["targets"].vocabulary.encode_tf("text")


def test_a_blend_is_a_mixture(project: Path) -> None:
    from data.export import seqio_tasks

    parts = tuple(Weighted(name=name, data=source(name), weight=weight) for name, weight in (("a", 3.0), ("b", 1.0)))
    mixture = seqio_tasks.register_blend("blend", Blend(sources=parts))
    assert {task.name: mixture.get_rate(task) for task in mixture.tasks} == {"blend.a": 3.0, "blend.b": 1.0}
    assert next(mixture.get_dataset(split="train", shuffle=False).as_numpy_iterator())["targets"][-1] == 257
    for more in ({"phases": (Phase(start_sample=9, weights=(1, 1)),)}, {"temperature": 2.0}):
        with pytest.raises(ValueError, match=f"a seqio Mixture has no {next(iter(more))}"):
            seqio_tasks.register_blend("other", Blend(sources=parts, **more))
    with pytest.raises(ValueError, match="has no shards in nowhere"):
        seqio_tasks.register("unprepared", TextFiles(paths="my_tasks/a_train.txt", folder="nowhere"))


def test_text_in_memory_is_read_too(project: Path) -> None:
    from data.export import seqio_tasks

    split = corpora.split([[b"one"], [b"two"], [b""]])
    found = list(seqio_tasks._documents(split, corpora.E).as_numpy_iterator())
    assert [tokens.tolist() for tokens in found] == [[*b"one", 256], [*b"two", 256], [256]]
    with pytest.raises(ValueError, match="several shards end to end cannot be registered"):
        seqio_tasks._blocks(range(3))


# Metrics


ANSWERS = {"one": "EINS", "two": "zwo", "three": "drei"}


def text(tokens: np.ndarray) -> str:
    return bytes((tokens - 3).tolist()).decode()


def answered(questions: Sequence[Question]) -> list[list[int]]:
    return [[byte + 3 for byte in ANSWERS[text(question.inputs)].encode()] for question in questions]


def test_metrics_of_a_task_over_answers(project: Path) -> None:
    asked: list[tuple[str, str]] = []

    def scored(questions: Sequence[Question]) -> list[float]:
        asked.extend((text(inputs), text(targets)) for inputs, targets in questions)
        return [-1.0, -2.0, -6.0][: len(questions)]

    config = SeqioTask(module="my_tasks.toys", mixture="asked")
    found = metrics.evaluate(config, generate=answered, score=scored)
    assert asked == [("one", "Eins"), ("two", "zwei"), ("three", "drei")]
    assert found == {"asked": {"exact": pytest.approx(2 / 3), "mean_score": -3.0}}  # the Task lowers letters
    found = metrics.evaluate(config, generate=answered, score=scored, split="train", most=1)
    assert found == {"asked": {"exact": 1.0, "mean_score": -1.0}}
    with pytest.raises(ValueError, match="the metrics of asked need scores, and nothing here gives them"):
        metrics.evaluate(config, generate=answered)
    with pytest.raises(ValueError, match="none of a has the split validation and metric functions"):
        metrics.evaluate(SeqioTask(module="my_tasks.toys", mixture="a"))
