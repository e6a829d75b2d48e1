"""Where metrics go: metrics.jsonl always, TensorBoard unless switched off, Weights & Biases and Trackio if asked."""

import contextlib
import importlib
import json
import logging
import math
import os
import platform
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtx.errors import Problem, StorageError
from mtx.metrics.trackers import Trackio, WandB, finite

log = logging.getLogger("mtx")

Row = Mapping[str, float | int]


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Where metrics go besides the console and metrics.jsonl."""

    tensorboard: bool = True
    """Event files in the run folder's tensorboard/."""
    wandb: str | None = None
    """Project at Weights & Biases; needs the wandb extra and an account, or WANDB_MODE=offline."""
    trackio: str | None = None
    """Project in Trackio, which keeps it on this machine; needs the trackio extra."""

    def check(self) -> Iterator[Problem]:
        for field in ("wandb", "trackio"):
            if getattr(self, field) == "":
                yield field, "is empty; name a project, or None"


class Writer(Protocol):
    def write(self, step: int, row: Row) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """All places that metrics go to; silent on processes other than the first (`folder` is None there)."""

    def __init__(
        self,
        folder: Path | None,
        resume_step: int = 0,
        reporting: Reporting = Reporting(),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """After a resume at a step, what was written of later steps is dropped; 0 starts anew.

        `config` is what trackers show beside the run. Raises: ConfigError if a tracker is not installed or refuses.
        """
        self.writers: list[Writer] = []
        self.held: tuple[int, set[str]] = (0, set())
        if folder is None:
            return
        step = resume_step
        self.held = (step, _names(folder / "metrics.jsonl", step) if step else set())
        before = _last_step(folder / "metrics.jsonl") if step else 0
        if reporting.wandb is not None:
            self.writers.append(WandB(reporting.wandb, folder, step, before, config or {}))
        if reporting.trackio is not None:
            self.writers.append(Trackio(reporting.trackio, folder, step, before, config or {}))
        self.writers.insert(0, JsonLines(folder / "metrics.jsonl", step))
        if reporting.tensorboard:
            self.writers.insert(1, TensorBoard(folder / "tensorboard", step))

    def write(self, step: int, row: Row) -> None:
        """One row: names to numbers. What is not finite is null in metrics.jsonl and a gap elsewhere.

        A row of the step that a run resumed from, which was written before it stopped, is not written again.
        """
        if step == self.held[0] and set(row) <= self.held[1]:
            return
        try:
            for writer in self.writers:
                writer.write(step, row)
        except OSError as error:
            raise StorageError(f"the metrics of step {step} cannot be written: {error}.") from error

    def text(self, step: int, name: str, text: str) -> None:
        """A sample, say, for TensorBoard and the trackers; metrics.jsonl holds numbers alone."""
        for writer in self.writers:
            writer.text(step, name, text)

    def close(self) -> None:
        """Ends every writer. A second time does nothing."""
        while self.writers:
            with contextlib.suppress(OSError):  # what cannot be flushed was said when it was written
                self.writers.pop().close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines:
    """One object per line, at full precision; each is in the file when `write` returns."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if step and path.exists():
            _keep_until(path, step)
        self.file = path.open("a" if step else "w", encoding="utf-8")

    def write(self, step: int, row: Row) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        print(json.dumps({"step": step} | numbers), file=self.file, flush=True)

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def close(self) -> None:
        self.file.close()


def _rows(path: Path) -> Iterator[tuple[bytes, int]]:
    """Each line with its step; a half-written one has a step beyond all others."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield line, int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                yield line, 2**63


def _last_step(path: Path) -> int:
    """The last step that is written there."""
    return max((step for _, step in _rows(path) if step < 2**63), default=0) if path.exists() else 0


def _names(path: Path, step: int) -> set[str]:
    """What is written there of a step."""
    if not path.exists():
        return set()
    return {name for line, found in _rows(path) if found == step for name in json.loads(line)}


def _keep_until(path: Path, last: int) -> None:
    """Drops the rows after a step, in one move: a kill leaves the old file or the new one."""
    short = path.with_name(f"{path.name}.part")
    dropped = 0
    with short.open("wb") as file:
        for line, step in _rows(path):
            if step <= last and line.endswith(b"\n"):
                file.write(line)
            else:
                dropped += 1
        file.flush()
        os.fsync(file.fileno())
    short.replace(path)
    if dropped:
        log.info("%s: dropped %d rows later than step %d, which are run again", path.name, dropped, last)


class TensorBoard:
    """Event files. Each row is in the file when `write` returns: tensorboardX's own writer queues them, and a kill
    would lose steps that the checkpoint has; its flush waits for the disk at every step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.protos: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        folder.mkdir(parents=True, exist_ok=True)
        if not step:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        # TensorBoard reads files in the order of their names.
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.6f}.{platform.node()}"
        self.file = (folder / name).open("xb", buffering=0)
        self._add(0, file_version="brain.Event:2")
        if step:  # TensorBoard forgets what earlier files say of this step and later ones
            self._add(step + 1, session_log=self.protos.SessionLog(status=self.protos.SessionLog.START))

    def write(self, step: int, row: Row) -> None:
        from tensorboardX import summary

        values = [summary.scalar(name, value).value[0] for name, value in finite(row).items()]
        self._add(step, summary={"value": values})

    def text(self, step: int, name: str, text: str) -> None:
        from tensorboardX import summary

        self._add(step, summary=summary.text(name, f"```\n{text}\n```"))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = self.protos.Event(wall_time=time.time(), step=step, **content).SerializeToString()
        size = struct.pack("<Q", len(data))  # a TFRecord: length, its checksum, data, its checksum
        checks = [struct.pack("<I", masked_crc32c(part)) for part in (size, data)]
        self.file.write(size + checks[0] + data + checks[1])

    def close(self) -> None:
        self.file.close()
