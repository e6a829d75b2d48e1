"""A user's seqio module as a source: compiled to shards, its vocabularies, and what goes wrong in it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio_project
from seqio_project import task

from data import Blend, Blended, Loader, SentencePiece, SeqioTask, Weighted, sources_of
from data.sources.seqio_task import inside, vocabulary
from data.tensorflow_process import Wrong
from data.tokenizer import SentencePieceTokenizer, Tokenizer

pytest.importorskip("seqio", reason="needs the seqio extra")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    with seqio_project.entered() as folder:
        yield folder


def said(name: str, module: str = "my_tasks.toys", **splits: str) -> dict:
    """What a process with TensorFlow says of a Task, here in this one."""
    fields = {"sequence_length": None, "use_cached": False, "seed": 0, "feature": "targets"}
    recipe = {"module": module, "mixture": name} | {k: splits.pop(k, v) for k, v in fields.items()}
    (found,) = inside.describe(recipe=recipe, splits={"split": "train"} | splits, live=False)
    return found


# Compiled


@pytest.fixture(scope="module")
def mixture(project: Path) -> SeqioTask:
    lines: list[str] = []
    config = task("nested", folder="nested")
    assert list(config.check()) == []
    config.prepare(lines.append)
    assert any("held is left out" in line for line in lines)
    return config


def test_a_mixture_becomes_a_set_of_shards_for_each_task(mixture: SeqioTask, project: Path) -> None:
    text = mixture.load()
    assert isinstance(text, Blended) and list(text.parts) == ["a", "b", "trained"]
    ours = text.tokenizer
    for name, file in (("a", "a_train"), ("b", "b_train"), ("trained", "b_train")):
        tokens = text.parts[name].splits["train"].tokens_N
        documents = np.split(tokens, np.flatnonzero(tokens == 1) + 1)
        assert not len(documents.pop())  # one end behind each, whether or not the Task appends it
        assert [ours.decode(document[:-1]) for document in documents] == seqio_project.texts(project, file)
        assert text.parts[name].splits["train"].bytes == sum(
            len(line.encode()) for line in seqio_project.texts(project, file)
        )
    assert sorted(text.parts["a"].splits) == ["train", "validation"] and list(text.parts["trained"].splits) == ["train"]


def test_rates_become_weights_of_windows(mixture: SeqioTask) -> None:
    text = mixture.load()
    loader = Loader(corpus=text, sequence_length=16, global_size=4).check()
    assert np.allclose(
        loader.blend.weights[0], [0.5, 1 / 6, 1 / 3]
    )  # 2/3 of (3, 1) and 1/3, after seqio leaves one out
    assert loader.blend.counts(600).tolist() == [300, 100, 200]


def test_training_from_compiled_tasks_imports_nothing_of_tensorflow(mixture: SeqioTask, project: Path) -> None:
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(project)!r}]
import numpy as np
from data import *
from data.prepare.source import Fail
config = {mixture!r}
assert list(config.check()) == [] and config.vocab_size == 269
loader = Loader(corpus=config.load(), sequence_length=16, global_size=4).check()
assert loader.train(np.arange(64))["tokens"].shape == (64, 16)
print(loader.corpus.tokenizer.decode([102, 100, 119]))
assert not {{"tensorflow", "seqio", "tensorflow_datasets", "my_tasks"}} & sys.modules.keys()
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "cat\n"), child.stderr


def test_a_changed_module_makes_shards_old(mixture: SeqioTask, project: Path) -> None:
    config = mixture.tasks()["a"]
    config.load()
    other = project / "my_tasks" / "helpers.py"
    other.write_text("MORE = 1\n")
    try:
        with pytest.raises(ValueError, match=r"a train has changed since .* run the same command with the verb prep"):
            config.load()
    finally:
        other.unlink()
    config.load()


def test_what_is_compiled_under_other_settings_is_another_folder(project: Path) -> None:
    folders = [
        each.prepared_folder()
        for each in (
            task("a"),
            task("b"),
            task("a", split="validation", validation=None),
            task("a", seed=1),
            task("a", sequence_length=8),
            task("a", feature="inputs"),
        )
    ]
    assert len(set(folders)) == 6
    assert task("a", silence_s=1.0).prepared_folder() == folders[0]


# Tokens of a Task, in this process


def documents(name: str, split: str = "train", **fields) -> list[tuple[int, np.ndarray]]:
    found = inside.documents(recipe=task(name, **fields).recipe_of(name).plain(), split=split)
    assert next(found) == {"ready": name}
    return [(int(item[0]), item[1:]) for item in found]


def test_id_0_is_an_id(project: Path) -> None:
    assert [tokens.tolist() for _, tokens in documents("numbers")] == [[0, 7, 0, 12], [0, 0, 5], [0]]


def test_nothing_is_cut_but_by_preprocessors_that_are_told_to(project: Path) -> None:
    longest = max(len(line.encode()) for line in seqio_project.texts(project, "a_train"))
    assert max(len(tokens) for _, tokens in documents("a", sequence_length=4)) == longest > 4
    assert {len(tokens) for _, tokens in documents("short", sequence_length=4)} == {4}


def test_random_preprocessors_draw_by_the_seed(project: Path) -> None:
    once, again, other = ([tokens.tolist() for _, tokens in documents("chosen", seed=s)] for s in (1, 1, 2))
    assert once == again != other


def test_tokens_outside_the_vocabulary_are_told(project: Path) -> None:
    path = project / "my_tasks" / "numbers_train.txt"
    content = path.read_text()
    path.write_text(content + "5 1000\n-3\n")
    try:
        assert [size for size, _ in documents("numbers")] == [4, 3, 1, -1, -1]
    finally:
        path.write_text(content)


# What a user gets wrong


@pytest.mark.parametrize(
    ("name", "more", "field", "why"),
    [
        (
            "three_to_on",
            {},
            "mixture",
            "is no Task or Mixture once my_tasks.toys is imported; did you mean three_to_one?",
        ),
        ("a", {"module": "my_tasks.toy"}, "module", "there is no my_tasks.toy; did you mean my_tasks.toys?"),
        ("a", {"module": "my_task.toys"}, "module", "there is no my_task; did you mean my_tasks?"),
        ("a", {"module": "my_tasks.broken"}, "module", "cannot be imported: NameError: name 'nothing' is not defined"),
        ("a", {"module": "my_tasks.lacks"}, "module", "cannot be imported: No module named 'nobody_has_this'"),
        ("a", {"feature": "target"}, "feature", "is no output feature of a; it has targets"),
        ("a", {"split": "trian"}, "split", "is no split of a; try train, validation"),
        ("a", {"test": "test"}, "test", "is no split of a; try train, validation, or data.test=None"),
        ("short", {}, "sequence_length", "must be said: the preprocessor shorter of short asks for it"),
        (
            "letters",
            {},
            "feature",
            "of letters has the vocabulary seqio.vocabularies.FullCodepointVocabulary, which tr",
        ),
        ("endless", {}, "feature", r"of endless has a vocabulary without an end \(eos_id\)"),
        ("unsized", {}, "mixture", "has a rate that cannot be evaluated: TypeError"),
        ("mixed_up", {}, "mixture", "has different vocabularies in a and numbers"),
        (
            "own_order",
            {},
            "mixture",
            "mixes by a sample_fn of its own, which shards cannot follow; try data.reader=Live",
        ),
    ],
)
def test_mistakes_are_named(project: Path, name: str, more: dict, field: str, why: str) -> None:
    with pytest.raises(Wrong, match=why) as caught:
        said(name, **more)
    assert caught.value.args[0] == field


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"module": "my tasks"}, "module"),
        ({"mixture": ""}, "mixture"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"silence_s": 0}, "silence_s"),
        ({"seed": -1}, "seed"),
        ({"validation": "train"}, "validation"),
    ],
)
def test_wrong_fields_are_found_without_importing_anything(fields: dict, wrong: str) -> None:
    config = SeqioTask(**{"module": "never.imported", "mixture": "a"} | fields)
    assert [field for field, _ in config.check()] == [wrong]


def test_rates_are_evaluated_as_seqio_does(project: Path) -> None:
    sizes = [len((project / "my_tasks" / f"{name}_train.txt").read_text()) for name in "ab"]
    assert np.allclose([each["rate"] for each in said("sized")["tasks"]], np.array(sizes) / sum(sizes))


def test_python_in_a_graph_is_said(project: Path) -> None:
    assert said("sleeps")["remarks"] == ["sleeps: has Python in its graph (PyFunc), which is slow and may hang"]
    assert said("asked")["remarks"] == ["asked: only targets is read, not inputs"]


@pytest.mark.slow
def test_a_task_that_hangs_is_killed(project: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing came for 3 s, and the process was killed\. TensorFlow hangs so"):
        task("sleeps", silence_s=3.0, folder="sleeps").prepare(lambda line: None)


@pytest.mark.slow
def test_a_mixture_whose_rates_changed_is_compiled_again(project: Path) -> None:
    path = project / "rated.py"

    def rated(rate: int) -> SeqioTask:
        path.write_text(
            "import seqio\nfrom my_tasks import toys\n"
            f"seqio.MixtureRegistry.add('rated', [('a', 1), ('b', {rate})])\nprint(toys)\n"
        )
        return SeqioTask(module="rated", mixture="rated", folder="rated")

    rated(1).prepare(lambda line: None)
    assert list(sources_of(rated(1))) == ["a", "b"]
    changed = rated(3)
    assert changed.is_prepared() and list(sources_of(changed)) == [""]
    with pytest.raises(ValueError, match=r"source a: a train has changed since the text was prepared"):
        changed.load()
    changed.prepare(lambda line: None)
    assert Loader(corpus=changed.load(), sequence_length=16).blend.weights == ((0.25, 0.75),)


def test_a_mixture_is_no_source_of_a_blend(mixture: SeqioTask) -> None:
    with pytest.raises(
        ValueError, match=r"source x: .* is no single text; a blend has its tasks, compiled, as sources"
    ):
        Blend(sources=(Weighted(name="x", data=mixture),)).load()
    blend = Blend(sources=tuple(Weighted(name=name, data=each) for name, each in mixture.tasks().items()))
    assert list(blend.load().parts) == ["a", "b", "trained"]


# Vocabularies


TEXTS = ["a héron and a zebra", "\U0001f999 of 12 cats", "  two  spaces\nand a line\t!", "", "<extra_id_0> </s> [SEP]"]
SAMPLE = "The zebra and the heron. A cat, two cats; 12 cats of 3 zebras! " * 30


def both(of_seqio) -> tuple[object, Tokenizer]:
    return of_seqio, vocabulary.read(vocabulary.describe(of_seqio))


def test_byte_vocabularies_are_the_same_here(project: Path) -> None:
    import seqio

    theirs, ours = both(seqio.ByteVocabulary(extra_ids=7))
    assert (ours.vocab_size, ours.end_of_document) == (theirs.vocab_size, theirs.eos_id) == (266, 1)
    for text in TEXTS:
        tokens = list(theirs.encode(text))
        assert ours.encode(text) == ours.encode_batch([text.encode()])[0].tolist() == tokens
        assert ours.decode(tokens) == theirs.decode(tokens) == text
    assert ours.decode([0, 2, 265, 102, 1, 100]) == "c\na"
    assert [ours.special(name) for name in ("sentinel_0", "sentinel_6", "sentinel_7", "pad", "mask")] == [
        *(265, 259, None, 0, None)
    ]


@pytest.mark.parametrize("extra_ids", [0, 5])
def test_sentencepiece_vocabularies_are_the_same_here(project: Path, tmp_path: Path, extra_ids: int) -> None:
    import seqio

    model = tmp_path / "toy.model"
    model.write_bytes(SentencePiece(vocab_size=288).learn([SAMPLE]))
    theirs, ours = both(seqio.SentencePieceVocabulary(str(model), extra_ids=extra_ids))
    assert isinstance(ours, SentencePieceTokenizer)
    assert (ours.vocab_size, ours.end_of_document) == (theirs.vocab_size, theirs.eos_id) == (288 + extra_ids, 1)
    for text in TEXTS:
        tokens = theirs.encode(text)
        assert ours.encode(text) == tokens == theirs.encode_tf(text).numpy().tolist()
        assert ours.decode(tokens) == theirs.decode(tokens)
    first = 288 + extra_ids - 1 if extra_ids else None
    assert [ours.special("sentinel_0"), ours.special("sentinel_5")] == [first, None]


def test_numbers_are_written_as_such() -> None:
    ours = vocabulary.SeqioNumbers(vocab_size=100, end_of_document=99)
    assert (
        ours.decode([0, 7, 99, 12]) == "0 7\n12" and ours.encode(" 0 7\n12") == [0, 7, 12] and ours.encode("\n") == []
    )
    for wrong in ("seven", "100", "-1"):
        with pytest.raises(ValueError, match="is no text of this vocabulary"):
            ours.encode(wrong)


@pytest.mark.parametrize("definition", [b"", b"[]", b"{}", b'{"kind": "CatVocabulary"}', b'{"kind": []}'])
def test_a_damaged_definition_is_named(definition: bytes) -> None:
    with pytest.raises(ValueError, match="is no definition of a seqio vocabulary"):
        vocabulary.read(definition)
