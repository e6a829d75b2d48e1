"""Part 3: the train step. In float32 its losses are the CPU's, in bfloat16 those of plain attention.

python -m benchmarks.gpu_day.step_right          # writes losses.json anew, on a CPU
"""

import json
from collections.abc import Iterator
from functools import partial
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


def cases(day: Day) -> Iterator[Case | LeftOut]:
    for name in SHAPES:
        if day.is_toy and name != "quickstart":
            yield LeftOut(name=f"{name}, float32", why="the losses are this machine's own")
            continue
        yield Case(name=f"{name}, float32", run=partial(as_on_the_cpu, name), expected_s=15)
        for backend in backends(day, 16 if name == "quickstart" else 64):
            run = partial(beside_plain, name, backend)
            yield Case(name=f"{name}, bfloat16, {backend}", run=run, expected_s=15)


def backends(day: Day, head_size: int) -> list[BackendName]:
    """The kernels of this chip whose forms for a head size passed."""
    chip = day.chip
    names: list[BackendName] = ["chunked"]
    if chip.platform == "tpu":
        names = ["splash", "tpu"]
    elif chip.capability == 9.0:
        names = ["cudnn", "hopper"]
    elif chip.capability >= 8.0:
        names = ["cudnn"]
    checked_head_size = 128 if head_size == 128 else 64
    return [name for name in names if form_of(name, checked_head_size) not in day.broken]


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


def as_on_the_cpu(name: str) -> Row:
    """Trains in float32 at the highest matmul precision, with plain attention."""
    wanted = json.loads(LOSSES.read_text())[name]
    found = losses(name, "plain", "float32")
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
    row["worst difference"] = f"{max(abs(a - b) / b for a, b in zip(kernel, plain, strict=True)):.2e}"
    pairs = ", ".join(f"{a:.4f}/{b:.4f}" for a, b in zip(kernel, plain, strict=True))
    row["notes"] = [f"losses, {backend}/plain: {pairs}"]
    if not np.isfinite(kernel).all():
        row["failed"] = f"a loss is not finite: {kernel}"
    return row


if __name__ == "__main__":
    if jax.default_backend() != "cpu":
        raise SystemExit("error: losses.json holds a CPU's losses; run this with JAX_PLATFORMS=cpu.")
    LOSSES.write_text(json.dumps({name: losses(name, "plain", "float32") for name in SHAPES}, indent=1) + "\n")
