"""Weights & Biases and Trackio, which a run may use besides its own files."""

import contextlib
import html
import importlib
import json
import math
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtx.errors import ConfigError


def finite(row: Mapping[str, float | int]) -> dict[str, float | int]:
    """What can be plotted against the step."""
    return {name: value for name, value in row.items() if name != "step" and math.isfinite(value)}


@contextlib.contextmanager
def _needs(package: str) -> Iterator[None]:
    """Around the import of a tracker. Raises: ConfigError if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"reporting.{package} needs the package {package}, which is not installed: pip install -e '.[{package}]', "
            f"or reporting.{package}=None."
        ) from error


class _Tracked:
    """What a tracker knows of this run as `name`, and up to which step: it is never told a step twice.

    A run that resumes at step k repeats steps that the tracker has seen; they are the same, so they are kept. Both
    trackers write behind our back: of a killed run they may lack the last second, which metrics.jsonl has.
    """

    def __init__(self, name: str, folder: Path, step: int, before: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        known = json.loads(path.read_text()) if step and path.exists() else {"id": uuid.uuid4().hex[:8], "seen": 0}
        self.id: str = known["id"]
        self.seen = max(known["seen"], before) if step else 0
        path.write_text(json.dumps({"id": self.id, "seen": self.seen}) + "\n")

    def news(self, step: int, row: Mapping[str, float | int]) -> dict[str, float | int]:
        return finite(row) if step > self.seen else {}


class WandB:
    """A run at Weights & Biases."""

    def __init__(self, project: str, folder: Path, step: int, before: int, config: Mapping[str, Any]) -> None:
        with _needs("wandb"):
            self.package = importlib.import_module("wandb")
        self.tracked = _Tracked("wandb", folder, step, before)
        try:
            self.run = self.package.init(
                project=project,
                id=self.tracked.id,
                name=folder.name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
            )
        except self.package.errors.Error as error:
            raise ConfigError(
                f"reporting.wandb={project}: {error}; type `wandb login`, or set WANDB_MODE=offline, "
                "or reporting.wandb=None."
            ) from error

    def write(self, step: int, row: Mapping[str, float | int]) -> None:
        if news := self.tracked.news(step, row):
            self.run.log(news, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        if step > self.tracked.seen:
            self.run.log({name: self.package.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run in Trackio's database on this machine."""

    def __init__(self, project: str, folder: Path, step: int, before: int, config: Mapping[str, Any]) -> None:
        with _needs("trackio"):
            self.package = importlib.import_module("trackio")
        self.tracked = _Tracked("trackio", folder, step, before)
        name = f"{folder.name}-{self.tracked.id}"
        self.run = self.package.init(project=project, name=name, config=dict(config), resume="allow")

    def write(self, step: int, row: Mapping[str, float | int]) -> None:
        if news := self.tracked.news(step, row):
            self.run.log(news, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        if step > self.tracked.seen:
            self.run.log({name: self.package.Markdown(f"```\n{text}\n```")}, step=step)

    def close(self) -> None:
        self.run.finish()
