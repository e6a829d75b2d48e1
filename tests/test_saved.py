"""Run folders through the command line: resumed on another mesh, from an older step, with another config, or not."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import runs

from mtx.checkpoint import Store

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on one device, of which steps 9 and 12 are kept."""
    workdir = tmp_path_factory.mktemp("whole")
    runs.train(workdir, "--devices", "1")
    return workdir


@pytest.fixture
def nine(whole: Path, tmp_path: Path) -> Path:
    """The same run before its last three steps."""
    shutil.copytree(whole, tmp_path / "nine")
    for step in (tmp_path / "nine/checkpoints").glob("[0-9]*"):
        if step.name != "9":
            shutil.rmtree(step)
    return tmp_path / "nine"


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 8
    path.write_bytes(raw)


def losses(workdir: Path) -> list[float]:
    return [row[name] for row in runs.rows(workdir) for name in ("train/loss", "val/loss") if name in row]


@pytest.mark.parametrize(
    "words",
    [
        ["--devices", "8", "mesh.data=4", "mesh.model=2", "layout.zero=3", "layout.sequence_parallel=true"],
        pytest.param(
            ["--devices", "8", "mesh.replica=2", "mesh.data=2", "mesh.model=2", "layout.zero=1", "partition=Compiled"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["--devices", "2", "mesh.data=2", "layout.zero=2", "batch.micro_size=1"], marks=pytest.mark.slow),
    ],
    ids=["manual", "compiled", "accumulated"],
)
def test_goes_on_on_another_mesh(nine: Path, whole: Path, words: list[str]):
    said = runs.train(nine, *words)
    assert "resumed     step 9, 2,304 tokens (saved on one device)" in said
    assert losses(nine) == pytest.approx(losses(whole), rel=TOLERANCE)
    assert losses(nine)[:9] == losses(whole)[:9]


@pytest.mark.slow
def test_from_eight_devices_to_one_with_the_optimizer(tmp_path: Path, whole: Path):
    words = ["mesh.data=2", "mesh.model=4", "layout.zero=2"]
    child = runs.begin(tmp_path, "--devices", "8", *words)
    runs.at_step(tmp_path, child, 6)
    child.terminate()
    runs.end(child, 75)
    assert "saved on data=2 x model=4" in runs.train(tmp_path, "--devices", "1")
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=TOLERANCE)


PIPELINE = ["--devices", "8", "mesh.pipeline=4", "mesh.data=2", "model.layers=5", "batch.micro_size=1"]
PIPELINE += ["steps=6", "eval_every=0"]


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps on four stages of 2-1-1-1 layers; every array's digest is verified when another mesh reads it."""
    workdir = tmp_path_factory.mktemp("pipelined")
    runs.train(workdir, *PIPELINE)
    return workdir


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--devices", "1", "mesh.pipeline=1", "mesh.data=1"], marks=pytest.mark.slow),
        ["--devices", "8", "mesh.pipeline=2", "mesh.model=2", "pipeline=Interleaved", "layout.zero=3"],
        pytest.param(["--devices", "8", "mesh.pipeline=1", "mesh.data=8"], marks=pytest.mark.slow),
    ],
    ids=["one device", "interleaved", "data"],
)
def test_a_pipeline_s_checkpoint_goes_on_on_any_mesh(pipelined: Path, tmp_path: Path, words: list[str]):
    shutil.copytree(pipelined, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/6")
    replaced = {word.partition("=")[0] for word in words}
    said = runs.train(tmp_path / "copy", *(w for w in PIPELINE[2:] if w.partition("=")[0] not in replaced), *words)
    assert re.search(r"resumed     step 3, [\d,]+ tokens \(saved on pipeline=4 x data=2\)", said)
    assert losses(tmp_path / "copy") == pytest.approx(losses(pipelined), rel=TOLERANCE)
    assert losses(tmp_path / "copy")[:3] == losses(pipelined)[:3]
    names = Store(pipelined / "checkpoints").at(6).manifest.arrays
    assert {name: a.shape for name, a in Store(tmp_path / "copy/checkpoints").at(6).manifest.arrays.items()} == {
        name: a.shape for name, a in names.items()
    }
    assert names["params/stacks/main/block/mlp/in_DJF"].shape[0] == 5


def test_a_damaged_newest_step_falls_back_says_so_and_is_kept(nine: Path, whole: Path):
    shutil.copytree(whole / "checkpoints/12", nine / "checkpoints/12")
    flip(next((nine / "checkpoints/12").rglob("d/*")))
    (nine / "checkpoints/11").mkdir()
    said = runs.train(nine, "--devices", "1")
    assert "step 11 is skipped: the folder is empty" in said
    assert "step 12 is skipped: " in said
    assert "its SHA-256 differs" in said
    assert "resumed     step 9," in said
    assert (nine / "checkpoints/damaged/12-1/manifest.json").exists()
    assert runs.digests(nine) == runs.digests(whole)
    assert runs.rows(nine) == runs.rows(whole)


def test_if_none_verifies_it_stops_and_only_fresh_starts_anew(nine: Path):
    flip(nine / "checkpoints/9/manifest.json")
    before = (nine / "metrics.jsonl").read_bytes()
    said = runs.train(nine, "--devices", "1", code=66)
    assert "none verifies (step 9: manifest.json is damaged" in said
    assert "--fresh" in said
    assert (nine / "metrics.jsonl").read_bytes() == before
    said = runs.train(nine, "--devices", "1", "--fresh", "steps=2")
    assert "resumed" not in said
    assert (nine / "earlier/1/metrics.jsonl").read_bytes() == before
    assert (nine / "earlier/1/checkpoints/9/manifest.json").exists()
    assert [row["step"] for row in runs.rows(nine)] == [1, 2, 2]


@pytest.mark.slow
def test_a_run_without_checkpoints_moves_aside(tmp_path: Path):
    for _ in range(2):
        runs.train(tmp_path, "--devices", "1", "checkpoints=None", "steps=2")
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2, 2]
    assert [row["step"] for row in runs.rows(tmp_path / "earlier/1")] == [1, 2, 2]
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_at_its_end_does_nothing_more(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "done")
    assert "has come to its end before" in runs.train(tmp_path / "done", "--devices", "1")
    assert runs.rows(tmp_path / "done") == runs.rows(whole)


# Another config


def test_a_change_is_printed_and_goes_on(nine: Path):
    said = runs.train(nine, "--devices", "1", "optimizer.schedule.peak_lr=1e-4", "model.remat=full", "steps=10")
    assert "changed     optimizer.schedule.peak_lr: 0.004 -> 0.0001" in said
    assert "changed     model.remat: none -> full" in said
    assert "resumed     step 9" in said


@pytest.mark.parametrize(
    "word",
    [
        "model.dropout=0.2",
        *(pytest.param(word, marks=pytest.mark.slow) for word in ("packing.isolate_documents=false", "seed=1")),
    ],
)
def test_what_changes_the_meaning_is_refused_unless_said(nine: Path, word: str):
    path, _, new = word.partition("=")
    said = runs.train(nine, "--devices", "1", word, code=64)
    assert "has another model or other data; " in said
    assert f"{path}: " in said
    assert f"-> {new}" in said
    assert "accepted: " in runs.train(nine, "--devices", "1", word, "steps=10", "--accept-changes")


def test_another_optimizer_is_refused_with_what_to_do(nine: Path):
    said = runs.train(nine, "--devices", "1", "optimizer=Lion", code=64)
    assert "the optimizer changed (AdamW -> Lion)" in said
    assert "init_from=" in said


def test_another_shape_is_refused_even_then(nine: Path):
    said = runs.train(nine, "--devices", "1", "model.mlp.width=128", "--accept-changes", code=66)
    assert (
        "params/stacks/main/block/mlp/out_FD has shape [1, 64, 32] in the checkpoint, [1, 128, 32] in the model" in said
    )


@pytest.mark.slow
def test_another_dtype_is_refused(nine: Path):
    said = runs.train(nine, "--devices", "1", "precision.params=bfloat16", "--accept-changes", code=66)
    assert "is float32 in the checkpoint, bfloat16 in the model (nothing is cast)" in said


def test_changed_text_is_refused_even_if_the_config_is_the_same(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    words = ["data=TextFiles", f"data.paths={text}", f"data.folder={tmp_path}/shards", "data.split=8,1,1"]
    workdir = tmp_path / "run"

    def write(animal: str) -> None:
        for i in range(40):
            (text / f"{i}.txt").write_text(f"Chapter {i}. " + f"{animal} number {i} went home. " * 40)

    write("Duck")
    runs.train(workdir, "--devices", "1", *words, "steps=2")
    write("Goose")
    said = runs.train(workdir, "--devices", "1", *words, "steps=3", code=65)
    assert "prepare" in said
    shutil.rmtree(tmp_path / "shards")
    said = runs.train(workdir, "--devices", "1", *words, "steps=3", code=64)
    assert "the data's digest: " in said
    runs.train(workdir, "--devices", "1", *words, "steps=3", "--accept-changes")


def test_another_batch_size_goes_on_where_the_data_stand(tmp_path: Path):
    words = ["--devices", "1", "steps=None", "tokens=2048", "eval_every=0", "checkpoints.every_steps=0"]
    runs.train(tmp_path, *words)
    assert [row["samples"] for row in runs.rows(tmp_path) if "samples" in row] == [8 * i for i in range(1, 9)]
    words[words.index("tokens=2048")] = "tokens=3072"
    runs.train(tmp_path, *words, "batch.global_size=16")
    steps = [(row["step"], row["samples"]) for row in runs.rows(tmp_path) if "samples" in row]
    assert steps[8:] == [(9, 80), (10, 96)], "1,024 tokens more, 512 a step"


# Weights alone


@pytest.mark.parametrize(("within", "step"), [("checkpoints/9", 9), pytest.param(".", 12, marks=pytest.mark.slow)])
def test_init_from_takes_weights_and_nothing_else(whole: Path, tmp_path: Path, within: str, step: int):
    source = whole / within
    said = runs.train(tmp_path, "--devices", "1", f"init_from={source}", "steps=1", "seed=3")
    assert f"weights     of step {step} of {source}" in said
    first, *_ = runs.rows(tmp_path)
    assert first["samples"] == 8
    before = [row["val/loss"] for row in runs.rows(whole) if "val/loss" in row]
    assert first["train/loss"] < before[0] + 0.5, "the weights were learned"


def test_init_from_another_tokenizer_is_refused_unless_said(whole: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"Line {i} is about ducks and geese.\n\n" for i in range(3000)))
    words = ["data=TextFiles", f"data.paths={tmp_path}/a.txt", f"data.folder={tmp_path}/shards", "data.split=8,1,1"]
    words += ["data.tokenizer=Bpe", "data.tokenizer.vocab_size=257", f"init_from={whole}", "steps=1"]
    said = runs.train(tmp_path / "run", "--devices", "1", *words, code=64)
    assert "was trained with another tokenizer" in said
    said = runs.train(tmp_path / "run", "--devices", "1", *words, "--accept-changes")
    assert f"weights     of step 12 of {whole}" in said


def test_init_from_something_else_is_refused(whole: Path, tmp_path: Path):
    said = runs.train(tmp_path / "a", "--devices", "1", f"init_from={tmp_path}", code=66)
    assert "holds no checkpoints" in said
    said = runs.train(tmp_path / "c", "--devices", "1", f"init_from={tmp_path}/nothing", code=64)
    assert "is no folder" in said
    assert not (tmp_path / "c").exists()
    said = runs.train(tmp_path / "b", "--devices", "1", f"init_from={whole}", "model.width=64", code=66)
    assert "params/ends/norm/gain_D has shape [32] in the checkpoint, [64] in the model" in said


# The folder


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    first = runs.begin(tmp_path, "--devices", "1", "steps=100000")
    runs.at_step(tmp_path, first, 1)
    runs.stop(first, signal.SIGSTOP)  # it takes no time, and has the folder still
    assert f"is in use by process {first.pid} on " in runs.train(tmp_path, "--devices", "1", code=64)
    runs.stop(first, signal.SIGCONT)
    first.terminate()
    runs.end(first, 75)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    said = runs.train(tmp_path / "file/run", "--devices", "1", code=64)
    assert "file/run cannot be written to" in said


def test_a_full_disk_ends_it_with_its_code(nine: Path):
    (nine / "log.txt").unlink()
    (nine / "log.txt").symlink_to("/dev/full")
    assert "the log file is given up" in runs.train(nine, "--devices", "1", "steps=10")
    (nine / "run").mkdir()
    (nine / "run/metrics.jsonl").symlink_to("/dev/full")
    said = runs.train(nine / "run", "--devices", "1", "steps=2", "reporting.tensorboard=false", code=73)
    assert "the metrics of step 1 cannot be written" in said


def test_the_folder_tells_what_ran(whole: Path):
    about = Store(whole / "checkpoints").at(12).manifest.about
    assert about["samples"] == 96
    assert about["tokens"] == 3072
    assert about["config"]["steps"] == 12
    assert about["evaluated"]
    losses = {row["step"]: row["val/loss"] for row in runs.rows(whole) if "val/loss" in row}
    assert Store(whole / "checkpoints").at(12).manifest.val_loss == losses[12]
    assert about["best_val_loss"] == min(losses.values())
    assert len(about["data"]) == 16
    assert len(about["tokenizer"]) == 64
    assert set(about["versions"]) >= {"jax", "flax", "orbax-checkpoint"}
    log = (whole / "log.txt").read_text()
    assert "step 12/12  loss" in log
    assert "\x1b" not in log
