"""A seqio Task's own metrics of a run, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import seqio_project

pytest.importorskip("seqio", reason="needs the seqio extra")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_tasks_metrics_of_a_model_that_learned_the_answers(tmp_path: Path, devices: int):
    """Three questions, learned by heart: every answer exact, and log-likelihoods that rise with training."""
    with seqio_project.entered() as folder:
        environment = os.environ | {"PYTHONPATH": f"{runs.ROOT}{os.pathsep}{folder}"}

        def said(*words: str) -> str:
            command = [sys.executable, str(runs.ROOT / "main.py"), *words]
            return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

        config = ["--config", str(runs.ROOT / "configs/quickstart.py"), f"workdir={tmp_path}/run", "eval_every=0"]
        config += [
            "data=SeqioTask",
            "data.module=my_tasks.toys",
            "data.mixture=asked",
            f"data.folder={tmp_path}/shards",
        ]
        config += ["model.vocab_size=270", "model.layers=1", "sample_tokens=0", "batch.sequence_length=12"]
        said(*config, "steps=2")
        mesh = ["mesh.data=4", "mesh.model=2"] if devices == 8 else []
        measured = ["eval", f"{tmp_path}/run", "--devices", str(devices), "--metrics", "3", *mesh]
        before = json.loads(said(*measured).splitlines()[-1])["metrics"]["asked"]
        said(*config, "steps=150")
        after = json.loads(said(*measured).splitlines()[-1])["metrics"]["asked"]
    assert before.keys() == after.keys() == {"exact", "mean_score"}
    assert before["mean_score"] < after["mean_score"] < 0
