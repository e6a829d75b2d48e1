"""Worker processes: results in order, errors as they were raised, and nothing that outlives who started it."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.workers import Tell, Workers

ROOT = Path(__file__).resolve().parent.parent


def nap(seconds: float, value: int, tell: Tell) -> int:
    tell(value)
    time.sleep(seconds)
    return value


def fall(error: Exception, tell: Tell) -> None:
    raise error


def leave(sign: int, tell: Tell) -> None:
    os.kill(os.getpid(), sign) if sign else os._exit(3)


def who(tell: Tell) -> int:
    return os.getpid()


def stuck(tell: Tell) -> None:
    """Says its number, then works for ever."""
    tell(os.getpid())
    while True:
        time.sleep(0.05)
        tell(None)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_results_come_in_the_order_of_the_calls(most: int) -> None:
    told: list[int] = []
    calls = [functools.partial(nap, 0.3 if i == 0 else 0.0, i) for i in range(20)]
    with Workers(most) as workers:
        assert list(workers.each(calls, lambda said: told.append(said) if said is not None else None)) == list(
            range(20)
        )
        assert workers.one(who) == os.getpid() if most == 0 else workers.one(who) != os.getpid()
        assert list(workers.each([], told.append)) == []
    assert sorted(told) == list(range(20))


def test_workers_start_when_they_are_needed_and_end_with_the_block() -> None:
    with Workers(3) as workers:
        assert workers._processes == {}
        number = workers.one(who)
        assert number == workers.one(who) and len(workers._processes) == 1
        assert set(workers.each([who] * 9, print)) > {number}
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.parametrize("most", [0, 2])
def test_errors_are_what_was_raised(most: int) -> None:
    for error in ValueError("a"), OSError(28, "No space left on device", "name"), KeyError("k"):
        with Workers(most) as workers, pytest.raises(type(error)) as caught:
            list(workers.each([functools.partial(fall, error)], lambda said: None))
        assert caught.value.args == error.args and getattr(caught.value, "filename", None) == getattr(
            error, "filename", None
        )
        if most and isinstance(error, KeyError):
            assert "in fall" in caught.value.__notes__[0]


@pytest.mark.parametrize(("sign", "said"), [(9, "killed by signal 9; .*memory.*--workers 1"), (0, "exit code 3")])
def test_a_worker_that_ends_is_an_error(sign: int, said: str) -> None:
    with Workers(2) as workers, pytest.raises(ValueError, match=f"a worker process .*{said}"):
        list(workers.each([functools.partial(leave, sign), who], lambda said: None))


def test_nothing_begins_after_the_last() -> None:
    begun: list[int] = []
    calls = [functools.partial(nap, 0.0 if i < 6 else 0.05, i) for i in range(100)]
    with Workers(2) as workers:
        results = workers.each(
            calls, lambda told: begun.append(told) if told is not None else None, last=lambda i: i == 5
        )
        found = list(results)
    assert found == list(range(len(found))) and 6 <= len(found) < 50 and sorted(begun) == found


def test_workers_do_not_outlive_a_kill() -> None:
    program = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from data.workers import Workers
from test_workers import stuck
with Workers(2) as workers:
    list(workers.each([stuck] * 2, lambda told: told and print(told, flush=True)))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        numbers = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_run_the_same_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that happens to be installed, nor what lies about."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "copy" / "data")
    (tmp_path / "functools.py").write_text("raise AssertionError")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path / "copy")!r})
import functools
from data.prepare.passes import ask
from data.workers import Workers
with Workers(1) as workers:
    print(workers.one(functools.partial(ask, functools.partial(eval, "__import__('data').__file__"))))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'copy' / 'data' / '__init__.py'}\n", done.stderr
