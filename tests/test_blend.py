"""Blends through the command line: prepared, trained, measured source by source, and changed on the way."""

from pathlib import Path

import pytest
import runs

CONFIG = '''"""A blend of two folders."""

import dataclasses

from configs.quickstart import get_config as quickstart
from data import Blend, Phase, TextFiles, Weighted


def get_config():
    def source(name, weight):
        paths, folder = "{here}/" + name, "{here}/shards/" + name
        return Weighted(name=name, weight=weight, data=TextFiles(paths=paths, folder=folder, split="8,2"))

    sources = (source("ducks", 3.0), source("geese", {weight}))
    return dataclasses.replace(quickstart(), data=Blend(sources=sources, phases=({phases})))
'''


@pytest.fixture
def blend(tmp_path: Path):
    """Writes the config; returns the words that name it."""
    for name, sound in (("ducks", "quack"), ("geese", "honk")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i} said " + f"{sound} {i} " * 60)

    def write(weight: float = 1.0, phases: str = "") -> list[str]:
        (tmp_path / "blend.py").write_text(CONFIG.format(here=tmp_path, weight=weight, phases=phases))
        return ["--config", str(tmp_path / "blend.py"), "--devices", "1"]

    return write


def test_a_blend_is_prepared_trained_and_measured_by_source(blend, tmp_path: Path):
    said = runs.train(tmp_path / "run", *blend(), "steps=4", "eval_every=0")
    assert "source ducks" in said and "source geese" in said
    assert "ducks: 24 samples (75.00%)" in said and "geese: 8 samples (25.00%)" in said
    last = runs.rows(tmp_path / "run")[-1]
    assert 3 * last["val/ducks/loss"] + last["val/geese/loss"] == pytest.approx(4 * last["val/loss"])
    assert {"val/ducks/bits_per_byte", "val/geese/perplexity"} <= last.keys()


@pytest.mark.slow
def test_weights_change_by_phases_that_have_not_begun(blend, tmp_path: Path):
    workdir = tmp_path / "run"
    runs.train(workdir, *blend(), "steps=4", "eval_every=0")
    said = runs.train(workdir, *blend(weight=2.0), "steps=6", "eval_every=0", code=64)
    assert "data.sources[1].weight: 1.0 -> 2.0" in said
    assert "Other weights from here on are a phase: Phase(start_sample=32, weights=(...))." in said
    late = "Phase(start_sample=32, weights=(0.0, 1.0)),"
    said = runs.train(workdir, *blend(phases=late), "steps=6", "eval_every=0")
    assert "resumed     step 4" in said and "geese: 24 samples (50.00%)" in said
    early = "Phase(start_sample=16, weights=(0.0, 1.0)),"
    said = runs.train(workdir, *blend(phases=early), "steps=8", "eval_every=0", code=64)
    assert "data.phases[0].start_sample: 32 -> 16" in said
