"""Calls in worker processes, or in this one: what each returns, in the order of the calls.

A worker is a fresh Python that is told over a pipe what to call, and ends when the pipe does: nothing of it outlives
the process that started it, however that ends. (multiprocessing's own workers would first run the main program again,
and its pool waits for ever for one that was killed.)
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Tell = Callable[[Any], None]
"""Is told how far a call is; None: only that time has passed."""
Call = Callable[[Tell], Any]
"""Something to do; from another process, if it can be pickled."""
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys; from data.workers import work; work(int(sys.argv[1]))"
TICK_S = 0.5
"""Between calls of `tell` that say nothing."""


class Workers:
    """Up to `most` processes, started when there is something to do; 0: this process does it all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._processes: dict[Connection, subprocess.Popen] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends them, whatever they do: what a call keeps, it has under its name, or has not."""
        for process in self._processes.values():
            process.kill()
        for pipe, process in self._processes.items():
            process.wait()
            pipe.close()
        self._processes.clear()

    def one(self, call: Call, tell: Tell = lambda told: None) -> Any:
        """What the call returns. Raises: what it raises, and ValueError if its process ends before."""
        (result,) = self.each([call], tell)
        return result

    def each(self, calls: Iterable[Call], tell: Tell, *, last: Callable[[Any], bool] = lambda said: False) -> Iterator:
        """What the calls return, in their order; none is begun after one whose result is `last`. Raises: see `one`."""
        if not self._most:
            for call in calls:
                yield call(tell)
            return
        waiting, busy, done, turn = deque(enumerate(calls)), {}, {}, 0
        while waiting or busy:
            for pipe in self._free(busy, len(waiting)):
                busy[pipe], call = waiting.popleft()
                self._send(pipe, call)
            ready = set(wait(busy, TICK_S))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                kind, said = self._receive(pipe)
                if kind == "told":
                    tell(said)
                elif kind == "raised":
                    raise said
                else:
                    done[busy.pop(pipe)] = said
                    if last(said):
                        waiting.clear()
            tell(None)
            while turn in done:
                yield done.pop(turn)
                turn += 1

    def _free(self, busy: dict[Connection, int], wanted: int) -> list[Connection]:
        """Pipes of up to `wanted` workers that do nothing."""
        while len(self._processes) < min(self._most, len(busy) + wanted):
            self._start()
        return [pipe for pipe in self._processes if pipe not in busy][:wanted]

    def _start(self) -> None:
        ours, theirs = Pipe()
        number = theirs.fileno()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._processes[ours] = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(number)],
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for who waits for them
        )
        theirs.close()
        self._send(ours, sys.path)

    def _send(self, pipe: Connection, content: Any) -> None:
        try:
            pipe.send(content)
        except ConnectionError as error:
            raise self._dead(pipe) from error

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._dead(pipe) from error

    def _dead(self, pipe: Connection) -> ValueError:
        code = self._processes[pipe].wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        memory = "; was the memory short? Fewer need less: --workers 1" if code == -9 else ""
        return ValueError(f"a worker process {how}{memory}.")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(number: int) -> None:
    """The life of a worker: calls what comes through the pipe of this number until it is closed."""
    pipe = Connection(number)
    with contextlib.suppress(EOFError, ConnectionError):
        sys.path[:] = pipe.recv()
        while True:
            pipe.send(_outcome(pipe.recv(), lambda told: pipe.send(("told", told))))
    os._exit(0)  # some packages hang in their own ends


def _outcome(call: Call, tell: Tell) -> tuple[str, Any]:
    try:
        return "returned", call(tell)
    except Exception as error:
        trace = traceback.format_exc()
        if not isinstance(error, (ValueError, OSError)):
            error.add_note(f"In a worker process:\n{trace}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return "raised", RuntimeError(f"in a worker process:\n{trace}")
        return "raised", error
