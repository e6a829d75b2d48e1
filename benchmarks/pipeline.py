"""Schedules against one another and against data parallelism, which leaves no device idle: time and memory of a step.

    export NPROC=32 JAX_PLATFORMS=cpu
    export XLA_FLAGS="--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
    python -m benchmarks.pipeline --stages 2 --microbatches 4

On a CPU give every stage a core of its own: devices that share cores hide the time in which some are idle. With fewer
cores `--layer-ms 40` makes each layer wait by the clock besides, twice that backward, while other devices go on: steps
then take what the engine makes of layers of that length. Not for `ZeroBubble`, as a wait has no half to put off.

    python -m benchmarks.pipeline --stages 8 --microbatches 16 --layers 16 --width 64 --time 32 --layer-ms 40

Useful work is the time of the same step on `mesh.data` = stages over the schedule's; beside it what the table promises.
"""

import argparse
import dataclasses
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mtx import config as configs
from mtx.building import build
from mtx.mesh import MeshConfig
from mtx.model import Batch
from mtx.pipeline import AnySchedule, Costs, GPipe, Interleaved, OneFOneB, ZeroBubble, simulate
from mtx.step import Program

WORDS = ["model.vocab_size=256", "layout.zero=0", "model.attention.backend=plain"]


def main() -> None:
    p = argparse.ArgumentParser("python -m benchmarks.pipeline", description=__doc__)
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--microbatches", type=int, default=4)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--width", type=int, default=512)
    p.add_argument("--time", type=int, default=256, help="tokens of a sequence; a microbatch is one sequence")
    p.add_argument("--layer-ms", type=float, default=0.0, help="what a layer waits, forward; backward twice that")
    p.add_argument("--steps", type=int, default=5)
    flags = p.parse_args()
    print("| remat | schedule | ticks | s per step | useful work | promised | temporaries MiB |")
    print("|---|---|---|---|---|---|---|")
    for remat in ("none", "full", "stage"):
        ideal = measure(program(flags, None, remat), flags, flags.microbatches // flags.stages)[0]
        print(f"| {remat} | (data parallel) | - | {ideal:.3f} | 1.00 | 1.00 | - |", flush=True)
        costs = Costs(backward={"none": 1.0, "full": 2.0, "stage": 3.0}[remat])
        again = 4 / 5 if remat == "stage" else 1.0  # it computes layers once more than data parallelism does
        for schedule in (GPipe(), OneFOneB(), Interleaved(), *([] if flags.layer_ms else [ZeroBubble()])):
            seconds, temporaries = measure(program(flags, schedule, remat), flags, flags.microbatches)
            found = simulate(schedule.table(flags.stages, flags.microbatches, keeps=remat != "stage"), costs)
            name, figures = (
                str(schedule).removesuffix("()"),
                f"{ideal / seconds:.2f} | {again * (1 - found.bubble):.2f}",
            )
            row = f"| {remat} | {name} | {found.ticks} | {seconds:.3f} | {figures} | {temporaries / 2**20:.0f} |"
            print(row, flush=True)


def program(flags: argparse.Namespace, schedule: AnySchedule | None, remat: str) -> Program:
    config = configs.load("configs/quickstart.py", [*WORDS, f"model.remat={remat}"]).config
    mesh = MeshConfig(pipeline=flags.stages) if schedule else MeshConfig(data=flags.stages)
    mlp = dataclasses.replace(config.model.mlp, width=4 * flags.width)
    model = dataclasses.replace(config.model, layers=flags.layers, width=flags.width, mlp=mlp)
    batch = configs.BatchConfig(global_size=flags.microbatches, micro_size=1, sequence_length=flags.time)
    config = dataclasses.replace(config, mesh=mesh, model=model, batch=batch, pipeline=schedule or OneFOneB())
    built = build(config, jax.devices()[: flags.stages])
    if flags.layer_ms:
        layer, seconds = built.model.layer, flags.layer_ms / 1e3
        built.model.layer = lambda kind, weights, x_BTD, context, number: layer(
            kind, weights, paced(x_BTD, seconds), context, number
        )
    return built


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def paced(x: jax.Array, seconds: float) -> jax.Array:
    """x, after a wait; twice that before its gradient."""

    def wait(_: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((), np.float32)

    zero = jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), x.ravel()[0])
    return x + zero.astype(x.dtype)


paced.defvjp(lambda x, seconds: (paced(x, seconds), None), lambda seconds, _, g: (paced(g, 2 * seconds),))


def measure(program: Program, flags: argparse.Namespace, count: int) -> tuple[float, int]:
    """(median seconds of a step, bytes of temporaries on a device)."""
    shape = (count, flags.microbatches // count, flags.time)
    arrays = {name: np.ones(shape, np.float32 if name == "weights" else np.int32) for name in Batch._fields[:5]}
    batch = Batch(**jax.device_put(arrays, program.sharding(P(None, *program.rows_spec))))
    state, seconds = program.init(0), []
    with jax.set_mesh(program.mesh):
        step = program.compile_train_step().lower(state, batch, np.int32(count)).compile()
        for _ in range(flags.steps + 1):
            start = time.perf_counter()
            state, metrics = step(state, batch, np.int32(count))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
    memory = step.memory_analysis()
    assert memory is not None
    return statistics.median(seconds[1:]), memory.temp_size_in_bytes


if __name__ == "__main__":
    main()
