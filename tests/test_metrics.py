"""FLOPs against compiled programs, files after kills, and what a terminal, a pipe and a log file show."""

import dataclasses
import importlib.util
import io
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx import hlo, metrics
from mtx.errors import ConfigError
from mtx.losses import CrossEntropy
from mtx.metrics import Clock, Console, Machine, Metrics, Pace, Reporting
from mtx.model import Model

ROOT = Path(__file__).resolve().parent.parent
ROW = {
    "step": 100,
    "train/loss": 2.58224,
    "lr": 3.983e-3,
    "train/grad_norm": 0.9031,
    "tokens": 102_400,
    "skipped": 0,
    "step_s": 0.1,
    "data_wait_s": 0.0003,
    "tokens_per_s": 6573.0,
    "tokens_per_s_per_device": 6573.0,
    "tflops_per_s_per_device": 0.0312,
    "mfu": math.nan,
}


# FLOPs


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("model", [toys.GPT, toys.LLAMA], ids=["gpt", "llama"])
def test_flops_per_token_are_those_of_the_compiled_gradient(model, chunks: int):
    """Exactly: plain attention computes the whole square, and no matrix product is outside the convention.

    But one: the loss makes the logits of each chunk again. Of a single chunk XLA merges the two.
    """
    model = dataclasses.replace(model, remat="none")
    sequences, length = 4, 16
    p = toys.program(model, loss=CrossEntropy(chunk_tokens=sequences * length // chunks), documents=False)
    arrays = toys.batch(sequences, length)
    state, batch = toys.state_of(p, toys.weights_of(model)), toys.place(p, arrays, 1)
    with jax.set_mesh(p.mesh):
        text = jax.jit(p.gradients).lower(state, batch, jnp.int32(1)).compile().as_text()
    again = 2 * model.padded_vocab * model.width if chunks > 1 else 0
    found = metrics.flops_per_token(p.model, length) + again
    assert found * sequences * length == hlo.dot_flops(text)


def test_flops_per_token_of_gpt2_is_the_formula():
    """6 (12 L D^2 + V D) + 12 L T D, the numbers of GPT-2 124M, its vocabulary padded to 50,304."""
    from configs.gpt2_124m import get_config

    config = get_config()
    L, D, T, V = 12, 768, 1024, config.model.padded_vocab
    assert metrics.flops_per_token(Model(config.model), T) == 6 * (12 * L * D * D + V * D) + 12 * L * T * D


def test_an_untied_head_costs_what_a_tied_one_does():
    untied = dataclasses.replace(toys.GPT, tied_head=False)
    assert metrics.flops_per_token(Model(untied), 16) == metrics.flops_per_token(Model(toys.GPT), 16)


@pytest.mark.parametrize(
    ("kind", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("Tesla T4", "float16", 65),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("Tesla T4", "bfloat16", None),
        ("TPU v4", "float16", None),
        ("NVIDIA H200", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_peaks_are_known_or_none(kind: str, dtype: str, tera: float | None):
    assert metrics.peak_flops(kind, dtype) == (None if tera is None else tera * 1e12)


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_peaks_know_the_names_that_libtpu_gives(topology: str):
    import aot

    assert metrics.peak_flops(aot.tpu_devices(topology)[0].device_kind, "bfloat16") is not None


def test_memory_is_unknown_on_cpus():
    assert metrics.memory(jax.devices()) is None


# Time


class Time:
    """A clock that a test moves."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr("mtx.metrics.clock.time", found)
    return found


def test_clock_leaves_out_compiling_and_what_is_excluded(moving: Time):
    clock = Clock()
    moving.now += 30  # compiles
    assert clock.step(1000) == Pace(1, 1000, 30.0, 0.0)
    assert math.isnan(clock.remaining_s(5))
    assert clock.since_line() == Pace(1, 1000, 30.0, 0.0), "nothing else to show yet"
    for _ in range(2):
        with clock.data():
            moving.now += 0.5
        moving.now += 1.5
        clock.step(1000)
    with clock.excluded():
        moving.now += 60
        with clock.data():
            moving.now += 7  # the evaluation's data
    moving.now += 4
    assert clock.step(1000) == Pace(1, 1000, 4.0, 0.0)
    assert clock.since_line() == Pace(3, 3000, 8.0, 1.0)
    assert clock.remaining_s(6) == pytest.approx(6 * 8 / 3)
    moving.now += 1
    clock.step(1000)
    assert clock.since_line() == Pace(1, 1000, 1.0, 0.0), "only what came since the last line"
    assert clock.remaining_s(4) == pytest.approx(4 * 9 / 4)


def test_clock_counts_a_save_within_an_evaluation_once(moving: Time):
    clock = Clock()
    moving.now += 1
    clock.step(1)
    moving.now += 2
    with clock.excluded():
        moving.now += 10
        with clock.excluded():
            moving.now += 5
        assert clock.step(1).seconds == 2.0, "a step that arrives meanwhile"
        moving.now += 10
    moving.now += 3
    assert clock.step(1).seconds == 3.0


def test_rates_per_device_and_mfu():
    rates = Machine(devices=4, flops_per_token=2e9, peak_flops=1e14).rates(Pace(10, 400_000, 20.0, 1.0))
    assert rates == {
        "step_s": 2.0,
        "data_wait_s": 0.1,
        "tokens_per_s": 20_000.0,
        "tokens_per_s_per_device": 5_000.0,
        "tflops_per_s_per_device": 10.0,
        "mfu": pytest.approx(0.1),
    }
    unknown = Machine(devices=1, flops_per_token=1.0, peak_flops=None).rates(Pace(1, 1, 1.0, 0.0))
    assert math.isnan(unknown["mfu"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(159, "2:39"), (3723.4, "1:02:03"), (math.nan, "--"), (math.inf, "--"), (0, "0:00")]
)
def test_duration(seconds: float, text: str):
    assert metrics.duration(seconds) == text


# The line


def test_line_on_one_unknown_device():
    assert metrics.line(ROW, 1100, 159.0) == (
        "step  100/1100  loss 2.5822  lr 3.983e-03  grad-norm 0.903  tokens 102.4k  6,573 tokens/s  "
        "TFLOP/s/device 0.031  MFU n/a  data 0.3 %  ETA 2:39"
    )


def test_line_on_eight_known_devices():
    row = ROW | {"tokens_per_s_per_device": 821.6, "mfu": 0.4127, "tflops_per_s_per_device": 408.4, "skipped": 2}
    row |= {"memory_peak_bytes": 1_200_000_000, "memory_limit_bytes": 16_000_000_000}
    assert metrics.line(row, 1100, math.nan) == (
        "step  100/1100  loss 2.5822  lr 3.983e-03  grad-norm 0.903  tokens 102.4k  6,573 tokens/s (822/device)  "
        "TFLOP/s/device 408  MFU 41.3 %  memory 1.2/16.0 GB  data 0.3 %  ETA --  skipped 2"
    )


# metrics.jsonl and TensorBoard


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


NO_TENSORBOARD = Reporting(tensorboard=False)


def test_metrics_jsonl_is_whole_after_each_row_and_null_for_what_is_not_finite(tmp_path: Path):
    with Metrics(tmp_path, 0, NO_TENSORBOARD) as out:
        out.write(1, {"step": 1, "train/loss": 1 / 3, "mfu": math.nan, "tokens": 2**40})
        assert rows_of(tmp_path) == [{"step": 1, "train/loss": 1 / 3, "mfu": None, "tokens": 2**40}]
        out.write(1, {"val/loss": math.inf})
        assert rows_of(tmp_path)[1] == {"step": 1, "val/loss": None}
        out.text(1, "sample", "words")
    out.close()
    assert len(rows_of(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_keeps_rows_up_to_its_step_and_drops_a_half_written_line(tmp_path: Path):
    with Metrics(tmp_path, 0, NO_TENSORBOARD) as out:
        for step in range(1, 8):
            out.write(step, {"train/loss": 1 / step})
            if step == 4:
                out.write(step, {"val/loss": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')
    with Metrics(tmp_path, 4, NO_TENSORBOARD) as out:
        out.write(5, {"train/loss": 0.5})
    assert [(row["step"], *row) for row in rows_of(tmp_path)] == [
        *((step, "step", "train/loss") for step in (1, 2, 3, 4)),
        (4, "step", "val/loss"),
        (5, "step", "train/loss"),
    ]
    assert rows_of(tmp_path)[-1]["train/loss"] == 0.5
    with Metrics(tmp_path, 0, NO_TENSORBOARD) as out:
        out.write(1, {"train/loss": 9.0})
    assert rows_of(tmp_path) == [{"step": 1, "train/loss": 9.0}], "step 0 starts anew"


def test_a_resume_that_dies_while_it_drops_rows_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Metrics(tmp_path, 0, NO_TENSORBOARD) as out:
        for step in range(1, 8):
            out.write(step, {"train/loss": 1 / step})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def die(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        Metrics(tmp_path, 4, NO_TENSORBOARD)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_processes_are_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with Metrics(None, 4, Reporting(wandb="x", trackio="x")) as out:
        out.write(5, {"train/loss": 0.5})
        out.text(5, "sample", "words")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, sys
from mtx.metrics import Metrics
folder, resume, last, kill = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
out = Metrics(folder, resume)
for step in range(resume + 1, last + 1):
    out.write(step, {"step": step, "train/loss": 1 / (step + resume), "tokens": 1024 * step, "mfu": float("nan")})
    if step % 4 == 0:
        out.write(step, {"val/loss": 10.0 + step})
        out.text(step, "sample", f"sample of {step}")
if kill:
    os.kill(os.getpid(), 9)
out.close()
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the package tensorboard to read back"
)
def test_tensorboard_shows_after_kill_and_resume_what_metrics_jsonl_holds(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_accumulator import (
        EventAccumulator as PluginEventAccumulator,
    )

    for resume, last, kill in ((0, 10, 1), (8, 9, 1), (6, 12, 0)):
        argv = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, (resume, last, kill))]
        child = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert child.returncode == (-9 if kill else 0), child.stderr
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["tokens", "train/loss", "val/loss"]
    for name in ("train/loss", "tokens", "val/loss"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(row["step"], float(np.float32(row[name]))) for row in rows_of(tmp_path) if name in row]
        assert found == wanted
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    shown = PluginEventAccumulator(str(tmp_path / "tensorboard"))  # the older one never purges texts
    shown.Reload()
    assert [event.step for event in shown.Tensors("sample/text_summary")] == [4, 8, 12]
    assert b"sample of 12" in shown.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0]
    assert [event.step for event in shown.Tensors("train/loss")] == list(range(1, 13))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the package tensorboard to read back"
)
def test_a_new_run_in_an_old_folder_leaves_none_of_its_events(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        with Metrics(tmp_path) as out:
            out.write(1, {"train/loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [2.0]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(package: str, tmp_path: Path):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError, match=re.escape(f"pip install -e '.[{package}]'")):
        Metrics(tmp_path, 0, Reporting(**{package: "project"}))
    assert list(tmp_path.iterdir()) == [], "refused before anything is replaced"


def test_reporting_checks_itself():
    assert [field for field, _ in Reporting(wandb="", trackio="").check()] == ["wandb", "trackio"]
    assert not list(Reporting(wandb="a").check())


# The console


@pytest.fixture
def log():
    logger = logging.getLogger("mtx")
    before = (logger.level, logger.propagate, list(logger.handlers))
    yield logger
    assert (logger.level, logger.propagate, list(logger.handlers)) == before, "a closed console leaves no trace"


def test_console_says_the_same_to_stream_and_file_without_control_characters(tmp_path: Path, log: logging.Logger):
    stream = io.StringIO()
    with Console(tmp_path / "log.txt", total_steps=10, stream=stream) as console:
        console.say("one\ntwo \x1b[31mred\x1b[0m \x07bell\rreturn \x9b31m é [bold] :smile:")
        log.warning("attention: %s", "plain")
        log.debug("not this")
        console.progress(3, loss=1.0, eta_s=5.0)
    wanted = "one\ntwo red bellreturn 31m é [bold] :smile:\nattention: plain\n"
    assert stream.getvalue() == (tmp_path / "log.txt").read_text("utf-8") == wanted
    log.info("after")
    assert stream.getvalue() == wanted


def test_console_says_nothing_twice(log: logging.Logger, caplog: pytest.LogCaptureFixture):
    """The root logger has a handler too, as `logging.basicConfig` gives it; here pytest's."""
    with Console(None, total_steps=1, stream=io.StringIO()) as console:
        console.say("once")
    assert not caplog.records
    log.warning("after")
    assert [record.message for record in caplog.records] == ["after"]


def test_console_of_a_resumed_run_goes_on_in_its_file_and_a_new_one_does_not(tmp_path: Path, log: logging.Logger):
    for append in (False, True):
        with Console(tmp_path / "log.txt", total_steps=1, stream=io.StringIO(), append=append) as console:
            console.say(f"append={append}")
    assert (tmp_path / "log.txt").read_text() == "append=False\nappend=True\n"
    with Console(tmp_path / "log.txt", total_steps=1, stream=io.StringIO()) as console:
        console.say("anew")
    assert (tmp_path / "log.txt").read_text() == "anew\n"


def test_console_of_other_processes_says_warnings_alone(tmp_path: Path, log: logging.Logger):
    stream = io.StringIO()
    with Console(tmp_path / "log.txt", total_steps=1, stream=stream, first=False) as console:
        console.say("for everybody once")
        log.warning("wrong here")
    assert stream.getvalue() == "wrong here\n"
    assert not (tmp_path / "log.txt").exists()


def test_console_outlives_who_reads_its_stream(tmp_path: Path):
    """Like `python main.py 2>&1 | head -1`."""
    program = f"""
import pathlib, sys, time
from mtx.metrics import Console
with Console(pathlib.Path({str(tmp_path / "log.txt")!r}), total_steps=1) as console:
    console.say("line 0")
    sys.stdin.read()  # until the test has closed its end
    for i in (1, 2):
        console.say(f"line {{i}}")
"""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as child:
        assert child.stderr.readline() == b"line 0\n"
        child.stderr.close()
        child.stdin.close()
        assert child.wait(60) == 0
    assert (tmp_path / "log.txt").read_text() == "line 0\nline 1\nline 2\n"


def test_console_writes_what_its_streams_encoding_lacks(log: logging.Logger):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    with Console(None, total_steps=1, stream=stream) as console:
        console.say("né")
    assert raw.getvalue() == b"n\\xe9\n"


IN_A_TERMINAL = """
import logging, pathlib, sys, time
from mtx.metrics import Console
with Console(pathlib.Path(sys.argv[1]), total_steps=1100) as console:
    console.say("banner [x] " + "w" * 120)
    for step in (100, 200):
        console.progress(step, loss=2.5 - step / 1000, eta_s=159)
        logging.getLogger("mtx").info("step %d/1100", step)
        time.sleep(0.7)
print("over")
"""


def test_console_on_a_terminal_has_a_bar_below_the_lines_and_takes_it_away(tmp_path: Path):
    """In a real (pseudo) terminal; the log file holds the lines alone."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    argv = [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path / "log.txt")]
    child = subprocess.Popen(argv, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        shown += part
    os.close(ours)
    assert child.wait(30) == 0
    text = shown.decode()
    assert re.search(r"200/1100.*loss 2\.3000.*ETA.*2:39", text)
    assert "banner [x] " + "w" * 120 in text.replace("\r\n", "")
    assert "\x1b[?25h" in text, "the cursor is back"
    assert text.rstrip().endswith("over")
    assert (tmp_path / "log.txt").read_text() == f"banner [x] {'w' * 120}\nstep 100/1100\nstep 200/1100\n"
