"""Signals and the clock: when to save, when to stop, and how all processes agree on the moment.

The loop calls `tick` before each piece of work that all processes do together (a train step, a batch of the
evaluation). A signal on any process, or the first one's clock, calls a meeting: each process says how many ticks it
has begun, and what was asked for happens after the highest of these numbers, at the same place everywhere. Nothing is
sent to the devices for it, and a step without a meeting costs one lock.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from mtx import processes

log = logging.getLogger("mtx")

SAVE = "save"
OVER = "over"
"""What a process that leaves the loop says to the threads that wait for a meeting: they end, before Python does."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""A closed terminal sends the last; under nohup it is ignored, and stays so."""
AGAIN_S = {signal.SIGINT: 0.3, signal.SIGTERM: 10.0, signal.SIGHUP: 10.0}
"""A second signal this long after the first ends the process at once: whoever sends it does not want to wait. Launchers
may send SIGTERM twice in a row."""
POLL_MS = 10_000
"""A process asks again after this long whether there is a meeting; it is told at once when there is."""
MEETING_MS = 600_000
"""A process that does not come to a meeting for this long is lost."""


@dataclass(frozen=True)
class Request:
    """What was agreed on."""

    why: str
    """`save`, or what stops the run: `SIGTERM`, `the clock`."""

    @property
    def stops(self) -> bool:
        return self.why != SAVE


class Stopping:
    """One per run and process; a context, which gives the signals back to their earlier handlers."""

    def __init__(self, nothing_to_save: Callable[[str], None], alone: bool = True):
        """`nothing_to_save(why)` ends the process when a stop is asked for while the first work is being compiled.
        Unless `alone`, it is entered when JAX has joined the processes.
        """
        self._nothing_to_save = nothing_to_save
        self._changed = threading.Condition()
        self._ticks, self._begun = 0, False
        self._wanted: str | None = None
        self._meeting: str | None = None
        self._after: int | None = None
        self._number = 0
        self._closed = False
        self._lost: Exception | None = None
        self._alone, self._client = alone, None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Stopping":
        self._client = None if self._alone else processes.client()
        # The C handler writes the number to this pipe even while the main thread is inside a compiler.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        for number in SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._handlers[number] = signal.signal(number, lambda *_: None)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._signals = threading.Thread(target=self._watch_signals, name="signals", daemon=True)
        self._signals.start()
        self._meetings = threading.Thread(target=self._attend_meetings, name="meetings", daemon=True)
        if self._client is not None:
            self._meetings.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._write.send(b"\0")
        self._signals.join()
        self._read.close()
        self._write.close()
        if self._client is not None:
            with contextlib.suppress(Exception):  # another process has said it
                self._client.key_value_set(f"mtx/meeting/{self._number}/why", OVER)
            self._meetings.join(2 * POLL_MS / 1000)

    def tick(self) -> Request | None:
        """Call before each common piece of work. If it returns a request, the work was not counted: obey first."""
        with self._changed:
            while self._meeting is not None and self._after is None:
                self._changed.wait(1.0)
                if self._lost is not None:
                    raise self._lost
            if self._meeting is not None and self._after is not None and self._ticks >= self._after:
                request = Request(self._meeting)
                self._meeting = self._after = None
                if self._wanted == request.why:
                    self._wanted = None
                return request
            self._ticks += 1
            return None

    def begun(self) -> None:
        """The first piece of work is compiled and on its way: from now on there may be something to save."""
        with self._changed:
            self._begun = True

    def ask(self, why: str) -> None:
        """Call a meeting: `save`, or the reason to stop."""
        with self._changed:
            if self._meeting is not None and (self._meeting != SAVE or why == SAVE):
                return
            if self._wanted is None or self._wanted == SAVE:
                self._wanted = why
        self._call()

    def _call(self) -> None:
        if self._client is None:
            with self._changed:
                if self._wanted is not None:
                    self._meeting, self._after, self._wanted = self._wanted, self._ticks, None
                if self._meeting is not None and self._meeting != SAVE and not self._begun:
                    self._nothing_to_save(self._meeting)
        else:
            with self._changed:
                number, why = self._number, self._wanted
            if why is not None:
                with contextlib.suppress(Exception):  # somebody else has called this meeting
                    self._client.key_value_set(f"mtx/meeting/{number}/why", why)

    def _watch_signals(self) -> None:
        seen: float | None = None
        while True:
            data = self._read.recv(64)
            if self._closed or not data:
                return
            for number in data:
                if number not in SIGNALS:
                    continue
                name = signal.Signals(number).name
                if seen is None:
                    log.warning("%s: stopping as soon as this step is saved (a second Ctrl-C: at once).", name)
                    seen = time.monotonic()
                    self.ask(name)
                elif time.monotonic() - seen > AGAIN_S[number]:
                    log.warning("a second %s: stopping at once, without saving.", name)
                    leave(128 + number)

    def _attend_meetings(self) -> None:
        try:
            while not self._closed:
                self._attend_next()
        except Exception as error:
            with self._changed:
                self._lost = error if not self._closed else None
                self._changed.notify_all()

    def _attend_next(self) -> None:
        assert self._client is not None
        prefix = f"mtx/meeting/{self._number}"
        try:
            why = self._client.blocking_key_value_get(f"{prefix}/why", POLL_MS)
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return
            raise
        if why == OVER:
            self._closed = True
            return
        with self._changed:
            self._meeting, self._after = why, None
            ticks = self._ticks if self._begun else 0
        everybody = range(jax.process_count())
        self._client.key_value_set(f"{prefix}/at/{jax.process_index()}", str(ticks))
        said = [int(self._client.blocking_key_value_get(f"{prefix}/at/{p}", MEETING_MS)) for p in everybody]
        if why != SAVE and max(said) == 0:
            self._leave_together(prefix)
            self._nothing_to_save(why)
        with self._changed:
            self._after = max(said)
            self._number += 1
            self._changed.notify_all()
            while self._meeting is not None and not self._closed:
                self._changed.wait(0.2)  # the loop obeys before the next meeting
        self._call()  # what this process wanted may not be what the meeting was about

    def _leave_together(self, prefix: str) -> None:
        """The first process serves this store: it goes last."""
        assert self._client is not None
        self._client.key_value_set(f"{prefix}/gone/{jax.process_index()}", "")
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):
                for p in range(jax.process_count()):
                    self._client.blocking_key_value_get(f"{prefix}/gone/{p}", 5_000)
            time.sleep(0.5)


def leave(code: int) -> None:
    """Ends the process at once, and gives a terminal its cursor back."""
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr, flush=True)
    os._exit(code)


@contextlib.contextmanager
def each(minutes: float, do: Callable[[], None]) -> Iterator[None]:
    """Calls `do` from a thread each time that this many minutes have passed; 0: never."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(minutes * 60):
            do()

    if minutes:
        threading.Thread(target=run, name="clock", daemon=True).start()
    try:
        yield
    finally:
        stop.set()
