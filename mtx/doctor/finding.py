"""What a check says, and how one asks another program."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    name: str
    found: str
    state: Literal["ok", "WARN", "FAIL"] = "ok"
    fix: str = ""
    """What to type; empty if nothing is wrong."""

    def __post_init__(self):
        assert bool(self.fix) == (self.state != "ok"), self


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks the doctor to look at."""

    folder: str
    need_gb: float
    dev: str
    coordinator: str | None
    """host:port, if it was given on the command line."""


class Answer(NamedTuple):
    code: int | None
    """Exit status; None: out of time, or the program cannot be started."""
    out: str
    error: str


def ask(argv: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> Answer:
    """Runs a program with changes to the environment."""
    try:
        child = subprocess.run(
            argv, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL, env=os.environ | (env or {})
        )
    except subprocess.TimeoutExpired:
        return Answer(None, "", f"no answer within {seconds:.0f} s")
    except OSError as error:
        return Answer(None, "", str(error))
    return Answer(child.returncode, child.stdout.decode(errors="replace"), child.stderr.decode(errors="replace"))
