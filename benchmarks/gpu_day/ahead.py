"""Compiles what the day runs on an H200, with the CUDA compiler, on a machine that has none.

    python -m benchmarks.gpu_day.ahead          # kernels and steps; needs the extra [aot]

cuDNN is left out: its plans are made on the device.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the CUDA plugin is asked for its compiler alone,
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which needs no cuDNN

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_day.cases import Day, LeftOut
from benchmarks.gpu_day.kernels_fast import shapes
from benchmarks.gpu_day.kernels_right import HOPPER, KEYS_64, Call, calls, repeated
from benchmarks.gpu_day.models import config_of, program_of
from benchmarks.gpu_day.step_fast import SETUPS, Setup, describe
from benchmarks.gpu_day.step_right import SHAPES
from benchmarks.gpu_day.tuning import targets
from benchmarks.tune_attention import search
from pallas_kernels.attention import hopper
from tests import aot


def programs() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and functions that compile."""
    day = Day(chip=HOPPER)
    for call in (*calls(day), *repeated(day)):
        if not isinstance(call, LeftOut) and call.backend != "cudnn":
            yield f"{call.form}, {call.mask}, {call.shape}", partial(compile_call, call)
    sizes = hopper.Sizes
    for shape in shapes(day):
        for variant, how in (("", None), ("fused", sizes(fused=True)), ("keys 64", sizes(**KEYS_64))):
            heads = shape.heads, shape.kv_heads
            call = Call(backend="hopper", mask=shape.mask, queries=shape.time, heads=heads, sizes=how, variant=variant)
            yield f"{call.form}, {call.mask}, {call.shape}", partial(compile_call, call)
    for target in targets(day):
        shape, heads = target.shape, (target.shape.heads, target.shape.kv_heads)
        for sizes in search(target, {}):
            call = Call(
                backend="hopper",
                queries=shape.time,
                heads=heads,
                head_size=shape.head_size,
                sizes=sizes,
                variant=f"{sizes}",
            )
            yield f"{call.form}, {call.shape}", partial(compile_call, call)
    for name, (rows, time_T) in SHAPES.items():
        yield f"step of {name}", partial(compile_step, Setup(name, time_T, rows, 0))
    for setup in SETUPS:
        yield f"step of {describe(setup)}", partial(compile_step, setup)


def compile_call(call: Call) -> Any:
    """Compiles both passes of an attention call."""
    call = replace(call, chip=HOPPER)
    at = SingleDeviceSharding(aot.cuda_devices(1)[0])

    def run(q, k, v, dout):
        out, back = jax.vjp(call.attend, q, k, v)
        return out, *back(dout)

    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=at) for shape in call.shapes()]
    return jax.jit(run).lower(*inputs).compile()


def compile_step(setup: Setup) -> Any:
    """Compiles a train step with the hopper kernels, which the default would leave to cuDNN."""
    config = config_of(setup.model, rows=setup.rows, time=setup.time, backend="hopper", remat=setup.remat)
    program = program_of(config, aot.cuda_devices(1))
    return program.lower_train_step(1, setup.rows, setup.time).compile()


def main() -> None:
    print(f"jax {jax.__version__}\n\n| program | compile s | arguments GiB | temporaries GiB |\n|---|---|---|---|")
    for name, run in programs():
        start = time.perf_counter()
        size = run().memory_analysis()
        arguments, temporaries = size.argument_size_in_bytes / 2**30, size.temp_size_in_bytes / 2**30
        print(f"| {name} | {time.perf_counter() - start:.1f} | {arguments:.1f} | {temporaries:.2f} |", flush=True)


if __name__ == "__main__":
    main()
