"""Checks and times mtx on the accelerator of this machine, the most telling first, in the minutes that there are.

    python -m benchmarks.gpu_day --minutes 9 --out DIR     # all parts
    python -m benchmarks.gpu_day --only step_fast          # one part; --only may be given several times

It needs jax, flax, optax and numpy; torch, where it is installed, runs the rivals. Every part runs in processes of its
own, so that a kernel that hangs or ends its process costs one case. DIR gets results.jsonl (a line per case, as it
ends), results.md (the same as tables, after each part) and log.txt; an abrupt end keeps them. docs/gpu_day.md.
"""

import argparse
import contextlib
import datetime as dt
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_day.tables import cell, markdown

ROOT = Path(__file__).resolve().parents[2]
SHARES = {
    "where": 0.06,
    "kernels_right": 0.25,
    "step_right": 0.16,
    "kernels_fast": 0.18,
    "step_fast": 0.35,
    "meshes": 0.30,
    "tuning": 0.10,
}
"""The parts in their order. A part gets its share of the time that is left, among the parts that are left."""
START_LIMIT_S = 180.0
"""Seconds in which a process must have reached its first case."""
RESERVE_S = 5.0
"""Seconds at the end in which nothing runs any more."""


@dataclass
class Run:
    """The whole day: its clock, its files, and what has ended."""

    out: Path
    deadline: float
    records: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, part: str, case: str, row: dict[str, Any]) -> None:
        """Appends one result to results.jsonl and says it."""
        entry = {"part": part, "case": case, **row}
        self.records.append(entry)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if "failed" in row:
            shown = f"FAILED: {row['failed']}"
        elif "left_out" in row:
            shown = f"left out: {row['left_out']}"
        else:
            shown = ", ".join(f"{name} {cell(value)}" for name, value in row.items() if name != "notes")
        print(f"[{self.left_s():4.0f} s left] {part}: {case}: {shown}", flush=True)

    def write_tables(self) -> None:
        """Writes results.md anew, in one step, so that an abrupt end leaves the old or the new one."""
        text = markdown(self.records, dt.date.today().isoformat())
        (new := self.out / "results.md.new").write_text(text)
        new.replace(self.out / "results.md")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="how long all parts together may take")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_day", help="folder of the results")
    parser.add_argument("--only", choices=SHARES, action="append", help="run this part; may be given several times")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    day = Run(flags.out, time.monotonic() + 60 * flags.minutes - RESERVE_S)
    parts = [part for part in SHARES if not flags.only or part in flags.only]
    with tempfile.TemporaryDirectory(prefix="mtx-gpu-day-") as cache, (day.out / "log.txt").open("a") as log:
        for i, part in enumerate(parts):
            share = SHARES[part] / sum(SHARES[later] for later in parts[i:])
            run_part(day, f"benchmarks.gpu_day.{part}", day.left_s() * share, cache, log)
            day.write_tables()
    print(f"{day.out / 'results.md'} has the tables.")
    raise SystemExit(1 if any("failed" in record for record in day.records) else 0)


def run_part(day: Run, module: str, budget_s: float, cache: str, log: IO[str]) -> None:
    """Runs a part, given by its module, in one process after another until one finishes it."""
    deadline = min(time.monotonic() + budget_s, day.deadline)
    ended: list[str] = []
    while (left_s := deadline - time.monotonic()) > 0:
        request = {"module": module, "seconds": left_s, "ended": ended, "broken": day.broken}
        if run_process(day, request, cache, log):
            return
    day.record(module.rpartition(".")[2], "what follows", {"left_out": "no time"})


def run_process(day: Run, request: dict[str, Any], cache: str, log: IO[str]) -> bool:
    """Runs one worker to its end and records its cases. Returns whether the part is over.

    A worker that is silent for longer than its case's limit, or outlives the day, is killed with its children; one
    that ends before its case does has failed that case. One that fails outside of a case ends the part.
    """
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch needs its share of the memory
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", cache),  # for workers started again
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    command = [sys.executable, "-m", "benchmarks.gpu_day.worker", json.dumps(request)]
    worker = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,  # it ends when this process does
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    part, ended = request["module"].rpartition(".")[2], request["ended"]
    now = Now()

    def fail(why: str) -> None:
        if now.form and now.form not in day.broken:
            day.broken.append(now.form)
        ended.append(now.case)
        day.record(part, now.case, {"failed": why})

    lines = lines_of(worker)
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(now.limit_s, day.left_s())))
            except queue.Empty:
                fail(
                    f"ended after {now.limit_s:.0f} s: it hangs" if day.left_s() > 0 else "the day ended before it did"
                )
                break
            if not line:
                fail(f"its process ended with code {worker.wait()}; see log.txt")
                break
            event = json.loads(line)
            match event["event"]:
                case "finished":
                    return True
                case "next process":
                    return False
                case "start":
                    now = Now(event["case"], event["limit_s"], event["form"], in_case=True)
                case "left out":
                    ended.append(event["case"])
                    day.record(part, event["case"], {"left_out": event["why"]})
                    now = Now(f"what follows {event['case']}")
                case "end":
                    if "failed" in event["row"]:
                        fail(event["row"]["failed"])
                    else:
                        ended.append(now.case)
                        day.record(part, now.case, event["row"] | {"seconds": event["seconds"]})
                    now = Now(f"what follows {now.case}")
        return not now.in_case
    finally:
        kill(worker)


@dataclass(frozen=True)
class Now:
    """What a worker is doing: first it starts, which may take long."""

    case: str = "its start"
    limit_s: float = START_LIMIT_S
    form: str | None = None
    in_case: bool = False


def lines_of(worker: subprocess.Popen[str]) -> queue.Queue[str]:
    """The lines that a worker writes, as they come, and an empty one when it has ended."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert worker.stdout is not None
        with worker.stdout:
            for line in worker.stdout:
                lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def kill(worker: subprocess.Popen[str]) -> None:
    """Ends a worker and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    assert worker.stdin is not None
    worker.stdin.close()


if __name__ == "__main__":
    main()
