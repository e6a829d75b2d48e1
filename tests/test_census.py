"""The census: which collectives a compiled train step runs, in bytes, against the formulas of each parallelism.

Totals are over one step of M microbatches; `hlo.census` multiplies loop trip counts in, so a compiler that
peels a loop changes nothing. Manual is exact on CPU and CUDA; what TPU's compiler makes of it is bounded.
"""

import dataclasses
import math

import aot
import jax.numpy as jnp
import pytest
import toys
from jax import lax

from mtx import hlo
from mtx.attention import AttentionConfig
from mtx.layers import Gelu, RMSNorm, Rotary
from mtx.layout import Weight
from mtx.losses import CrossEntropy
from mtx.model import Transformer, flatten
from mtx.optim import AdamW
from mtx.spmd import ManualActivations, ManualStorage, manual

M, ROWS, T = 4, 2, 128  # microbatches, sequences per batch shard, tokens
MODEL = Transformer(
    vocab_size=2048,
    layers=3,
    width=512,
    attention=AttentionConfig(heads=8, backend="plain"),
    mlp=Gelu(width=1024),
    norm=RMSNorm(),
    positions=Rotary(),
    bias=False,
    tied_head=False,
)
SCALARS = 256  # bytes: sums of the loss, and the global norm
BACKENDS = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.aot),
    pytest.param("v5e:2x4", marks=pytest.mark.aot),
    pytest.param("v5p:2x2x2", marks=[pytest.mark.aot, pytest.mark.slow]),
    pytest.param("v6e:2x4", marks=[pytest.mark.aot, pytest.mark.slow]),
]
EXACT = [backend for backend in BACKENDS if backend == "cpu" or backend.values == ("cuda",)]


def devices(backend: str):
    if backend == "cpu":
        return None
    return aot.cuda_devices(8) if backend == "cuda" else aot.tpu_devices(backend)


def compiled(backend: str, mesh: tuple[int, int, int], remat: str = "none", **layout):
    p = toys.program(
        dataclasses.replace(MODEL, remat=remat),
        mesh,
        optimizer=AdamW(),
        loss=CrossEntropy(chunk_tokens=ROWS * T),
        documents=False,
        compute=jnp.float32 if backend == "cpu" else jnp.bfloat16,  # the CPU has no bfloat16 collectives
        devices=devices(backend),
        **layout,
    )
    rows = ROWS * mesh[0] * mesh[1]
    return p, p.lower_train_step(M, rows, T).compile()


class Census:
    """Bytes of one step by kind and axes, and what moved in layers."""

    def __init__(self, backend: str, mesh: tuple[int, int, int], remat: str = "none", **layout):
        self.backend = backend
        self.program, program = compiled(backend, mesh, remat, **layout)
        self.rows = hlo.census(program.as_text(), dict(self.program.mesh.shape), trips=M)
        self.wire = 4 if backend == "cpu" else 2
        weights = flatten(self.program.weights)
        self.layers = sum(size(w) for name, w in weights.items() if w.role != "vector" and name.startswith("stacks/"))
        self.ends = sum(size(w) for name, w in weights.items() if w.role != "vector" and name.startswith("ends/"))
        self.vectors = sum(size(w) for w in weights.values() if w.role == "vector")

    def bytes(self, kind: str, axis: str) -> int:
        return sum(row.bytes for row in self.rows if row.kind == kind and axis in row.axes)

    def dtypes(self, kind: str, axis: str) -> set[str]:
        return {row.dtype for row in self.rows if row.kind == kind and axis in row.axes and row.bytes > SCALARS}

    def in_layers(self) -> list[hlo.Row]:
        """Rows in a layer loop: loops of L (or L - 1, where one is peeled) iterations inside the microbatches'."""
        return [row for row in self.rows if len(row.loops) > 1 and row.loops[-1] in (MODEL.layers, MODEL.layers - 1)]


def size(weight: Weight) -> int:
    return math.prod(weight.shape)


def near(found: int, wanted: int, slack: int = SCALARS) -> None:
    assert wanted <= found <= wanted + slack, f"{found:,} bytes, not {wanted:,}"


# Data parallelism and ZeRO.


def check_data_parallel(zero: int, c: Census) -> None:
    """Formulas: systems.md section 6 with float32 masters. Psi: elements of matrices; e: wire bytes.

    stage 0: all-reduce 4 Psi; 1: gather e Psi, scatter 4 Psi; 2: gather e Psi, scatter 4 Psi per microbatch;
    3: per microbatch gather e Psi for the forward pass and again for the backward, scatter 4 Psi. Gains and
    biases are all-reduced once. The output projection's second gather may be the first one, reused, and a
    compiler may hoist what does not change out of the microbatch loop.
    """
    psi = c.layers + c.ends
    assert c.dtypes("all-reduce", "data") <= {"f32"}
    assert c.dtypes("reduce-scatter", "data") <= {"f32"}
    reduced, gathered, scattered = (c.bytes(k, "data") for k in ("all-reduce", "all-gather", "reduce-scatter"))
    if zero == 0:
        near(reduced, 4 * (psi + c.vectors))
        assert gathered == scattered == 0
        return
    assert c.dtypes("all-gather", "data") == {"f32" if c.wire == 4 else "bf16"}
    near(reduced, 4 * c.vectors)
    assert scattered == 4 * psi * (1 if zero == 1 else M)
    if zero < 3:
        assert gathered == c.wire * psi
    else:
        once = c.wire * c.ends
        assert gathered - M * 2 * c.wire * c.layers in (once, M * once), f"{gathered:,}"


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("backend", EXACT)
def test_data_parallel(backend: str, zero: int):
    check_data_parallel(zero, Census(backend, (1, 8, 1), zero=zero))


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("backend", BACKENDS[2:])
def test_data_parallel_on_tpu(backend: str, zero: int):
    """TPU may turn a scatter into an all-reduce and a slice, and sinks stage 2's scatters out of the loop."""
    c = Census(backend, (1, 8, 1), zero=zero)
    psi = c.layers + c.ends
    moved = c.bytes("all-reduce", "data") + c.bytes("reduce-scatter", "data")
    assert 4 * (psi + c.vectors) <= moved <= (M if zero >= 2 else 1) * 4 * (psi + c.vectors) + SCALARS
    if zero in (1, 2):
        assert c.bytes("all-gather", "data") == c.wire * psi
    assert c.dtypes("all-reduce", "data") | c.dtypes("reduce-scatter", "data") <= {"f32"}


def test_replicas_add_one_reduction_of_the_shards():
    c = Census("cpu", (2, 4, 1), zero=2)
    psi = c.layers + c.ends
    assert c.bytes("reduce-scatter", "data") == M * 4 * psi
    over_replicas = sum(row.bytes for row in c.rows if row.kind == "all-reduce" and row.axes == ("replica",))
    near(over_replicas, 4 * psi // 4)


# Tensor and sequence parallelism.


def check_tensor_parallel(remat: str, c: Census) -> None:
    """Per layer and microbatch: four all-reduces of B T D (five under full remat), nothing else over model."""
    unit = ROWS * T * MODEL.width * c.wire
    per_layer = 5 if remat == "full" else 4
    statistics = 3 * ROWS * T * 4
    near(c.bytes("all-reduce", "model"), M * (MODEL.layers * per_layer * unit + 2 * unit + statistics))
    assert c.bytes("all-gather", "model") == c.bytes("reduce-scatter", "model") == 0
    assert {(row.kind, row.axes) for row in c.in_layers()} == {("all-reduce", ("model",))}
    if c.backend == "cpu":
        assert sum(row.count for row in c.in_layers()) == per_layer


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_parallel(backend: str, remat: str):
    check_tensor_parallel(remat, Census(backend, (1, 1, 8), remat))


def check_sequence_parallel(c: Census, remat: str = "none") -> None:
    """The all-reduces' bytes as reduce-scatter and all-gather, and no activation all-reduced.

    TPU's compiler may make an all-reduce and a slice of a scatter (v5p does, over eight chips).
    """
    unit = ROWS * T * MODEL.width * c.wire
    scatters, gathers = (5, (5, 6)) if remat == "full" else (4, (4,))
    scattered, small = M * (MODEL.layers * scatters * unit + 2 * unit), M * 3 * ROWS * T * 4 + 4 * c.vectors
    assert c.bytes("all-gather", "model") in [M * (MODEL.layers * n * unit + 2 * unit) for n in gathers]
    if c.backend.startswith("v"):
        near(c.bytes("reduce-scatter", "model") + c.bytes("all-reduce", "model"), scattered + small)
        return
    assert c.bytes("reduce-scatter", "model") == scattered
    near(c.bytes("all-reduce", "model"), small)
    assert not [row for row in c.in_layers() if row.kind == "all-reduce"]


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_parallel(backend: str, remat: str):
    check_sequence_parallel(Census(backend, (1, 1, 8), remat, sequence_parallel=True), remat)


@pytest.mark.parametrize("backend", EXACT)
def test_tensor_and_data_parallel_do_not_mix(backend: str):
    c = Census(backend, (1, 2, 4), zero=1, sequence_parallel=True)
    psi = (c.layers + c.ends) // 4
    assert c.bytes("reduce-scatter", "data") == 4 * psi
    assert c.bytes("all-gather", "data") == c.wire * psi
    check_layers = {(row.kind, row.axes) for row in c.in_layers()}
    assert check_layers == {("all-gather", ("model",)), ("reduce-scatter", ("model",))}


# Controls: each census check turns red when the layout is broken on purpose.


def test_controls(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as m:
        m.setattr(ManualStorage, "scatter_microbatch", scatter_always)
        m.setattr(ManualStorage, "reduce_gradient", lambda self, w, g: g)
        with pytest.raises(AssertionError):
            check_data_parallel(1, Census("cpu", (1, 8, 1), zero=1))
    with monkeypatch.context() as m:
        m.setattr(manual, "_sum_gradient", manual._sum)
        with pytest.raises(AssertionError):
            check_tensor_parallel("none", Census("cpu", (1, 1, 8)))
    with monkeypatch.context() as m:
        m.setattr(ManualActivations, "leave", summed_and_cut)
        with pytest.raises(AssertionError):
            check_sequence_parallel(Census("cpu", (1, 1, 8), sequence_parallel=True))


def summed_and_cut(self: ManualActivations, y_BTD, letters: str):
    return manual._sum(("model",), y_BTD)[:, : y_BTD.shape[1] // 8] if self.layout.splits(letters) else y_BTD


def scatter_always(self: ManualStorage, weight: Weight, gradient):
    zero = self.layout.zero_dim(weight)
    return gradient if zero is None else lax.psum_scatter(gradient, "data", scatter_dimension=zero, tiled=True)


# Memory.

WEIGHTY = dataclasses.replace(MODEL, layers=8, mlp=Gelu(width=2048), vocab_size=512)


def check_memory(zero: int) -> None:
    """Bytes per device of a model whose activations are small beside its weights; two microbatches, float32.

    Arguments: weights and two moments, 12 Psi, over 8 from stage 1. Temporaries at their peak:
    stage 0: the accumulated, the microbatch's and the reduced gradients, 4 Psi each;
    1: gathered weights, accumulated and microbatch's gradients, and a shard;
    2: gathered weights, the microbatch's gradients, the largest of them turned for its scatter, and two shards;
    3: two shards of gradients, and one layer's weights and gradients.
    """
    loss = CrossEntropy(chunk_tokens=8)
    p = toys.program(WEIGHTY, (1, 8, 1), zero=zero, optimizer=AdamW(), documents=False, loss=loss)
    m = p.lower_train_step(2, 8, 8).compile().memory_analysis()
    weights = flatten(p.weights).values()
    psi = 4 * sum(size(w) for w in weights if w.role != "vector")
    vectors = 4 * sum(size(w) for w in weights if w.role == "vector")
    largest, layer, shard = 4 * max(size(w) for w in weights), psi / WEIGHTY.layers, psi / 8
    batch = 2 * 8 * 5 * 4
    assert abs(m.argument_size_in_bytes - 3 * (psi if zero == 0 else shard) - 3 * vectors - batch) <= SCALARS
    wanted = (3 * psi, 3 * psi + shard, 2 * psi + largest + 2 * shard, 2 * shard + 2 * layer)[zero]
    assert m.temp_size_in_bytes == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("zero", range(4))
def test_memory(zero: int):
    check_memory(zero)


def test_memory_control(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ManualStorage, "at_use", False)  # stage 3 gathers everything at once
    with pytest.raises(AssertionError):
        check_memory(3)
