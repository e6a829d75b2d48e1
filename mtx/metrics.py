"""What a run reports: one line on the console, one JSON object per step in metrics.jsonl."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path


class Clock:
    """Seconds of the steps whose metrics have arrived; the first, which compiles, stands apart."""

    def __init__(self):
        self.last = time.perf_counter()
        self.steady_s = 0.0
        self.steady_steps = 0

    def lap(self) -> float:
        """Seconds since the previous lap."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def count(self, seconds: float) -> None:
        self.steady_s += seconds
        self.steady_steps += 1

    def remaining_s(self, steps: int) -> float:
        return math.nan if not self.steady_steps else steps * self.steady_s / self.steady_steps


class Writer:
    """Writes metrics.jsonl anew; floats at full precision, null for what is not finite."""

    def __init__(self, path: Path | None):
        self.file = None if path is None else path.open("w")

    def write(self, row: Mapping[str, float | int]) -> None:
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            print(json.dumps(finite), file=self.file, flush=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def line(row: Mapping[str, float | int], steps: int, eta_s: float) -> str:
    """The console line of one step."""
    width = len(str(steps))
    return (
        f"step {row['step']:>{width}}/{steps}  loss {row['train/loss']:.4f}  lr {row['lr']:.3e}  "
        f"grad-norm {row['train/grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  ETA {duration(eta_s)}"
        + (f"  skipped {row['skipped']}" if row["skipped"] else "")
    )


def duration(seconds: float) -> str:
    """`1:02:03`, or `--` when unknown."""
    if math.isnan(seconds):
        return "--"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
