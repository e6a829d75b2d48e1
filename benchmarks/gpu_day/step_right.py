"""Part 3: the train step. In float32 its losses are the CPU's, in bfloat16 those of plain attention.

python -m benchmarks.gpu_day.step_right          # writes losses.json anew, on a CPU
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, form_of
from benchmarks.gpu_day.models import batches, config_of, program_of
from pallas_kernels.attention import BackendName

STEPS = 20
SHAPES = {"quickstart": (8, 128), "gpt2_124m": (2, 256)}
"""Rows and their length."""
LOSSES = Path(__file__).with_name("losses.json")
"""Losses of each step in float32 on a CPU."""
BOUND = 1e-4
"""Relative difference of a loss in float32."""


BFLOAT16_BOUND = 2e-2
"""Relative difference of a loss in bfloat16 from plain attention's: above it a run goes another way."""


def cases(day: Day) -> Iterator[Case | LeftOut]:
    names = [name for name in SHAPES if name == "quickstart" or not day.is_toy]
    for name in names:
        yield Case(name=f"{name}, float32, plain", run=partial(as_on_the_cpu, name, "plain"), expected_s=12)
    for name in reversed(names):
        for backend in backends(day, 64):
            if isinstance(backend, LeftOut):
                yield replace(backend, name=f"{name}, bfloat16, {backend.name}")
            else:
                run = partial(beside_plain, name, backend)
                yield Case(name=f"{name}, bfloat16, {backend}", run=run, expected_s=15)
    for name in names if not day.is_toy else ():
        other: BackendName = "tpu" if day.chip.platform == "tpu" else "chunked"
        yield Case(name=f"{name}, float32, {other}", run=partial(as_on_the_cpu, name, other), expected_s=12)


def backends(day: Day, head_size: int) -> Iterator[BackendName | LeftOut]:
    """The kernels of this chip, the default first; a LeftOut for one whose form for a head size failed."""
    chip = day.chip
    names: tuple[BackendName, ...] = ("chunked",)
    if chip.platform == "tpu":
        names = ("splash", "tpu")
    elif chip.capability == 9.0:
        names = ("cudnn", "hopper")
    elif chip.capability >= 8.0:
        names = ("cudnn",)
    for name in names:
        form = form_of(name, head_size)
        yield LeftOut(name=name, why=f"{form} failed before") if form in day.broken else name


@lru_cache
def losses(name: str, backend: BackendName, compute: Literal["float32", "bfloat16"], steps: int = STEPS) -> list[float]:
    """Losses of the first steps of a model from CONFIGS."""
    rows, time = SHAPES[name]
    config = config_of(name, rows=rows, time=time, backend=backend, compute=compute)
    program = program_of(config)
    state, step = program.init(config.seed), program.compile_train_step()
    on_device = []
    with jax.set_mesh(program.mesh):
        for _, batch in zip(range(steps), batches(config, program), strict=False):
            state, metrics = step(state, batch, np.int32(1))
            on_device.append(metrics["train/loss"])
    return [float(x) for x in jax.device_get(on_device)]


def as_on_the_cpu(name: str, backend: BackendName) -> Row:
    """Trains in float32 at the highest matmul precision."""
    wanted = json.loads(LOSSES.read_text())[name]
    found = losses(name, backend, "float32")
    off = [abs(a - b) / b for a, b in zip(found, wanted, strict=True)]
    worst = int(np.argmax(off))
    row: Row = {"first loss": found[0], "last loss": found[-1], "worst difference": f"{off[worst]:.2e}"}
    if not max(off) <= BOUND:
        row["failed"] = (
            f"the loss of step {worst + 1} is {found[worst]:.7f}, the CPU's {wanted[worst]:.7f}: off by "
            f"{off[worst]:.1e}, more than {BOUND:.0e}"
        )
    return row


def beside_plain(name: str, backend: BackendName) -> Row:
    """Trains in bfloat16 with a kernel, and with plain attention."""
    kernel, plain = (losses(name, which, "bfloat16") for which in (backend, "plain"))
    row: Row = {"first loss": kernel[0], "last loss": kernel[-1], "plain's last": plain[-1]}
    off = max(abs(a - b) / b for a, b in zip(kernel, plain, strict=True))
    row["worst difference"] = f"{off:.2e}"
    pairs = ", ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(kernel, plain, strict=True))
    row["notes"] = [f"losses, {backend}/plain: {pairs}"]
    if not off <= BFLOAT16_BOUND:
        row["failed"] = f"a loss is off by {off:.1e} of plain attention's, more than {BFLOAT16_BOUND:.0e}"
    return row


if __name__ == "__main__":
    if jax.default_backend() != "cpu":
        raise SystemExit("error: losses.json holds a CPU's losses; run this with JAX_PLATFORMS=cpu.")
    LOSSES.write_text(json.dumps({name: losses(name, "plain", "float32") for name in SHAPES}, indent=1) + "\n")
