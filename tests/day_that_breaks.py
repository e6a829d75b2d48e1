"""A part of the GPU day for tests: one case hangs, one ends its process, one raises, and others work."""

import os
import time
from collections.abc import Iterator

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row


def cases(day: Day) -> Iterator[Case | LeftOut]:
    yield Case(name="first", run=lambda: {"answer": 1}, expected_s=0)
    yield Case(name="hangs", run=hang, expected_s=0, limit_s=1.0, form="kernel a")
    yield Case(name="after the hang", run=lambda: {"answer": 2}, expected_s=0, form="kernel a")
    yield Case(name="wrong", run=lambda: {"value": 5, "failed": "it is not 4"}, expected_s=0)
    yield Case(name="dies", run=lambda: os._exit(7), expected_s=0)
    yield Case(name="raises", run=lambda: {"answer": int("none")}, expected_s=0, form="kernel b")
    yield Case(name="after the error", run=lambda: {"answer": 3}, expected_s=0, form="kernel b")
    yield LeftOut(name="elsewhere", why="another chip's")
    yield Case(name="long", run=lambda: {"answer": 4}, expected_s=1e6)
    yield Case(name="alone", run=lambda: {"process": os.getpid()}, expected_s=0, process="other")
    yield Case(name="last", run=lambda: {"process": os.getpid()}, expected_s=0, process="third")


def hang() -> Row:
    print("not an event")
    time.sleep(600)
    return {}
