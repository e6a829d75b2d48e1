"""The small runs of pipelines in configs/debug, and the schedule that docs/pipeline.md writes."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import runs

from mtx import config as configs
from mtx.config import Config
from mtx.layout import Placement
from mtx.pipeline import AnySchedule, simulate

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs" / "debug").glob("*.py"))


def placement(config: Config) -> Placement:
    return Placement.even(config.model.layers, config.mesh.pipeline, config.pipeline.per_stage())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_legal_on_eight_devices_and_a_lab_note(path):
    loaded = configs.load(path)
    configs.check(loaded.config, 8)
    stages, count = loaded.config.mesh.pipeline, configs.microbatches(loaded.config, vars(loaded.config.mesh))
    assert stages > 1 and count >= 2 * stages, "enough to fill the pipeline"
    note = ast.get_docstring(ast.parse(loaded.source)) or ""
    assert f"python main.py --config {path.relative_to(ROOT)} --devices 8" in note
    assert len(note.split()) > 30


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains_within_a_minute(path, tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "main.py", "--config", path, "--devices", "8", f"workdir={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - start < 60
    losses = [row["train/loss"] for row in runs.rows(tmp_path) if "train/loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_there_is_one_for_each_schedule_and_one_with_uneven_layers():
    found = [configs.load(path).config for path in FILES]
    assert sorted(type(config.pipeline).__name__ for config in found) == sorted(
        s.__name__ for s in get_args(AnySchedule)
    )
    assert [placement(config).counts for config in found if not placement(config).is_even] == [(2, 2, 1, 1)]
    assert [config.layout.zero for config in found if config.layout.sequence_parallel] == [1]


def test_the_schedule_in_the_docs_is_what_they_say():
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "pipeline.md").read_text("utf-8"), re.M | re.S)
    names: dict = {}
    exec(block, names)
    for stages in (1, 2, 4, 7):
        for microbatches in (2, 8, 14):
            found = simulate(names["Pairs"]().table(stages, microbatches, keeps=True))
            assert max(found.kept) == 2
            assert found.bubble == pytest.approx((stages - 1) / (stages + 1), abs=1e-12)
