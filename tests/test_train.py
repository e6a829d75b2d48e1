"""The loop through the command line: what a user sees and what the run folder holds."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import runs

from mtx import config as configs
from mtx.building import build
from mtx.train.banner import pipeline_text

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "steps=6",
    "eval_every=3",
    "model.dropout=0",
    "checkpoints.every_steps=0",
    "sample_tokens=24",
    "eval_sequences=0",
]
ROW = {
    *("step", "train/loss", "train/grad_norm", "lr", "tokens", "samples", "skipped", "tokens_per_s", "step_s"),
    *("data_wait_s", "tokens_per_s_per_device", "tflops_per_s_per_device", "mfu"),
}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    workdir = tmp_path_factory.mktemp("one")
    return runs.train(workdir, "--devices", "1", *SMALL), workdir


def test_console(one_device: tuple[str, Path]):
    text, workdir = one_device
    assert "mesh        one device" in text
    assert "precision   compute float32" in text
    assert "batch       256 tokens: 8 x 32 in 1 microbatch" in text
    assert "length      6 steps, 1,536 tokens, 0.01 epochs" in text
    assert "ends/token_VD" in text
    lines = [line for line in text.splitlines() if line.startswith("step") and "tokens/s" in line]
    assert [line.split()[1] for line in lines] == ["1/6", "2/6", "4/6", "6/6"]
    for part in ("loss", "lr", "grad-norm", "tokens", "tokens/s", "TFLOP/s/device", "MFU n/a", "data", "ETA"):
        assert f"{part}" in lines[-1]
    assert text.count("sample:") == 2
    assert [line.split()[:2] for line in text.splitlines() if "val loss" in line] == [["step", "3/6"], ["step", "6/6"]]
    log = (workdir / "log.txt").read_text()
    assert log in text.replace("\r", ""), "the file holds what the console said"


def test_metrics(one_device: tuple[str, Path]):
    rows = runs.rows(one_device[1], timing=True)
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(set(row) - {"param_norm"} == ROW for row in steps)
    assert [row["step"] for row in steps if "param_norm" in row] == [2, 4, 6]
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 7)]
    assert steps[1]["step_s"] > 0.3 * min(row["step_s"] for row in steps[2:]), "no step's time is counted before it"
    assert all(row["mfu"] is None for row in steps), "nobody promised a peak for this CPU"
    evaluated = [row for row in rows if "val/loss" in row]
    assert [row["step"] for row in evaluated] == [3, 6]
    assert all(row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"])) for row in evaluated)
    assert steps[0]["train/loss"] > steps[-1]["train/loss"], "it learns"


def test_tensorboard_has_what_metrics_jsonl_has(one_device: tuple[str, Path]):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(one_device[1] / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "val/loss", "lr", "param_norm"):
        wanted = [(row["step"], row[name]) for row in runs.rows(one_device[1]) if name in row]
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in wanted]


def test_run_folder(one_device: tuple[str, Path]):
    workdir = one_device[1]
    config = json.loads((workdir / "config.json").read_text())
    assert config["steps"] == 6
    about = json.loads((workdir / "run.json").read_text())
    assert {"jax", "flax", "numpy"} <= set(about["versions"])
    assert "steps: 1100 -> 6" in (workdir / "overrides.txt").read_text()


def sample(text: str) -> str:
    return re.split(r"\n(?:step 6: checkpoint|run folder)", text.rpartition("sample:\n")[2])[0]


@pytest.mark.parametrize(
    "words",
    [
        ["mesh.data=4", "mesh.model=2", "layout.zero=3", "layout.sequence_parallel=true", "batch.micro_size=1"],
        pytest.param(
            ["mesh.replica=2", "mesh.data=2", "mesh.model=2", "layout.zero=2", "partition=Compiled"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["manual", "compiled"],
)
def test_eight_devices_see_the_same_losses(one_device: tuple[str, Path], tmp_path: Path, words: list[str]):
    text = runs.train(tmp_path, "--devices", "8", *SMALL, *words)
    for row, wanted in zip(runs.rows(tmp_path), runs.rows(one_device[1]), strict=True):
        for name in ("train/loss", "train/grad_norm", "param_norm", "lr", "val/loss", "val/bits_per_byte"):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=2e-4), (row["step"], name)
    assert "stacks/main/block/mlp/out_FD" in text
    assert sample(text) == sample(one_device[0]) != ""


OWN_TABLE = '''"""The quickstart, with a table that does what layout.zero=3 and layout.sequence_parallel=true do."""

import dataclasses

from configs import quickstart
from mtx.config import Config
from mtx.layout import Layout, megatron


def get_config() -> Config:
    return dataclasses.replace(quickstart.get_config(), layout=Layout(rows=megatron(3, True)))
'''


def test_the_banner_says_what_a_table_does(tmp_path: Path):
    (tmp_path / "own_table.py").write_text(OWN_TABLE)
    words = ["--config", str(tmp_path / "own_table.py"), "--devices", "4", "mesh.data=2", "mesh.model=2"]
    text = runs.train(tmp_path / "run", *words, *runs.SMALL, *runs.book())
    assert "(4 x cpu, Manual, zero=3, sequence_parallel=True)" in text


def test_lengths_in_tokens_and_epochs(tmp_path: Path):
    words = ["steps=None", "eval_every=0", "--devices", "1"]
    runs.train(tmp_path / "tokens", *words, "tokens=700")
    assert [row["step"] for row in runs.rows(tmp_path / "tokens")] == [1, 2, 3, 3]
    text = runs.train(tmp_path / "epochs", *words, "data=PythonDocs", "epochs=1e-4")
    assert "0.00 epochs" in text
    assert [row["step"] for row in runs.rows(tmp_path / "epochs")] == [1, 1]


# Own text, from files to a sample.


def test_own_text_is_prepared_trained_on_and_continued(tmp_path: Path):
    text = "\n\n".join(f"Line {i} of a book about {'ducks' if i % 3 else 'geese'}." for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    data = ["data=TextFiles", f"data.paths={tmp_path}/book.txt", f"data.folder={tmp_path}/shards"]
    data += ["data.tokenizer=Bpe", "data.tokenizer.vocab_size=300", "model.vocab_size=300", "data.split=8,1,1"]
    workdir = tmp_path / "run"
    assert "data: preparing" in runs.train(workdir, *data, "--devices", "1", "steps=4")
    assert (tmp_path / "shards/manifest.json").exists()
    assert "data: preparing" not in runs.train(workdir, *data, "--devices", "1", "steps=5")

    run, eight = str(workdir), ["--devices", "8"]
    greedy = ["generate", run, "--prompt", "Line 7", "--tokens", "9", "--temperature", "0"]
    answers = runs.ask(
        [
            ["eval", run],
            ["eval", run, "eval_sequences=64"],
            ["eval", run, "--split", "test"],
            ["eval", run, *eight, "mesh.data=2", "mesh.model=4"],
            greedy,
            [*greedy, *eight, "mesh.model=8"],
        ]
    )
    assert [answer.code for answer in answers] == [0] * 6, answers
    found, whole, tested, split = (json.loads(answer.out) for answer in answers[:4])
    (last,) = [row for row in runs.rows(workdir) if row["step"] == 5 and "val/loss" in row]
    assert whole["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert whole["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], rel=1e-6)
    assert found["step"] == 5
    assert tested["split"] == "test"
    assert split["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert answers[4].out.startswith("Line 7")
    assert answers[4].out == answers[5].out

    (tmp_path / "book.txt").write_text(text.replace("ducks", "swans"))
    shutil.rmtree(tmp_path / "shards")
    subprocess.run(
        [sys.executable, "main.py", "prepare", "--config", "configs/quickstart.py", *data], cwd=ROOT, check=True
    )
    child = subprocess.run([sys.executable, "main.py", *greedy], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 65, "tokens would mean other text"
    assert "is not the one that" in child.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_lowers(path: Path):
    """Its own step, at its own size, on eight devices that hold nothing."""
    config = configs.load(str(path), []).config
    configs.check(config, 8)
    program = build(config, jax.devices())
    rows = (config.batch.micro_size or config.batch.global_size // 8) * 8
    count = configs.microbatches(config, dict(program.mesh.shape))
    text = program.lower_train_step(count, rows, config.batch.sequence_length).as_text()
    assert "stablehlo.all_reduce" in text or "sdy.all_reduce" in text


UNEVEN = "OneFOneB, 4 stages of 1 or 2 layers (padded to 8), 14 ticks, idle"
CHUNKS = "Interleaved(chunks=2), 4 stages of 2 x 1 layer, 26 ticks, idle 16% of the time"


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        (
            "gpipe",
            "",
            "GPipe, 4 stages of 1 layer, 21 ticks, idle 27% of the time; inputs of 8 microbatches held",
        ),
        ("one_f_one_b", "", f"{UNEVEN} 36% of the time; activations of 7 microbatches held"),
        (
            "one_f_one_b",
            "model.layers=8",
            "OneFOneB, 4 stages of 2 layers, 14 ticks, idle 27% of the time; activations",
        ),
        ("interleaved", "", f"{CHUNKS}; activations of 11 microbatches held, each of one chunk"),
        (
            "gpipe",
            "batch.micro_size=None",
            "GPipe, 4 stages of 1 layer, 7 ticks, idle 75% of the time; inputs of 1 microbatch held; "
            "a smaller batch.micro_size makes more microbatches",
        ),
        (
            "gpipe",
            "batch.global_size=8",
            "GPipe, 4 stages of 1 layer, 13 ticks, idle 43% of the time; inputs of 4 microbatches held; "
            "a larger batch.global_size makes more microbatches",
        ),
        ("gpipe", "batch.global_size=2 batch.micro_size=None", "a larger batch.global_size makes more microbatches"),
    ],
)
def test_what_a_pipeline_costs_is_said(name: str, words: str, said: str):
    config = configs.load(str(ROOT / "configs" / "debug" / f"{name}.py"), words.split()).config
    program = build(config, jax.devices())
    text = pipeline_text(program, config.batch, configs.microbatches(config, dict(program.mesh.shape)))
    assert said in text
    assert ("makes more" in text) == ("makes more" in said)


@pytest.mark.parametrize(("devices", "kept"), [(1, True), (2, jax.__version_info__ < (0, 11))])
def test_what_cpus_compiled_is_kept_where_it_can_be_loaded_back(devices: int, kept: bool, tmp_path: Path):
    program = (
        "import jax, numpy; from mtx.building import keep_compiled; keep_compiled();"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "jax.jit(lambda x: x + 1)(numpy.zeros(3))"
    )
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    env.pop("JAX_COMPILATION_CACHE_DIR")
    subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, check=True)
    assert any(tmp_path.glob("mtx/compile/jit_*")) == kept
