"""Checks and times mtx on the accelerator of this machine, the most telling first, in the minutes that there are.

    python -m benchmarks.gpu_day --minutes 9 --out DIR     # all parts
    python -m benchmarks.gpu_day --only step_fast          # one part; --only may be given several times

It needs jax, flax, optax and numpy; torch, where it is installed, runs the rivals. Every part runs in processes of its
own, so that a kernel that hangs or ends its process costs one case. DIR gets results.jsonl (a line per case, as it
ends), results.md (the same as tables, after each part) and log.txt; an abrupt end keeps them, and a later run into the
same DIR adds to them. The exit code is 1 if a case failed. docs/gpu_day.md.
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
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.tables import cell, markdown

ROOT = Path(__file__).resolve().parents[2]
SHARES = {
    "where": 0.06,
    "kernels_right": 0.22,
    "step_right": 0.14,
    "kernels_fast": 0.16,
    "step_fast": 0.42,
    "meshes": 0.30,
    "tuning": 0.0,
}
"""The parts in their order. In the first round a part gets its share of the time that is left, among the parts that are
left; in the second, all of it. Tuning has the rest; `meshes` takes nothing where there is one chip."""
START_LIMIT_S = 90.0
"""Seconds in which a process must have reached its first case."""
RESERVE_S = 5.0
"""Seconds at the end in which nothing runs any more."""
LOG_BYTES = 4_000_000
"""Bytes of the log's end that are kept."""


@dataclass
class Run:
    """The whole day: its clock, its files, and what has ended."""

    out: Path
    deadline: float
    cache: str
    """A folder for compiled programs."""
    began: str = field(default_factory=lambda: dt.datetime.now().isoformat(timespec="seconds"))
    records: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ended: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Cases of each part that are not to run again."""
    waiting: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """Cases of each part for which there was no time, and how much they would need."""
    device: str | None = None
    """The kind of the first device, once it is known."""

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def read(self) -> None:
        """Takes over what an earlier run left in the folder."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.out / "results.jsonl").read_text().splitlines()
            self.records = [json.loads(line) for line in lines]

    def record(self, part: str, case: str, row: dict[str, Any]) -> None:
        """Appends one result to results.jsonl and says it."""
        self.ended[part].append(case)
        self.waiting[part].pop(case, None)
        entry = {"part": part, "case": case, **row, "run": self.began}
        self.records.append(entry)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        shown = ", ".join(f"{name} {cell(value)}" for name, value in row.items() if name not in ("notes", "failed"))
        failed = f"FAILED: {row['failed']} " if "failed" in row else ""
        print(f"[{self.left_s():4.0f} s left] {part}: {case}: {failed}{shown}", flush=True)

    def results(self, part: str) -> dict[str, dict[str, Any]]:
        """Rows of this run's cases of a part."""
        return {entry["case"]: entry for entry in self.records if (entry["part"], entry["run"]) == (part, self.began)}

    def write_tables(self) -> None:
        """Writes results.md anew, in one step, so that an abrupt end leaves the old or the new one."""
        newest = {(record["part"], record["case"]): record for record in self.records}
        (new := self.out / "results.md.new").write_text(markdown(list(newest.values()), self.began[:10]))
        new.replace(self.out / "results.md")
        if (log := self.out / "log.txt").stat().st_size > 2 * LOG_BYTES:
            log.write_bytes(log.read_bytes()[-LOG_BYTES:])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="how long all parts together may take")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_day", help="folder of the results")
    parser.add_argument("--only", choices=SHARES, action="append", help="run this part; may be given several times")
    flags = parser.parse_args()
    deadline = time.monotonic() + 60 * flags.minutes - RESERVE_S
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        (flags.out / "log.txt").touch()
    except OSError as error:
        parser.error(f"--out {flags.out} is no folder to write to: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="mtx-gpu-day-") as cache:
        day = Run(flags.out, deadline, cache)
        day.read()
        try:
            run_day(day, flags.only)
        except KeyboardInterrupt:
            print("stopped.")
        finally:
            day.write_tables()
    print(f"{day.out / 'results.md'} has the tables.")
    raise SystemExit(1 if any("failed" in record for record in day.records if record["run"] == day.began) else 0)


def run_day(day: Run, only: list[str] | None) -> None:
    """Runs the parts in two rounds, and records what there was no time for."""
    known = any(record["part"] == "where" for record in day.records)
    parts = [part for part in SHARES if not only or part in only or (part == "where" and not known)]
    shares = {part: SHARES[part] for part in parts}
    for part in parts:
        total = sum(shares[later] for later in parts[parts.index(part) :])
        if part != "tuning":
            run_part(day, f"benchmarks.gpu_day.{part}", day.left_s() * (shares[part] / total if total else 1.0))
        if part == "where" and day.results("where").get("machine", {}).get("count") == 1:
            shares |= {"meshes": 0.0} if "meshes" in shares else {}
        day.write_tables()
    for part in [part for part in parts if day.waiting[part]] + [part for part in parts if part == "tuning"]:
        run_part(day, f"benchmarks.gpu_day.{part}", day.left_s())
        day.write_tables()
    for part, waiting in day.waiting.items():
        for case, why in list(waiting.items()):
            day.record(part, case, {"left_out": why})


def run_part(day: Run, module: str, budget_s: float) -> None:
    """Runs a part, given by its module, in one process after another until one finishes it."""
    deadline, part = min(time.monotonic() + budget_s, day.deadline), module.rpartition(".")[2]
    starts_failed = 0
    while (left_s := deadline - time.monotonic()) > 0 and starts_failed < 2:
        request = {"module": module, "seconds": left_s, "ended": day.ended[part], "broken": day.broken}
        request |= {"results": day.results(part), "device": day.device}
        with (day.out / "log.txt").open("a") as log:
            worker = Worker(day, part, request, log)
            if worker.run():
                return
        starts_failed += not worker.reached_a_case


class Worker:
    """One process that runs cases of a part, watched: a line of its output is one event."""

    def __init__(self, day: Run, part: str, request: dict[str, Any], log: Any):
        self.day, self.part = day, part
        self.case, self.limit_s, self.form = "its start", START_LIMIT_S, None
        self.reached_a_case = False
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # torch needs its share of the memory
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "JAX_COMPILATION_CACHE_DIR": day.cache,  # for processes that are started again
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_day.worker", json.dumps(request)],
            cwd=ROOT,
            env=environment | os.environ,
            stdin=subprocess.PIPE,  # it ends when this process does
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.put(line)

    def run(self) -> bool:
        """Obeys the events until the process ends or has to be ended. Returns whether the part is finished."""
        try:
            silent_since = time.monotonic()
            while True:
                try:
                    event = json.loads(self.lines.get(timeout=0.2))
                except queue.Empty:
                    if self._is_over(time.monotonic() - silent_since):
                        return False
                    continue
                silent_since = time.monotonic()
                if event["event"] in ("finished", "next process"):
                    return event["event"] == "finished"
                self._obey(event)
        finally:
            self._end()

    def _obey(self, event: dict[str, Any]) -> None:
        day, part, case = self.day, self.part, event["case"]
        self.reached_a_case = True
        match event["event"]:
            case "start":
                self.case, self.limit_s, self.form = case, event["limit_s"], event["form"]
                return
            case "left out":
                day.record(part, case, {"left_out": event["why"]})
            case "no time":
                day.waiting[part][case] = event["why"]
            case "end":
                row = event["row"]
                if "failed" in row:
                    self._fail(row["failed"], row)
                else:
                    day.record(part, case, row)
                    day.device = row["device"] if (part, case) == ("where", "machine") else day.device
        self.case, self.limit_s, self.form = f"what follows {case}", START_LIMIT_S, None

    def _is_over(self, silent_s: float) -> bool:
        """Returns whether the process has ended, hangs, or outlives the day, and records which."""
        if (code := self.process.poll()) is not None and self.lines.empty():
            self._fail(f"its process ended with code {code}; see log.txt")
        elif self.day.left_s() <= 0:
            self.day.record(self.part, self.case, {"left_out": "the day ended before it did"})
        elif silent_s > self.limit_s:
            self._fail(f"ended after {self.limit_s:.0f} s: it hangs")
        else:
            return False
        return True

    def _fail(self, why: str, row: dict[str, Any] | None = None) -> None:
        if self.form and self.form not in self.day.broken:
            self.day.broken.append(self.form)
        self.day.record(self.part, self.case, (row or {}) | {"failed": why})

    def _end(self) -> None:
        """Ends the process and what it started; one that the driver holds is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        assert self.process.stdin is not None
        self.process.stdin.close()


if __name__ == "__main__":
    main()
