"""Part 4: attention's forward and backward pass, each kernel that passed its checks beside torch's."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp

from benchmarks.attention import Shape, Timed, inputs, jitted, matmul_flops, seconds, torch_rival
from benchmarks.gpu_day.cases import Case, Day, LeftOut, Row, form_of, is_installed
from benchmarks.gpu_day.kernels_right import KEYS_64
from pallas_kernels.attention import BackendName, flash_attention, module
from pallas_kernels.masks import Causal, Documents


def shapes(day: Day) -> Iterator[Shape]:
    """16,384 tokens of 16 heads of size 128, bfloat16."""
    if day.is_toy:
        yield Shape("causal", Causal(), 128, 2, 2, 64, 1)
        return
    yield Shape("causal", Causal(), 8192, 16, 16, 128, 2)
    yield Shape("causal", Causal(), 4096, 16, 16, 128, 4)
    yield Shape("causal", Causal(), 16384, 16, 16, 128, 1)
    yield Shape("documents", Causal() & Documents(), 8192, 16, 16, 128, 2, document=1024)


def cases(day: Day) -> Iterator[Case | LeftOut]:
    for shape in shapes(day):
        where = f"{shape.name} {shape.time}"
        for name, form, make in contenders(day, shape):
            if form in day.broken:
                yield LeftOut(name=f"{where}, {name}", why=f"{form} failed before")
            else:
                run = partial(timed, shape, make, day.is_toy)
                expected_s = 1.0 if day.is_toy else 25.0 if "Flex" in name else 4.0  # torch compiles that one
                yield Case(name=f"{where}, {name}", run=run, expected_s=expected_s)
    if not is_installed("torch"):
        yield LeftOut(name="torch", why="it is not installed")


def contenders(day: Day, shape: Shape) -> Iterator[tuple[str, str, Callable[[list[Any]], Timed]]]:
    """Name, kernel form and what makes both passes."""

    def ours(backend: BackendName, sizes: Any = None) -> Callable[[list[Any]], Timed]:
        return lambda arrays: jitted(
            lambda q, k, v: flash_attention(q, k, v, shape.bound(), backend=backend, sizes=sizes), arrays
        )

    head, chip, documents = shape.head_size, day.chip, shape.mask.has(Documents)
    usual = "documents" if documents else ""
    if chip.platform == "gpu" and chip.capability >= 8.0 and not documents:
        yield "cudnn", form_of("cudnn", head), ours("cudnn")
    if chip.capability == 9.0:
        sizes = module("hopper").Sizes
        yield "hopper", form_of("hopper", head, variant=usual), ours("hopper")
        yield "hopper, fused backward", form_of("hopper", head, variant="fused"), ours("hopper", sizes(fused=True))
        keys_64 = ours("hopper", sizes(**KEYS_64))
        yield "hopper, forward_keys=64", form_of("hopper", head, variant="keys 64"), keys_64
    if chip.platform == "tpu":
        yield "splash", form_of("splash", head, variant=usual), ours("splash")
        yield "tpu", form_of("tpu", head, variant=usual), ours("tpu")
    if chip.platform == "cpu" or chip.capability in (7.5, 8.0, 8.6, 8.9):
        yield "chunked", form_of("chunked", head, variant=usual), ours("chunked")
    if is_installed("torch") and chip.platform != "tpu":
        rivals = ["SDPA"] if chip.platform == "cpu" else ["SDPA by cuDNN", "SDPA by FlashAttention 2"]
        rivals = ["FlexAttention"] if documents else rivals
        for name in [*rivals, *(["flash_attn"] if is_installed("flash_attn") and not documents else [])]:
            yield f"torch {name}", "", partial(torch_rival, name, shape)


@lru_cache
def matmul_rate(n: int) -> float:
    """FLOP/s of an n x n product in this very process: what the shares are of."""
    return matmul_flops(jnp.bfloat16, n, 0.3)


def timed(shape: Shape, make: Callable[[list[Any]], Timed], is_toy: bool) -> Row:
    """4 B N T S H FLOPs of the pairs that the mask shows per forward pass, 2.5 times that for the backward pass."""
    forward, both = make(inputs(shape, jnp.float32 if is_toy else jnp.bfloat16))
    budget_s = 0.02 if is_toy else 0.25
    forward_s, both_s = seconds(forward, budget_s), seconds(both, budget_s)
    backward_s = max(both_s - forward_s, 1e-9)
    rates = shape.flops() / forward_s, 2.5 * shape.flops() / backward_s
    peak = matmul_rate(256 if is_toy else 8192)
    row: Row = {"pairs seen": round(shape.share(), 3)}
    for name, took, rate in zip(("forward", "backward"), (forward_s, backward_s), rates, strict=True):
        row |= {f"{name} ms": 1e3 * took, f"{name} TFLOP/s": rate / 1e12, f"{name} % of matmul": 100 * rate / peak}
    return row
