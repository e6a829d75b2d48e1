"""Runs the cases of one part in a process of its own: `python -m benchmarks.gpu_day.worker '{"module": ...}'`.

Its argument is a JSON object: `module` of the part, `seconds` that are left for it, `ended` (names of cases not to run
again) and `broken` (kernel forms). Each line of standard output is one event, a JSON object; whatever else is printed
goes to standard error.
"""

import importlib
import json
import os
import sys
import threading
import time
import traceback

import jax

from benchmarks.gpu_day.cases import Case, Day, LeftOut
from pallas_kernels.attention import Chip


def run_part(module: str, seconds: float, ended: list[str], broken: list[str]) -> None:
    """Runs every case of a part that has not ended, until the time is over or a case needs another process."""
    deadline = time.monotonic() + seconds
    part, process, failed_forms = importlib.import_module(module), None, set(broken)
    for case in part.cases(Day(chip=Chip.of(jax.devices()[0]), broken=frozenset(broken))):
        if case.name in ended:
            continue
        if isinstance(case, LeftOut):
            emit("left out", case.name, why=case.why)
        elif case.form in failed_forms:
            emit("left out", case.name, why=f"{case.form} failed before")
        elif case.expected_s > deadline - time.monotonic():
            emit("left out", case.name, why=f"no time: about {case.expected_s:.0f} s")
        elif process not in (None, case.process):
            emit("next process", case.name)
            return
        else:
            process = case.process
            if run_case(case) is False and case.form:
                failed_forms.add(case.form)
    emit("finished", module)


def run_case(case: Case) -> bool:
    """Runs one case and reports it. Returns False if it failed."""
    limit_s = max(4 * case.expected_s, 45.0) if case.limit_s is None else case.limit_s
    emit("start", case.name, limit_s=limit_s, form=case.form)
    start = time.monotonic()
    try:
        row = case.run()
    except LeftOut as left_out:
        emit("left out", case.name, why=left_out.why)
        return True
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        row = {"failed": f"{type(error).__name__}: {first_line[:300]}"}
    emit("end", case.name, seconds=round(time.monotonic() - start, 2), form=case.form, row=row)
    return "failed" not in row


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
