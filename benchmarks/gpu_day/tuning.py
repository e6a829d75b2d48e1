"""Part 6, with what time is left: tile sizes of our own kernel, in the form of pallas_kernels/attention/sizes.json."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, form_of
from benchmarks.tune_attention import Target, own_backend, search

TIME = "forward and backward ms"


def targets(day: Day) -> Iterator[Target]:
    """Yields the shapes to tune for, the most useful first."""
    backend, dtype = own_backend(day.chip), "float32" if day.is_toy else "bfloat16"
    for head, T in ((64, 256),) if day.is_toy else ((128, 8192), (64, 1024), (128, 2048), (64, 8192)):
        yield Target(backend=backend, chip=day.chip, dtype=dtype, head_size=head, time=T)


def cases(day: Day) -> Iterator[Case | LeftOut]:
    quickest: dict[Target, Any] = {}
    for target in targets(day):
        if (form := form_of(target.backend, target.head_size)) in day.broken:
            yield LeftOut(name=f"{form}, T {target.time}", why=f"{form} failed before")
            continue
        seconds_of: dict[Any, float] = {}
        for sizes in search(target, seconds_of):
            name = f"{form}, T {target.time}, {sizes}"
            if (earlier := day.results.get(name, {}).get(TIME)) is not None:
                seconds_of[sizes] = earlier / 1e3
            else:
                run = partial(measure, target, sizes, seconds_of, 0.02 if day.is_toy else 0.2)
                yield Case(name=name, run=run, expected_s=1.0 if day.is_toy else 5.0)
        if seconds_of:
            quickest[target] = min(seconds_of, key=seconds_of.__getitem__)
            name = f"{form}, T {target.time}, for sizes.json"
            yield Case(name=name, run=partial(written, day, dict(quickest)), expected_s=0.0)


def measure(target: Target, sizes: Any, seconds_of: dict[Any, float], budget_s: float) -> Row:
    """Times one choice."""
    seconds_of[sizes] = target.seconds(sizes, budget_s)
    return {TIME: 1e3 * seconds_of[sizes]}


def written(day: Day, quickest: dict[Target, Any]) -> Row:
    """The quickest sizes so far in the form of sizes.json."""
    entries = [target.entry(sizes) for target, sizes in quickest.items()]
    return {"notes": [json.dumps({day.chip.kind: entries})]}
