"""Part 5: tokens per second, memory, compile and host time of whole train steps, beside the same model in torch."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, is_installed
from benchmarks.gpu_day.models import batches, config_of, program_of
from benchmarks.gpu_day.step_right import backends
from mtx.config import Config
from mtx.metrics import flops_per_token, memory, peak_flops
from mtx.model import Model
from mtx.step import Program
from pallas_kernels.attention import BackendName


class Setup(NamedTuple):
    """How a model is trained: the answers that a short search tries."""

    model: str
    time: int
    rows: int
    gib: float
    """Memory of a step, as the CUDA compiler counts it for an H200: arguments and temporaries."""
    remat: Literal["none", "full"] = "none"


SETUPS = (
    Setup("gpt2_124m", 1024, 32, 26),
    Setup("megatron_1_7b", 4096, 4, 79),
    Setup("llama3_8b, 4 layers", 8192, 2, 53),
    Setup("gpt2_345m", 1024, 16, 36),
    Setup("gpt2_124m", 1024, 64, 48),
    Setup("megatron_1_7b", 4096, 8, 27, "full"),
    Setup("llama3_8b, 4 layers", 8192, 4, 73),
    Setup("gpt2_345m", 1024, 32, 65),
    Setup("gpt2_124m", 1024, 16, 15),
    Setup("gpt2_124m", 1024, 4, 6),
)
"""Each model once, then other batches and remat for it, with the time that is left."""
TOY = (Setup("quickstart", 64, 2, 0),)
STEPS = 6
"""Steps of each of three timed rounds."""
GIB = 2.0**30


def cases(day: Day) -> Iterator[Case | LeftOut]:
    stats = jax.devices()[0].memory_stats() or {}
    limit_gib = stats.get("bytes_limit", np.inf) / GIB
    expected_s, torch = (5.0, 5.0) if day.is_toy else (25.0, 50.0), day.chip.platform != "tpu" and is_installed("torch")
    if not torch:
        yield LeftOut(name="torch", why="it is not installed, or this is a TPU")
    for setup in TOY if day.is_toy else SETUPS:
        if setup.gib > limit_gib:
            yield LeftOut(name=describe(setup), why=f"it needs {setup.gib} GiB, and there are {limit_gib:.0f}")
            continue
        for backend in backends(day, 64 if setup.model.startswith(("gpt2", "quickstart")) else 128):
            if isinstance(backend, LeftOut):
                yield replace(backend, name=f"{describe(setup)}, mtx, {backend.name}")
            else:
                name, run = f"{describe(setup)}, mtx, {backend}", partial(ours, setup, backend, day.is_toy)
                yield Case(name=name, run=run, expected_s=expected_s[0], process=describe(setup))
        if torch and setup.remat == "none":
            name, run = f"{describe(setup)}, torch", partial(rival, setup, day.is_toy)
            yield Case(name=name, run=run, expected_s=expected_s[1], process=name)


def describe(setup: Setup) -> str:
    remat = "" if setup.remat == "none" else f", remat {setup.remat}"
    return f"{setup.model}, {setup.rows} x {setup.time}{remat}"


def ours(setup: Setup, backend: BackendName, is_toy: bool) -> Row:
    """Trains a few steps from random weights.

    Raises: LeftOut if the device has not the memory.
    """
    try:
        return _ours(setup, backend, is_toy)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise LeftOut(name=describe(setup), why="it does not fit into the device's memory") from None


def _ours(setup: Setup, backend: BackendName, is_toy: bool) -> Row:
    before = memory(jax.devices()[:1])
    compute = "float32" if is_toy else "bfloat16"
    config = config_of(
        setup.model, rows=setup.rows, time=setup.time, backend=backend, compute=compute, remat=setup.remat
    )
    program = program_of(config)
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        step = program.lower_train_step(1, setup.rows, setup.time).compile()
    compile_s = time.perf_counter() - start
    state, batch = program.init(config.seed), next(batches(config, program))
    count, rounds, host = np.int32(1), [], []
    with jax.set_mesh(program.mesh):
        state, metrics = step(state, batch, count)
        first_loss = float(metrics["train/loss"])
        for _ in range(1 if is_toy else 3):
            start = time.perf_counter()
            for _ in range(STEPS):
                launched = time.perf_counter()
                state, metrics = step(state, batch, count)
                host.append(time.perf_counter() - launched)
            jax.block_until_ready(metrics)
            rounds.append((time.perf_counter() - start) / STEPS)
        used = memory(jax.devices()[:1])
        operations = largest_operations(lambda: step(state, batch, count))
    peak_bytes = used[0] if used and before and used[0] > before[0] else None  # else it is an earlier case's
    row = rates(config, program, statistics.median(rounds), statistics.median(host), compile_s, peak_bytes)
    if (size := step.memory_analysis()) is not None:
        whole = size.argument_size_in_bytes + size.output_size_in_bytes - size.alias_size_in_bytes
        row |= {"arguments GiB": whole / GIB, "temporaries GiB": size.temp_size_in_bytes / GIB}
    row["first loss"] = first_loss
    operations = operations or ["the profile shows no device"]
    return row | {"notes": [f"largest operations: {'; '.join(operations)}"]}


def rates(
    config: Config, program: Program, step_s: float, host_s: float, compile_s: float, peak_bytes: int | None
) -> Row:
    """Both conventions of model FLOPs: PaLM's, in which a causal mask does not halve attention, and with it halved."""
    tokens = config.batch.global_size * config.batch.sequence_length
    device = program.mesh.devices.flat[0]
    peak = peak_flops(device.device_kind, program.compute.name)
    whole, halved = model_flops(program.model, config.batch.sequence_length)
    row: Row = {"tokens/s": tokens / step_s, "step ms": 1e3 * step_s, "host ms": 1e3 * host_s, "compile s": compile_s}
    row |= {"peak GiB": peak_bytes / GIB if peak_bytes else "n/a", "TFLOP/s": whole * tokens / step_s / 1e12}
    for name, flops in (("MFU", whole), ("MFU, causal halved", halved)):
        row[name] = f"{100 * flops * tokens / step_s / peak:.1f} %" if peak else "n/a"
    return row


def model_flops(model: Model, sequence_length: int) -> tuple[float, float]:
    """FLOPs per token by PaLM's convention, and with causal attention's half."""
    whole = flops_per_token(model, sequence_length)
    config = model.config
    return whole, whole - 6.0 * config.layers * sequence_length * config.attention.heads * config.head_size


def rival(setup: Setup, is_toy: bool) -> Row:
    """Trains the same model in torch, which needs no devices of JAX's."""
    from benchmarks.gpu_day import torch_model

    config = config_of(setup.model, rows=setup.rows, time=setup.time)
    program = program_of(config)
    try:
        found = torch_model.train(config.model, setup.rows, setup.time, 2 if is_toy else STEPS)
    except torch_model.OutOfMemory:
        raise LeftOut(name=describe(setup), why="torch: it does not fit into the device's memory") from None
    declared = sum(int(np.prod(w.shape)) for w in jax.tree.leaves(program.weights))
    row = rates(config, program, found["step_s"], found["host_s"], found["compile_s"], found["peak_bytes"])
    row["first loss"] = found["loss"]
    if found["parameters"] != declared:
        row["failed"] = f"torch's model has {found['parameters']:,} parameters, ours {declared:,}"
    return row


def largest_operations(run_step: Callable[[], Any], count: int = 10) -> Sequence[str]:
    """Names and milliseconds of the device's longest operations in one step, from a profile; none on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run_step())
        totals: dict[str, float] = {}
        for path in Path(folder).rglob("*.xplane.pb"):
            planes = jax.profiler.ProfileData.from_file(str(path)).planes
            for line in (line for plane in planes if plane.name.startswith("/device:") for line in plane.lines):
                if line.name.startswith(("Stream", "XLA Ops")):
                    for event in line.events:
                        totals[event.name] = totals.get(event.name, 0.0) + event.duration_ns / 1e6
    longest = sorted(totals.items(), key=lambda item: -item[1])[:count]
    return [f"{name} {ms:.2f} ms" for name, ms in longest]
