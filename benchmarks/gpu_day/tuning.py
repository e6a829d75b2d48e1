"""Part 6, with what time is left: tile sizes of our own kernel, in the form of pallas_kernels/attention/sizes.json."""

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, form_of
from benchmarks.tune_attention import Target, own_backend, search


def cases(day: Day) -> Iterator[Case | LeftOut]:
    backend = own_backend(day.chip)
    dtype = "float32" if day.is_toy else "bfloat16"
    for head, T in ((64, 256),) if day.is_toy else ((128, 8192), (64, 1024), (128, 2048), (64, 8192)):
        if (form := form_of(backend, head)) in day.broken:
            yield LeftOut(name=f"{backend} {head}, T {T}", why=f"{form} failed before")
            continue
        target = Target(backend=backend, chip=day.chip, dtype=dtype, head_size=head, time=T)
        found: dict[Any, float] = {}
        for sizes in search(target, found):

            def run(target: Target = target, sizes: Any = sizes, found: dict[Any, float] = found) -> Row:
                return measure(target, sizes, found, 0.02 if day.is_toy else 0.2)

            yield Case(name=f"{form}, T {T}, {sizes}", run=run, expected_s=1 if day.is_toy else 5)


def measure(target: Target, sizes: Any, found: dict[Any, float], budget_s: float) -> Row:
    """Times one choice. Its entry for sizes.json is a note if none before it was quicker."""
    took = target.seconds(sizes, budget_s)
    is_best = took <= min(found.values(), default=took)
    found[sizes] = took
    row: Row = {"forward and backward ms": 1e3 * took}
    return row | ({"notes": [f"quickest so far: {json.dumps(target.entry(sizes))}"]} if is_best else {})
