"""A process that does what this one must not: what it gives, how it ends, and that it never outlives its reader."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import tensorflow_process
from data.tensorflow_process import Wrong

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import os, time
import numpy as np
from data.tensorflow_process import Wrong

def give(count):
    print("noise")
    yield {"pid": os.getpid(), "sent": "plain"}
    yield np.arange(count)
    yield b"bytes " * count

def refuse():
    yield {"pid": os.getpid()}
    raise ValueError("words of its own")

def wrong():
    raise Wrong("split", "is no split")
    yield

def sleep():
    yield {"pid": os.getpid()}
    time.sleep(100)

def load():
    from data import tensorflow_process
    tensorflow_process.tensorflow()
    yield {}

def die():
    yield {"pid": os.getpid()}
    raise SystemError("the last words")
"""


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "user_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    tensorflow_process.rest()


def stream(name: str, silence_s: float = 30.0, **arguments) -> Any:
    return tensorflow_process.stream(f"user_work:{name}", arguments, silence_s=silence_s, doing="the test")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] == "Z"


def test_it_gives_what_is_yielded_there_and_serves_again() -> None:
    first, tokens, text = stream("give", count=200_000)
    assert first["sent"] == "plain" and first["pid"] != os.getpid()
    assert np.array_equal(tokens, np.arange(200_000)) and tokens.dtype == np.int32
    assert text == b"bytes " * 200_000
    again, *_ = stream("give", count=1)
    assert again["pid"] == first["pid"]


def test_one_that_died_meanwhile_is_replaced() -> None:
    first, *_ = stream("give", count=1)
    os.kill(first["pid"], signal.SIGKILL)
    while tensorflow_process._idle[0].is_alive():
        time.sleep(0.01)
    again, *_ = stream("give", count=1)
    assert again["pid"] != first["pid"]


def test_tensorflow_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError")
    with pytest.raises(ValueError, match=r"this needs TensorFlow, which is not installed: pip install 'mtx\[seqio\]'"):
        list(stream("load"))


def test_its_errors_are_raised_here() -> None:
    with pytest.raises(ValueError, match=r"^words of its own$"):
        list(stream("refuse"))
    with pytest.raises(Wrong, match=r"^data\.split is no split\.$") as caught:
        list(stream("wrong"))
    assert caught.value.args == ("split", "is no split")
    with pytest.raises(ValueError, match=r"(?s)the test: the process ended with code 1\..*the last words"):
        list(stream("die"))


def test_silence_kills_it() -> None:
    items = stream("sleep", silence_s=0.2)
    pid = next(items)["pid"]
    with pytest.raises(ValueError, match=r"nothing came for 0\.2 s, .* Python is in its graphs"):
        next(items)
    assert gone(pid)


def test_it_ends_with_who_no_longer_reads() -> None:
    items = stream("sleep")
    pid = next(items)["pid"]
    items.close()
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends at its next word")
def test_it_ends_with_who_was_killed(tmp_path: Path) -> None:
    program = (
        "from data.tensorflow_process import stream\n"
        "for item in stream('user_work:sleep', {}, silence_s=99, doing=''): print(item['pid'], flush=True)"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    reader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert reader.stdout is not None
    with reader.stdout as said:
        pid = int(said.readline())
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    until = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_folder_that_one_is_in_is_looked_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/somewhere"])
    monkeypatch.chdir(tmp_path)
    assert tensorflow_process.path() == ["/somewhere", str(tmp_path)]
    monkeypatch.setattr(sys, "path", ["", "/somewhere"])
    assert tensorflow_process.path() == [str(tmp_path), "/somewhere"]
