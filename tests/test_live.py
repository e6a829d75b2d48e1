"""Tasks read live in the training process: the same stream as shards, its state, and what it cannot do."""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import runs
import seqio_project
from seqio_project import task

from data import BestFit, Completion, Curriculum, FillInTheMiddle, Live, LiveLoader, LiveText
from data.batches.curriculum import FixedLinear
from data.batches.packing import pack, window_count
from mtx.errors import ConfigError, Stopped

pytest.importorskip("seqio", reason="needs the seqio extra")

ROOT = Path(__file__).resolve().parent.parent
T, B = 16, 4


@pytest.fixture(scope="module")
def project() -> Iterator[Path]:
    with seqio_project.entered() as folder:
        yield folder


@functools.cache
def text(name: str, reader: Live) -> LiveText:
    found = task(name, reader=reader).load()
    assert isinstance(found, LiveText)
    return found


def loader(name: str, reader: Live = Live(), **fields) -> LiveLoader:
    usual = {"corpus": text(name, reader), "sequence_length": T, "global_size": B, "seed": 3}
    return LiveLoader(**usual | fields).check()


def batches(rows: LiveLoader, first: int, count: int) -> np.ndarray:
    """Tokens [batches, B, T]."""
    return np.stack([rows.train(np.arange(n * B, n * B + B))["tokens"] for n in range(first, first + count)])


def stream(project: Path, name: str) -> np.ndarray:
    """The tokens of a Task's training text, as a user would write them."""
    lines = seqio_project.texts(project, f"{name}_train")
    return np.concatenate([[*(byte + 3 for byte in line.encode()), 1] for line in lines])


# The stream


def test_unshuffled_it_is_the_stream_of_the_shards(project: Path) -> None:
    """The same rows as a loader of shards has in order, epoch by epoch."""
    config = task("b", folder="b")
    config.prepare(lambda line: None)
    tokens_N = config.load().parts[""].splits["train"].tokens_N
    assert np.array_equal(tokens_N, stream(project, "b"))
    windows = window_count(len(tokens_N), T)
    twice_N = np.concatenate([tokens_N, tokens_N])
    rows = loader("b", Live(shuffle=False), global_size=windows + 5).train(np.arange(windows + 5))
    cuts = [(twice_N[w * T : w * T + T + 1].astype(np.int32), T) for w in range(windows + 5)]
    wanted = pack(cuts, end_of_document=1, isolate_documents=True)
    assert rows.keys() == wanted.keys()
    assert all(np.array_equal(rows[name], wanted[name]) for name in wanted)


def test_shuffled_it_has_documents_in_an_order_of_the_seed(project: Path) -> None:
    length = len(stream(project, "b"))

    def lines(seed: int) -> list[str]:
        rows = loader("b", seed=seed, sequence_length=length, global_size=1)
        return rows.corpus.tokenizer.decode(rows.train([0])["tokens"][0].tolist()).split("\n")[:-1]

    one, again, other, wanted = lines(1), lines(1), lines(2), seqio_project.texts(project, "b_train")
    assert one == again and one != other and one != wanted
    assert set(one) | set(other) <= set(wanted)  # seqio repeats before it shuffles, so that epochs mix


def test_rates_of_what_is_read_live_are_of_examples(project: Path) -> None:
    rows = loader("three_to_one", sequence_length=256, global_size=400)
    text = rows.corpus.tokenizer.decode(rows.train(np.arange(400))["tokens"].reshape(-1).tolist())
    counts = [text.count(f"{name}_train") for name in "ab"]
    assert sum(counts) > 800 and counts[0] / sum(counts) == pytest.approx(0.75, abs=0.06)


def test_id_0_is_trained_on(project: Path) -> None:
    rows = loader("numbers", Live(shuffle=False), sequence_length=10, global_size=1).train([0])
    assert rows["tokens"][0].tolist() == [0, 7, 0, 12, 999, 0, 0, 5, 999, 0]
    assert rows["weights"][0].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert rows["segments"][0].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_other_objectives_have_the_random_numbers_of_their_samples(project: Path) -> None:
    fim = FillInTheMiddle(rate=1.0)
    one, again = (loader("b", Live(shuffle=False), objective=fim).train(np.arange(B)) for _ in range(2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert (one["tokens"] >= 269).any()  # special tokens behind the vocabulary


def test_what_is_held_out_is_in_memory(project: Path) -> None:
    rows = loader("nested")
    (split,) = [split for _, split in rows.held_out("validation").values()]
    tokens_N, ours = split.tokens_N, rows.corpus.tokenizer
    wanted = [line for name in ("a", "b", "b") for line in seqio_project.texts(project, f"{name}_validation")]
    assert ours.decode(tokens_N[:-1].tolist()).split("\n") == wanted
    assert split.documents == len(wanted) and split.bytes == sum(len(line.encode()) for line in wanted)
    few = loader("nested", Live(validation_tokens=600)).corpus.parts[""].splits["validation"]
    assert 0 < len(few.tokens_N) <= 600


def test_two_readers_share_the_examples(project: Path) -> None:
    parts = []
    for shard in range(2):
        rows = loader("b", Live(shuffle=False), global_size=2 * B)
        rows.open(shard, 2)
        own = np.arange(B) + shard * B
        tokens = np.concatenate([rows.train(own + n * 2 * B)["tokens"].reshape(-1) for n in range(40)])
        parts.append(set(rows.corpus.tokenizer.decode(tokens.tolist()).split("\n")[1:-1]))
    assert parts[0] | parts[1] == set(seqio_project.texts(project, "b_train")) and not parts[0] & parts[1]


# Its state


@pytest.mark.parametrize("name", ["three_to_one", pytest.param("nested", marks=pytest.mark.slow)])
def test_it_goes_on_where_it_was_saved_whatever_was_read_ahead(project: Path, tmp_path: Path, name: str) -> None:
    whole = batches(loader(name), 0, 12)
    for done, read in ((0, 1), (5, 5), (5, 6)):
        rows = loader(name)
        batches(rows, 0, read)
        (folder := tmp_path / f"{done}_{read}").mkdir()
        rows.save(folder, done * B)
        assert np.array_equal(batches(rows, read, 2), whole[read : read + 2])  # saving changes nothing
        again = loader(name)
        again.restore(folder, done * B)
        assert np.array_equal(batches(again, done, 12 - done), whole[done:])


def test_it_goes_on_in_another_process(project: Path, tmp_path: Path) -> None:
    rows = loader("nested")
    batches(rows, 0, 8)
    rows.save(tmp_path, 7 * B)
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(project)!r}]
from pathlib import Path
import numpy as np
from data import *
text = SeqioTask(module="my_tasks.toys", mixture="nested", reader=Live()).load()
rows = LiveLoader(corpus=text, sequence_length={T}, global_size={B}, seed=3).check()
rows.restore(Path({str(tmp_path)!r}), {7 * B})
found = [rows.train(np.arange(n * {B}, n * {B} + {B}))["tokens"] for n in range(7, 12)]
np.save({str(tmp_path / "found.npy")!r}, np.stack(found))
"""
    child = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert np.array_equal(np.load(tmp_path / "found.npy"), batches(loader("nested"), 0, 12)[7:])


def test_state_of_another_stream_is_refused(project: Path, tmp_path: Path) -> None:
    rows = loader("b")
    batches(rows, 0, 1)
    rows.save(tmp_path, B)
    other = loader("b")
    other.open(0, 2)
    with pytest.raises(ValueError, match=r"state of this checkpoint is of 1, this run has 2\. Go on with as many as"):
        other.restore(tmp_path, B)
    with pytest.raises(ValueError, match="the state of this checkpoint is not in"):
        loader("b").restore(tmp_path / "nowhere", B)
    for wrong, what in (
        (loader("a"), "digest"),
        (loader("b", Live(shuffle=False)), "digest"),
        (loader("b", seed=4), "seed"),
    ):
        with pytest.raises(ValueError, match=rf"is the state of another stream \({what} "):
            wrong.restore(tmp_path, B)
    with pytest.raises(ValueError, match=r"is the state of another stream \(samples 4, not 8\)"):
        loader("b").restore(tmp_path, 2 * B)
    assert json.loads((tmp_path / "seqio-0-of-1.json").read_text())["samples"] == B


# What it cannot do


def test_it_only_goes_forward(project: Path) -> None:
    rows = loader("b")
    first = rows.train(np.arange(B))["tokens"]
    assert np.array_equal(rows.train([2, 0])["tokens"], first[[2, 0]])  # the last batch again
    rows.train(np.arange(B, 2 * B))
    for numbers in ([0, 1, 2, 3], [12, 13, 14, 15], [6, 7, 8, 9]):
        with pytest.raises(ValueError, match=r"only goes forward: the next it has are 8 to 11\. .* data\.reader=None"):
            rows.train(numbers)
    with pytest.raises(ValueError, match=r"trains on 2 of 4 rows, and reads part 1 of 1 of the stream"):
        rows.train([8, 9])
    with pytest.raises(ValueError, match="a live reader does not know where sample 3 came from"):
        rows.origin(3)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"objective": Completion()}, "objective=Completion"),
        ({"packing": BestFit()}, "packing=BestFit"),
        ({"curriculum": Curriculum(pacing=FixedLinear(first=1, last=9, steps=3))}, "curriculum=Curriculum"),
        ({"seed": -1}, "seed=-1"),
        ({"sequence_length": 0}, "batch.sequence_length=0"),
    ],
)
def test_what_needs_all_rows_is_refused(project: Path, fields: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        loader("b", **fields)


def test_python_in_a_graph_is_refused_before_anything_hangs(project: Path) -> None:
    ((field, why),) = task("sleeps", reader=Live()).check()
    assert field == "reader" and why.startswith("cannot be Live: sleeps has Python in its graph (PyFunc)")


def test_a_sample_fn_of_its_own_is_seqios_affair(project: Path) -> None:
    text = loader("own_order", Live(shuffle=False), global_size=40).train(np.arange(40))["tokens"].reshape(-1)
    assert np.array_equal(text, stream(project, "a")[: len(text)])


def test_a_live_reader_needs_no_preparation(project: Path) -> None:
    lines: list[str] = []
    config = task("b", reader=Live())
    assert config.is_prepared()
    config.prepare(lines.append)
    assert lines == ["data.mixture=b of my_tasks.toys is read live, and needs no preparation"]


# Runs


WORDS = ["data=SeqioTask", "data.module=my_tasks.toys", "data.mixture=three_to_one", "data.reader=Live"]
WORDS += ["model.vocab_size=269", "checkpoints.every_steps=20", "log_every=1", "batch.global_size=8"]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.train(whole, *WORDS, "steps=40")
    child = runs.begin(stopped, *WORDS, "steps=40")
    runs.at_step(stopped, child, 5)
    runs.stop(child, signal.SIGTERM)
    runs.end(child, Stopped.exit_code)
    assert "resumed     step" in runs.train(stopped, *WORDS, "steps=40")
    assert runs.rows(whole) == runs.rows(stopped)
    assert runs.digests(whole, 40) == runs.digests(stopped, 40)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_read_half_each_and_go_on_as_two_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(project))
    words = [*WORDS, "mesh.data=2", "eval_every=0", "batch.micro_size=None"]
    children = runs.begin_together(tmp_path, 2, *words, "steps=6", devices=2)
    for child in children:
        runs.end(child)
    states = sorted(path.name for path in (tmp_path / "checkpoints/6/data").glob("*.json"))
    assert states == ["seqio-0-of-2.json", "seqio-1-of-2.json"]
    output = runs.train(tmp_path, *words, "steps=8", "--devices", "2", code=ConfigError.exit_code)
    assert (
        "the state of this checkpoint is of 2, this run has 1. Go on with as many as before, or compile the" in output
    )
