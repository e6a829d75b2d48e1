"""What a person reads while a run goes on: lines on a stream and in a file, a progress bar on a terminal."""

import logging
import math
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mtx.metrics.clock import duration

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("mtx")

# Escape sequences whole, then whatever else a terminal would obey; a model's sample may hold anything.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def line(row: Mapping[str, float | int], steps: int, eta_s: float) -> str:
    """The console line of one step, from its row of metrics; what a row lacks is left out, an unknown MFU is n/a.

    Figures of speed should be those of `Machine.rates(clock.since_line())`, not of one step.
    """
    width = len(str(steps))
    parts = [
        f"step {row['step']:>{width}}/{steps}",
        f"loss {row['train/loss']:.4f}",
        f"lr {row['lr']:.3e}",
        f"grad-norm {row['train/grad_norm']:.3f}",
        f"tokens {_short(row['tokens'])}",
        _speed(row),
        f"TFLOP/s/device {_digits(row['tflops_per_s_per_device'])}",
        f"MFU {_percent(row['mfu'])}",
    ]
    if "memory_peak_bytes" in row:
        parts.append(f"memory {row['memory_peak_bytes'] / 1e9:.1f}/{row['memory_limit_bytes'] / 1e9:.1f} GB")
    parts += [f"data {_percent(row['data_wait_s'] / row['step_s'])}", f"ETA {duration(eta_s)}"]
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    return "  ".join(parts)


def _speed(row: Mapping[str, float | int]) -> str:
    whole, each = row["tokens_per_s"], row["tokens_per_s_per_device"]
    return f"{whole:,.0f} tokens/s" + (f" ({each:,.0f}/device)" if round(whole) != round(each) else "")


def _short(count: float) -> str:
    """Three or four digits and a unit: 102.4k."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else "n/a"


class Console:
    """Lines to a stream and to a log file; below them, where the stream is a terminal, a progress bar.

    While it is open, what the package logs (`logging.getLogger("mtx")`) goes through it and nowhere else.
    A signal handler should set a flag rather than write here: Python's files are not reentrant.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        total_steps: int,
        stream: TextIO | None = None,
        append: bool = False,
        first: bool = True,
    ) -> None:
        """`append`: go on in the log file of a resumed run. `first` is False on processes other than the first,
        which only say warnings, as plain lines.
        """
        self.stream: TextIO | None = sys.stderr if stream is None else stream
        self.file = path.open("a" if append else "w", encoding="utf-8") if path is not None and first else None
        self.lock = threading.RLock()
        self.bar = _bar(self.stream, total_steps) if first and _is_terminal(self.stream) else None
        self.handler = _Handler(self)
        self.before = (log.level, log.propagate)
        log.addHandler(self.handler)
        log.setLevel(logging.INFO if first else logging.WARNING)
        log.propagate = False  # else the root logger's handler would say it again

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the bar away, gives logging back, closes the file."""
        if self.bar is not None:
            self.bar.stop()
        log.removeHandler(self.handler)
        level, log.propagate = self.before
        log.setLevel(level)
        if self.file is not None:
            self.file.close()

    def say(self, text: str) -> None:
        """One line or several, for everybody; nothing on processes other than the first."""
        log.info("%s", text)

    def progress(self, step: int, *, loss: float, eta_s: float) -> None:
        """Moves the bar, where there is one."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, loss=f"{loss:.4f}", eta=duration(eta_s))

    def _write(self, text: str) -> None:
        text = _CONTROL.sub("", text)
        with self.lock:
            if self.file is not None:
                self._print_to_file(text)
            if self.bar is not None:
                from rich.text import Text

                self.bar.console.print(Text(text), soft_wrap=True)
            elif self.stream is not None:
                self._print(self.stream, text)

    def _print_to_file(self, text: str) -> None:
        try:
            print(text, file=self.file, flush=True)
        except OSError as error:  # a full disk, say: the run goes on, and says so once
            self.file = None
            self._write(f"the log file is given up: {error}")

    def _print(self, stream: TextIO, text: str) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
        except (OSError, ValueError):  # whoever read it is gone (ssh, tee, head); the run and its log file go on
            self.stream = None


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console._write(self.format(record))


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _bar(stream: TextIO, steps: int) -> "Progress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("ETA {task.fields[eta]}"),
        console=RichConsole(file=stream),
        refresh_per_second=2,
        transient=True,
        expand=True,
    )
    bar.add_task("", total=steps, loss="--", eta="--")
    bar.start()
    return bar
