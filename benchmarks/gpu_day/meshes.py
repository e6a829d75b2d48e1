"""Part 7, where there are several chips: each kind of mesh against one device, then its rates."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row
from benchmarks.gpu_day.models import batches, config_of, program_of
from benchmarks.gpu_day.step_right import BOUND
from mtx import hlo
from mtx.config import Config, microbatches
from mtx.layout import Layout
from mtx.mesh import MeshConfig

STEPS = 5
KINDS = ("data", "model", "zero 3", "pipeline")


def cases(day: Day) -> Iterator[Case | LeftOut]:
    count = len(jax.devices())
    if count == 1:
        yield LeftOut(name="meshes", why="there is one device")
        return
    for kind in KINDS:
        run = partial(measure, kind, count, day.is_toy)
        yield Case(name=f"{kind} over {count} devices", run=run, expected_s=20 if day.is_toy else 40)


def config_on(kind: str, count: int, name: str, time_T: int, compute: Any, rows: int) -> Config:
    """A model on a mesh of one kind."""
    config = config_of(name, rows=rows, time=time_T, compute=compute)
    match kind:
        case "data":
            return replace(config, mesh=MeshConfig(data=count))
        case "model":
            return replace(config, mesh=MeshConfig(model=count), layout=Layout(sequence_parallel=True))
        case "zero 3":
            return replace(config, mesh=MeshConfig(data=count), layout=Layout(zero=3))
        case "pipeline":
            layers = -(-config.model.layers // count) * count
            batch = replace(config.batch, micro_size=max(1, rows // (4 * count)))
            return replace(
                config, mesh=MeshConfig(pipeline=count), batch=batch, model=replace(config.model, layers=layers)
            )
    raise AssertionError(kind)


def losses(config: Config, devices: list[jax.Device]) -> list[float]:
    """Losses of the first steps."""
    program = program_of(config, devices)
    count = microbatches(config, dict(program.mesh.shape))
    state, step = program.init(config.seed), program.compile_train_step()
    found = []
    with jax.set_mesh(program.mesh):
        for _, batch in zip(range(STEPS), batches(config, program, count), strict=False):
            state, metrics = step(state, batch, np.int32(count))
            found.append(metrics["train/loss"])
    return [float(x) for x in jax.device_get(found)]


@lru_cache
def on_one_device(config: Config) -> list[float]:
    """Losses of the same model and batches without a mesh."""
    batch = replace(config.batch, micro_size=None)
    return losses(replace(config, mesh=MeshConfig(), layout=Layout(), batch=batch), jax.devices()[:1])


def measure(kind: str, count: int, is_toy: bool) -> Row:
    """Losses in float32 against one device's, then tokens/s and bytes/s of each axis in the compute dtype."""
    devices = jax.devices()
    checked = config_on(kind, count, "quickstart", 64, "float32", 4 * count)
    off = max(abs(a - b) / b for a, b in zip(losses(checked, devices), on_one_device(checked), strict=True))
    row: Row = {"worst difference of a loss": f"{off:.2e}"}
    if not off <= BOUND:
        return row | {"failed": f"a loss is off by {off:.1e} of one device's, more than {BOUND:.0e}"}
    config = checked if is_toy else config_on(kind, count, "gpt2_345m", 1024, "bfloat16", 16 * count)
    program = program_of(config, devices)
    M = microbatches(config, dict(program.mesh.shape))
    batch = next(batches(config, program, M))
    with jax.set_mesh(program.mesh):
        _, B, T = batch.tokens.shape
        step = program.lower_train_step(M, B, T).compile()
        state, rounds = program.init(config.seed), []
        state, metrics = step(state, batch, np.int32(M))
        jax.block_until_ready(metrics)
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = step(state, batch, np.int32(M))
            jax.block_until_ready(metrics)
            rounds.append((time.perf_counter() - start) / STEPS)
    step_s = statistics.median(rounds)
    row |= {"tokens/s": config.batch.global_size * config.batch.sequence_length / step_s, "step ms": 1e3 * step_s}
    sent: dict[str, int] = defaultdict(int)
    for collective in hlo.census(step.as_text() or "", dict(program.mesh.shape), trips=M):
        sent["+".join(collective.axes)] += collective.bytes
    row["GB/s by axis"] = {axes: round(size / step_s / 1e9, 3) for axes, size in sent.items()}
    return row
