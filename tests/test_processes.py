"""Two real processes on loopback, four devices each, against one process with eight."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Trains by the command line's own words, then saves the whole final state from process 0.
PROGRAM = """
import sys
import main
from mtx import train
from mtx.model import flatten

out, *argv = sys.argv[1:]
run = train.run

def keep(*args, **kw):
    import jax, numpy as np
    from jax.experimental import multihost_utils
    state = run(*args, **kw)
    everything = multihost_utils.process_allgather(state, tiled=True)
    if jax.process_index() == 0:
        named = flatten(everything.params) | {"step": everything.step, "tokens": everything.tokens.low}
        np.savez(out, **{name.replace("/", "."): np.asarray(x) for name, x in named.items()})
    return state

train.run = keep
sys.exit(main.main(["main.py", *argv]))
"""

WORDS = [
    *("--config", "configs/quickstart.py", "mesh.data=4", "mesh.model=2", "layout.zero=2", "steps=3"),
    *("layout.sequence_parallel=true", "batch.global_size=16", "batch.micro_size=2", "batch.sequence_length=32"),
    *("model.layers=2", "model.width=32", "model.mlp.width=64", "model.dropout=0.1", "sample_tokens=16"),
]


def start(out: Path, workdir: Path, *words: str) -> subprocess.Popen:
    argv = [sys.executable, "-c", PROGRAM, str(out), *WORDS, f"workdir={workdir}", *words]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*children: subprocess.Popen) -> list[str]:
    try:
        outputs = [child.communicate(timeout=400)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output
    return outputs


@pytest.mark.multiprocess
def test_two_processes_give_the_state_of_one(tmp_path: Path):
    finish(start(tmp_path / "one.npz", tmp_path / "one", "--devices", "8"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cluster = ["--devices", "4", "--coordinator", f"127.0.0.1:{port}", "--processes", "2"]
    outputs = finish(*(start(tmp_path / "two.npz", tmp_path / "two", *cluster, "--process", str(i)) for i in (0, 1)))
    assert "step 3/3" in outputs[0]
    assert "step" not in outputs[1], "only process 0 reports"

    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert set(one) == set(two)
    assert int(two["step"]) == 3
    assert int(two["tokens"]) == 3 * 16 * 32
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
    metrics = [(tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1])
