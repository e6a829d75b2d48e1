"""A user's folder with a package `my_tasks`, whose module `toys` is user_tasks.py, and with its texts."""

import contextlib
import functools
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import SeqioTask

WORDS = ("the", "cat", "zebra", "héron", "\U0001f999")
LINES = {"a_train": 60, "a_validation": 8, "b_train": 20, "b_validation": 5}
keep = contextlib.ExitStack()
"""Of the process: importing TensorFlow and a module of tasks takes seconds, and seqio's registry holds one."""


@contextlib.contextmanager
def entered() -> Iterator[Path]:
    """The folder, the same in all test files, in which Python works and from which it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(_folder())
        patch.syspath_prepend(_folder())
        yield _folder()


@functools.cache
def _folder() -> Path:
    folder = Path(keep.enter_context(tempfile.TemporaryDirectory()))
    package = folder / "my_tasks"
    package.mkdir()
    for name, content in {"__init__": "", "broken": "nothing\n", "lacks": "import nobody_has_this\n"}.items():
        (package / f"{name}.py").write_text(content)
    shutil.copy(Path(__file__).parent / "user_tasks.py", package / "toys.py")
    chance = random.Random(5)
    for name, count in LINES.items():
        lines = [
            f"{name} {i} " + " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 40))) for i in range(count)
        ]
        (package / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for split in ("train", "validation"):
        (package / f"qa_{split}.txt").write_text("one\tEins\ntwo\tzwei\nthree\tdrei\n")
        (package / f"numbers_{split}.txt").write_text("0 7 0 12\n0 0 5\n0\n")
    return folder


def texts(folder: Path, name: str) -> list[str]:
    """The documents of a Task's split, as a_train."""
    return (folder / "my_tasks" / f"{name}.txt").read_text().splitlines()


def task(name: str, **fields) -> SeqioTask:
    """One of user_tasks.py."""
    return SeqioTask(module="my_tasks.toys", mixture=name, **fields)
