"""Real runs through the command line, and what they left: for tests of stopping, resuming and several processes."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mtx.checkpoint import Store

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("model.layers=1", "model.width=32", "model.mlp.width=64", "model.dropout=0.1", "batch.sequence_length=32"),
    *("steps=12", "log_every=2", "eval_every=4", "eval_sequences=64", "sample_tokens=0", "checkpoints.every_steps=3"),
]
ABOUT_TIME = {"step_s", "data_wait_s", "tokens_per_s", "tokens_per_s_per_device", "tflops_per_s_per_device", "mfu"}


BOOKS = tempfile.TemporaryDirectory(prefix="mtx-tests-")


@functools.cache
def book() -> list[str]:
    """Words for a little text, prepared once: a run that reads Python's documentation reads it for seconds."""
    lines = (f"Line {i} of a book about {('ducks', 'geese', 'swans')[i % 3]} has number {i * i}." for i in range(4000))
    Path(BOOKS.name, "book.txt").write_text("\n\n".join(lines))
    words = ["data=TextFiles", f"data.paths={BOOKS.name}/book.txt", f"data.folder={BOOKS.name}/shards"]
    words += ["data.cut_text_bytes=512", "data.split=9,1"]
    prepare = [sys.executable, "main.py", "prepare", "--config", "configs/quickstart.py", *words]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return words


def command(workdir: Path, *words: str) -> list[str]:
    """Words replace those of `SMALL` and `book` that set the same field."""
    config, usual = ([], SMALL) if "--config" in words else (["--config", "configs/quickstart.py"], [*SMALL, *book()])
    taken = {word.partition("=")[0] for word in words}
    small = [word for word in usual if word.partition("=")[0] not in taken and word.partition(".")[0] not in taken]
    return [sys.executable, "main.py", *config, *small, f"workdir={workdir}", *words]


@contextlib.contextmanager
def inheriting(*ignored: signal.Signals) -> Iterator[None]:
    """What is started inside ignores these of the signals that stop a run, as under nohup, and no others.

    The tests' own process may ignore some: a shell's `&` ignores SIGINT, and loading libtpu ignores SIGHUP, in C, which
    `signal.getsignal` does not see.
    """
    stops = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, signal.SIG_IGN if n in ignored else signal.SIG_DFL) for n in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(workdir: Path, *words: str, cwd: Path = ROOT, ignored: Sequence[signal.Signals] = ()) -> subprocess.Popen:
    argv = command(workdir, *words)
    with inheriting(*ignored):
        return subprocess.Popen(argv, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(child: subprocess.Popen, code: int | Sequence[int] = 0) -> str:
    try:
        output = child.communicate(timeout=400)[0]
    finally:
        child.kill()
    codes = [code] if isinstance(code, int) else code
    assert child.returncode in codes, f"exit code {child.returncode}, not {code}:\n{output}"
    return output


def train(workdir: Path, *words: str, code: int = 0) -> str:
    return end(begin(workdir, *words), code)


class Answer(NamedTuple):
    """Of a command line: its exit code (or exception), output and errors, and whether JAX is imported by then."""

    code: int | str
    out: str
    err: str
    jax: bool


CHILD = """
import contextlib, io, json, sys, main
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main.main(["main.py", *words])
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, out.getvalue(), err.getvalue(), "jax" in sys.modules]), flush=True)
"""


def ask(asked: list[list[str]], **environment: str) -> list[Answer]:
    """Command lines one after another in one process, so that what they import is imported once."""
    argv, env = [sys.executable, "-c", CHILD], os.environ | environment
    done = subprocess.run(argv, input=json.dumps(asked), capture_output=True, text=True, timeout=600, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    answers = [Answer(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked)
    return answers


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def begin_together(workdir: Path, processes: int, *words: str, devices: int = 8) -> list[subprocess.Popen]:
    cluster = ["--coordinator", f"127.0.0.1:{port()}", "--processes", str(processes)]
    each = ["--devices", str(devices // processes), *cluster]
    return [begin(workdir, *words, *each, "--process", str(i)) for i in range(processes)]


def rows(workdir: Path, *, timing: bool = False) -> list[dict]:
    """metrics.jsonl; without what differs from run to run."""
    path = workdir / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if timing or k not in ABOUT_TIME} for row in found]


def digests(workdir: Path, step: int = 12) -> dict[str, str]:
    """Of every array of a verified checkpoint."""
    return {name: a.digest for name, a in Store(workdir / "checkpoints").at(step).manifest.arrays.items()}


def wait_for(workdir: Path, child: subprocess.Popen, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not there():
        assert child.poll() is None, f"it ended too early:\n{child.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def at_step(workdir: Path, child: subprocess.Popen, step: int) -> None:
    wait_for(workdir, child, lambda: any(row["step"] >= step for row in _whole_rows(workdir)))


def _whole_rows(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def stop(child: subprocess.Popen, number: signal.Signals) -> None:
    os.kill(child.pid, number)
