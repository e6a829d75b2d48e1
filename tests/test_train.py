"""The loop through the command line: what a user sees and what the run folder holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mtx import config as configs
from mtx import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("steps=6", "log_every=2", "eval_every=3", "model.layers=1", "model.width=32", "model.mlp.width=64"),
    *("batch.sequence_length=32", "sample_tokens=24"),
]


def run(workdir: Path, *words: str) -> tuple[str, list[dict]]:
    argv = [sys.executable, "main.py", "--config", "configs/quickstart.py", f"workdir={workdir}", *SMALL, *words]
    child = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert child.returncode == 0, child.stderr
    return child.stderr + child.stdout, [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict], Path]:
    workdir = tmp_path_factory.mktemp("one")
    return *run(workdir, "--devices", "1"), workdir


def test_console_and_metrics(one_device: tuple[str, list[dict], Path]):
    text, rows, _ = one_device
    assert "mesh        one device" in text
    assert "precision   compute float32" in text
    assert "batch       256 tokens: 8 x 32 in 1 microbatch" in text
    assert "ends/token_VD" in text
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "train/loss", "train/grad_norm", "lr", "tokens", "samples", "tokens_per_s", "step_s", "skipped"}
    assert all(set(row) == wanted for row in steps)
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 7)]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step") and "tokens/s" in line] == [
        *("1/6", "2/6", "4/6", "6/6"),
    ]
    assert "sample:" in text
    assert rows[0]["train/loss"] > rows[-2]["train/loss"], "it learns"


def test_run_folder(one_device: tuple[str, list[dict], Path]):
    workdir = one_device[2]
    config = json.loads((workdir / "config.json").read_text())
    assert config["steps"] == 6
    about = json.loads((workdir / "run.json").read_text())
    assert {"jax", "flax", "numpy"} <= set(about["versions"])
    assert "steps: 1100 -> 6" in (workdir / "overrides.txt").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["mesh.data=4", "mesh.model=2", "layout.zero=3", "layout.sequence_parallel=true", "batch.micro_size=1"],
        ["mesh.replica=2", "mesh.data=2", "mesh.model=2", "layout.zero=2", "partition=Compiled"],
    ],
    ids=["manual", "compiled"],
)
def test_eight_devices_see_the_same_losses(one_device: tuple[str, list[dict], Path], tmp_path: Path, words: list[str]):
    text, rows = run(tmp_path, "--devices", "8", *words)
    for row, wanted in zip(rows, one_device[1], strict=True):
        for name in ("train/loss", "train/grad_norm", "lr", "val/loss", "val/bits_per_byte"):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=2e-4), (row["step"], name)
    assert "layers/mlp/out_FD" in text
    sample = text.partition("sample:")[2].partition("run folder")[0]
    assert sample == one_device[0].partition("sample:")[2].partition("run folder")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_lowers(path: Path):
    """Its own step, at its own size, on eight devices that hold nothing."""
    config = configs.load(str(path), []).config
    configs.check(config, 8)
    program = train.build(config, jax.devices())
    rows = (config.batch.micro_size or config.batch.global_size // 8) * 8
    count = configs.microbatches(config, dict(program.mesh.shape))
    text = program.lower_train_step(count, rows, config.batch.sequence_length).as_text()
    assert "stablehlo.all_reduce" in text or "sdy.all_reduce" in text
