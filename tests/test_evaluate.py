"""A seqio Task's own metrics of a run, through the command line."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import seqio_project

from data import PythonDocs, SeqioTask
from mtx import config as configs
from mtx import evaluate
from mtx.errors import ConfigError


@pytest.mark.parametrize(
    ("metrics", "data", "why"),
    [
        (5, PythonDocs(), "--metrics is for data=SeqioTask, and this run has data=PythonDocs; leave it out of eval."),
        (0, SeqioTask(module="m", mixture="t"), "--metrics 0 must be at least 1"),
        (5, SeqioTask(module="m", mixture="t", validation=None), "and data.validation=None; name it."),
    ],
)
def test_metrics_that_cannot_be_are_refused_before_anything_is_read(tmp_path: Path, metrics: int, data, why: str):
    config = dataclasses.replace(configs.load(runs.ROOT / "configs/quickstart.py").config, data=data)
    (tmp_path / "config.json").write_text(json.dumps(configs.dump(config)))
    flags = argparse.Namespace(metrics=metrics, split="validation")
    with pytest.raises(ConfigError, match=re.escape(why)):
        evaluate.refuse_metrics(tmp_path, [], flags)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_a_tasks_metrics_of_a_model_that_learned_the_answers(tmp_path: Path, devices: int):
    """Three questions: log-likelihoods of their answers rise with training."""
    pytest.importorskip("seqio", reason="needs the seqio extra")
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
