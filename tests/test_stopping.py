"""Stopped at any moment by any means, a run goes on by the same command to the same bits."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs

from mtx.train.stopping import SAVE, Request, Stopping


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    runs.train(workdir)
    return workdir


def check_same(workdir: Path, whole: Path) -> None:
    assert runs.digests(workdir) == runs.digests(whole)
    assert runs.rows(workdir) == runs.rows(whole)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_a_signal_saves_and_the_same_command_goes_on(whole: Path, tmp_path: Path, number: signal.Signals):
    child = runs.begin(tmp_path)
    runs.at_step(tmp_path, child, 5)
    runs.stop(child, number)
    said = runs.end(child, 75)
    last = runs.rows(tmp_path)[-1]["step"]
    assert f"stopped by {number.name} at step {last}/12; step {last} is saved, the same command goes on" in said
    assert f"resumed     step {last}," in runs.train(tmp_path)
    check_same(tmp_path, whole)


def test_a_hangup_that_nohup_ignores_is_ignored(whole: Path, tmp_path: Path):
    child = runs.begin(tmp_path, ignored=[signal.SIGHUP])
    runs.at_step(tmp_path, child, 5)
    runs.stop(child, signal.SIGHUP)
    runs.end(child)
    check_same(tmp_path, whole)


def test_a_signal_while_it_compiles_ends_it_at_once(whole: Path, tmp_path: Path):
    child = runs.begin(tmp_path)
    runs.wait_for(tmp_path, child, lambda: (tmp_path / "config.json").exists())
    runs.stop(child, signal.SIGTERM)
    said = runs.end(child, 75)
    # On a quick machine a step may be done by now: then it was saved.
    assert "before the first step: nothing is new, there is no checkpoint" in said or "is saved" in said
    runs.train(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.slow
def test_a_signal_while_a_save_is_under_way(whole: Path, tmp_path: Path):
    child = runs.begin(tmp_path, "checkpoints.every_steps=1")
    runs.wait_for(
        tmp_path, child, lambda: any(tmp_path.glob("checkpoints/4.*")) or (tmp_path / "checkpoints/4").exists()
    )
    runs.stop(child, signal.SIGTERM)
    assert "the same command goes on" in runs.end(child, 75)
    runs.train(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.slow
def test_a_stop_within_an_evaluation_repeats_it(tmp_path: Path, whole: Path):
    words = ["data=PythonDocs", "eval_sequences=0", "eval_every=3", "steps=6", "checkpoints.every_steps=0"]
    child = runs.begin(tmp_path, *words)
    runs.at_step(tmp_path, child, 3)  # step 3's row is written, its evaluation of hundreds of batches follows
    runs.stop(child, signal.SIGTERM)
    runs.end(child, 75)
    assert [row["step"] for row in runs.rows(tmp_path)] == [1, 2, 3], "the evaluation did not come to its end"
    child = runs.begin(tmp_path, *words)
    runs.at_step(tmp_path, child, 4)
    runs.stop(child, signal.SIGKILL)  # the evaluation is written, and the checkpoint does not know
    runs.end(child, [-signal.SIGKILL])
    runs.train(tmp_path, *words)
    found = runs.rows(tmp_path)
    assert [(row["step"], "val/loss" in row) for row in found] == [
        *((1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True)),
    ]


def kill_and_go_on(tmp_path: Path, whole: Path, seed: int) -> None:
    """SIGKILL at a moment between the first step and a little after the last save; then the same command."""
    child = runs.begin(tmp_path)
    dice = random.Random(seed)
    runs.at_step(tmp_path, child, dice.randrange(1, 12))
    time.sleep(dice.random() * 0.2)
    runs.stop(child, signal.SIGKILL)
    runs.end(child, [-signal.SIGKILL, 0])
    runs.train(tmp_path)
    check_same(tmp_path, whole)


@pytest.mark.parametrize("seed", range(1))
def test_killed_at_any_moment(tmp_path: Path, whole: Path, seed: int):
    kill_and_go_on(tmp_path, whole, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_killed_at_ten_more_moments(tmp_path: Path, whole: Path, seed: int):
    kill_and_go_on(tmp_path, whole, seed)


def test_the_clock_stops_it_too(tmp_path: Path):
    words = ["steps=100000", "stop_after_minutes=0.05", "eval_every=0"]
    said = runs.train(tmp_path, *words, code=75)
    assert "stopped by stop_after_minutes" in said
    assert "the same command goes on" in said


@pytest.mark.slow
def test_minutes_between_saves(tmp_path: Path):
    child = runs.begin(tmp_path, "steps=100000", "checkpoints.every_steps=0", "checkpoints.every_minutes=0.02")
    runs.wait_for(tmp_path, child, lambda: len(list(tmp_path.glob("checkpoints/*/manifest.json"))) >= 2)
    runs.stop(child, signal.SIGTERM)
    runs.end(child, 75)


def test_too_many_steps_that_are_not_finite_end_it(tmp_path: Path):
    # A learning rate that sends the weights to where float32 ends within a few steps.
    words = ["optimizer=Sgd", "optimizer.schedule.peak_lr=1e30", "optimizer.clip_norm=None", "max_skipped_steps=3"]
    said = runs.train(tmp_path, *words, code=67)
    assert "4 steps were skipped because their gradients were not finite, more than max_skipped_steps=3" in said
    assert any(row.get("skipped") == 4 for row in runs.rows(tmp_path))
    assert max((int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")), default=0) <= 6


@pytest.mark.slow
def test_while_the_data_are_prepared_the_child_goes_too(tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(f"Line {i} has number {i * i}.\n\n" for i in range(60_000)))
    words = ["data=TextFiles", f"data.paths={tmp_path}/a.txt", f"data.folder={tmp_path}/shards"]
    words += ["data.tokenizer=Bpe", "data.tokenizer.vocab_size=2048", "model.vocab_size=2048", "steps=1"]
    child = runs.begin(tmp_path / "run", *words)
    runs.wait_for(tmp_path, child, lambda: (tmp_path / "shards").exists())
    runs.stop(child, signal.SIGTERM)
    runs.end(child, 75)
    runs.train(tmp_path / "run", *words)  # nobody holds the folder


SECOND = """
import os, signal, sys, time
from mtx.train.stopping import Stopping
with Stopping(lambda why: None) as s:
    s.tick()
    s.begun()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    sys.exit(3)
"""


def test_a_second_ctrl_c_does_not_wait():
    with runs.inheriting():
        child = subprocess.run([sys.executable, "-c", SECOND], cwd=runs.ROOT, capture_output=True, text=True)
    assert child.returncode == 130, child.stderr
    assert "a second SIGINT: stopping at once, without saving." in child.stderr


# The agreement itself, in one process.


def stopping(gone: list[str]) -> Stopping:
    return Stopping(gone.append)


def test_nothing_is_asked_nothing_happens():
    with stopping([]) as s:
        s.begun()
        assert [s.tick() for _ in range(3)] == [None] * 3


def test_a_request_comes_at_the_next_tick_once():
    with stopping([]) as s:
        s.tick()
        s.begun()
        s.ask(SAVE)
        assert s.tick() == Request(SAVE)
        assert s.tick() is None
        s.ask(SAVE)
        s.ask("SIGTERM")  # stopping saves as well
        s.ask(SAVE)
        assert s.tick() == Request("SIGTERM")
        assert Request("SIGTERM").stops
        assert not Request(SAVE).stops


def test_before_the_first_work_is_under_way_a_stop_ends_it_and_a_save_waits():
    gone: list[str] = []
    with stopping(gone) as s:
        s.ask(SAVE)
        assert gone == []
        s.ask("SIGTERM")
        assert gone == ["SIGTERM"]


def test_a_signal_is_seen_while_the_main_thread_is_busy_and_handlers_come_back():
    gone: list[str] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stopping(gone):
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not gone and time.monotonic() < deadline:
            pass  # no call that would let Python's own handler run later than the thread
    assert gone == ["SIGTERM"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not any(thread.name in ("signals", "meetings") and thread.is_alive() for thread in threading.enumerate())
