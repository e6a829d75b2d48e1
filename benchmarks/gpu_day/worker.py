"""Runs the cases of one part in a process of its own: `python -m benchmarks.gpu_day.worker '{"module": ...}'`.

Its argument is a JSON object: `module` of the part, `seconds` that are left for it, `ended` (names of cases not to run
again), `results` (rows of those that ran), `broken` (kernel forms) and `device` (the kind that the day began with, or
null). Each line of standard output is one event, a JSON object; whatever else is printed goes to standard error.
"""

import importlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu_day.cases import Case, Day, LeftOut
from pallas_kernels.attention import Chip


def run_part(
    module: str, seconds: float, ended: list[str], results: dict[str, Any], broken: list[str], device: str | None
) -> None:
    """Runs every case of a part that has not ended, until the time is over or a case needs another process."""
    deadline = time.monotonic() + seconds
    chip = Chip.of(jax.devices()[0])
    refuse_another_device(chip, device)
    part, process, failed_forms = importlib.import_module(module), None, set(broken)
    for case in part.cases(Day(chip=chip, broken=frozenset(broken), results=results)):
        if case.name in ended:
            continue
        if isinstance(case, LeftOut):
            emit("left out", case.name, why=case.why)
        elif case.form in failed_forms:
            emit("left out", case.name, why=f"{case.form} failed before")
        elif case.expected_s > deadline - time.monotonic():
            emit("no time", case.name, why=f"no time: about {case.expected_s:.0f} s")
        elif process not in (None, case.process):
            emit("next process", case.name)
            return
        else:
            process = case.process
            row, raised = run_case(case)
            if "failed" in row and case.form:
                failed_forms.add(case.form)
            if raised:  # an error may have broken the device's context, in which all that follows would fail
                emit("next process", case.name)
                return
    emit("finished", module)


def run_case(case: Case) -> tuple[dict[str, Any], bool]:
    """Runs one case and reports it. Returns its row, and whether it raised an exception."""
    limit_s = max(4 * case.expected_s, 45.0) if case.limit_s is None else case.limit_s
    emit("start", case.name, limit_s=limit_s, form=case.form)
    start, raised = time.monotonic(), False
    try:
        row = case.run()
    except LeftOut as left_out:
        emit("left out", case.name, why=left_out.why)
        return {}, False
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        row, raised = {"failed": f"{type(error).__name__}: {first_line[:300]}"}, True
    emit("end", case.name, row=row | {"seconds": round(time.monotonic() - start, 2)})
    return row, raised


def refuse_another_device(chip: Chip, device: str | None) -> None:
    """JAX falls back to the CPU where a plugin cannot start: toy numbers must not pass for the accelerator's.

    Raises: RuntimeError.
    """
    asked_for_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    if chip.platform == "cpu" and Path("/dev/nvidia0").exists() and not asked_for_cpu:
        raise RuntimeError("JAX sees no GPU though /dev/nvidia0 exists; see above, or set JAX_PLATFORMS=cpu")
    if device is not None and chip.kind != device:
        raise RuntimeError(f"the day began with {device}, and this process sees {chip.kind}")


def emit(event: str, case: str, **values: object) -> None:
    EVENTS.write(json.dumps({"event": event, "case": case, **values}, default=str) + "\n")
    EVENTS.flush()


def end_with_the_day() -> None:
    """Ends this process when whoever started it is gone, and with it the other end of standard input."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    # Libraries print to standard output too, compilers through the file descriptor: the events keep a copy of it.
    EVENTS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=end_with_the_day, daemon=True).start()
    run_part(**json.loads(sys.argv[1]))
