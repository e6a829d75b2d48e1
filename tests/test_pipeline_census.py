"""What a pipelined step sends, holds and computes, read from the compiled program.

The census multiplies loops' trip counts in and takes every branch of a conditional for run, so that work which a stage
does in some ticks only is counted in all of them: per tick the figures are exact.
"""

import dataclasses
import functools
import re

import aot
import jax.numpy as jnp
import pytest
import test_census
import toys
from test_census import EXACT, ROWS, SCALARS, T, near, size

from mtx import hlo
from mtx.attention import AttentionConfig
from mtx.layers import RMSNorm, Rotary, SwiGLU
from mtx.losses import CrossEntropy
from mtx.model import Transformer, flatten
from mtx.optim import AdamW
from mtx.pipeline import GPipe, Interleaved, OneFOneB, Schedule, ZeroBubble, engine

STAGES, M = 4, 8
MODEL = dataclasses.replace(test_census.MODEL, layers=8, vocab_size=512)
TPUS = test_census.BACKENDS[2:]


class Pipeline:
    """A compiled step, and its census."""

    def __init__(
        self, schedule: Schedule, backend: str, mesh: tuple[int, int], remat: str, microbatches: int, **layout
    ):
        data, tensor = mesh
        self.backend, self.schedule, self.microbatches, self.mesh = backend, schedule, microbatches, mesh
        self.program = toys.program(
            dataclasses.replace(MODEL, remat=remat),
            (1, data, tensor),
            stages=STAGES,
            schedule=schedule,
            optimizer=AdamW(),
            loss=CrossEntropy(chunk_tokens=ROWS * T),
            documents=False,
            compute=jnp.float32 if backend == "cpu" else jnp.bfloat16,
            devices=test_census.devices(backend),
            **layout,
        )
        self.compiled = self.program.lower_train_step(microbatches, ROWS * data, T).compile()
        self.text = self.compiled.as_text()
        self.wire = 4 if backend == "cpu" else 2
        self.table = schedule.table(STAGES, microbatches, keeps=remat != "stage")
        weights = flatten(self.program.weights)
        self.layers = sum(size(w) for w in weights.values() if w.layers and w.role != "vector") // STAGES // tensor
        self.vocabulary = sum(size(w) for w in weights.values() if "V" in w.dims) // tensor
        self.vectors = sum(size(w) for w in weights.values() if w.layers and w.role == "vector") // STAGES
        self.ends = sum(size(w) for w in weights.values() if not w.layers and w.role == "vector")

    @functools.cached_property
    def rows(self) -> list[hlo.Row]:
        return hlo.census(self.text, dict(self.program.mesh.shape), trips=self.microbatches)

    def bytes(self, kind: str, *axes: str, ticks: bool = False) -> int:
        """Over some of these axes; in the loop over ticks, or outside of it."""
        chosen = [r for r in self.rows if r.kind == kind and set(axes) & set(r.axes) and bool(r.loops) == ticks]
        return sum(r.bytes for r in chosen)

    @property
    def temporary(self) -> int:
        return self.compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def pipeline(
    schedule: Schedule = OneFOneB(),
    backend: str = "cpu",
    mesh: tuple[int, int] = (2, 1),
    remat: str = "full",
    microbatches: int = M,
    **layout,
) -> Pipeline:
    return Pipeline(schedule, backend, mesh, remat, microbatches, **layout)


# What is sent.


def check_between_stages(c: Pipeline, vocabulary: str = "sharded") -> None:
    """Two permutes of an activation per tick; over `pipeline` else only the vocabulary, once, and sums of the ends."""
    unit = ROWS * T * MODEL.width * c.wire
    if c.program.layout.sequence_parallel:
        unit //= c.mesh[1]
    assert c.bytes("collective-permute", "pipeline", ticks=True) == 2 * c.table.ticks * unit
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        assert c.bytes(kind, "pipeline", ticks=True) == 0, kind
    assert c.bytes("collective-permute", "pipeline") == 0
    stored = c.vocabulary // (c.mesh[0] if c.program.layout.layout.zero else 1)
    gathered, scattered, reduced = c.wire * c.vocabulary, 4 * stored, 4 * c.ends
    if c.program.layout.layout.zero:  # gathered over the stages first, the rest over data
        gathered = c.wire * stored
    if vocabulary == "replicated":
        gathered, scattered, reduced = 0, 0, reduced + 4 * stored
    assert c.bytes("all-gather", "pipeline") == gathered
    assert c.bytes("reduce-scatter", "pipeline") == scattered
    near(c.bytes("all-reduce", "pipeline"), reduced, 4 * SCALARS)


def check_over_data(c: Pipeline, vocabulary: str = "sharded") -> None:
    """Nothing in the loop for stages 0 and 1: gradients are summed once per step."""
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        assert c.bytes(kind, "data", ticks=True) == 0, kind
    psi = c.layers + c.vocabulary
    if c.program.layout.layout.zero == 0:
        shared = c.layers + c.vocabulary // (STAGES if vocabulary == "sharded" else 1)  # scattered over stages before
        near(c.bytes("all-reduce", "data"), 4 * (shared + c.vectors + c.ends), 4 * SCALARS)
    else:
        assert c.bytes("reduce-scatter", "data") == 4 * psi
        assert c.bytes("all-gather", "data") == c.wire * psi


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("backend", EXACT)
def test_stages_and_data(backend: str, zero: int):
    c = pipeline(backend=backend, zero=zero)
    check_between_stages(c)
    check_over_data(c)


@pytest.mark.parametrize("schedule", [GPipe(), Interleaved(), ZeroBubble()], ids=lambda s: type(s).__name__)
def test_every_schedule_sends_the_same_in_a_tick(schedule: Schedule):
    c = pipeline(schedule)
    check_between_stages(c)
    check_over_data(c)


def test_a_vocabulary_on_every_stage():
    c = pipeline(vocabulary="replicated")
    check_between_stages(c, "replicated")
    check_over_data(c, "replicated")


@pytest.mark.parametrize("zero", [2, 3])
def test_later_stages_of_zero_scatter_in_the_tick(zero: int):
    """Stage 2 scatters a backward pass's gradients; stage 3 gathers and scatters layers where they are used."""
    c = pipeline(zero=zero)
    check_between_stages(c)
    check = c.bytes("reduce-scatter", "data", ticks=True)
    assert check == 4 * c.table.ticks * (c.layers + c.vocabulary)
    gathered = c.bytes("all-gather", "data", ticks=True)
    assert (gathered > 0) == (zero == 3)


@pytest.mark.parametrize("backend", EXACT)
def test_sequence_parallel_permutes_a_share_of_time(backend: str):
    c = pipeline(backend=backend, mesh=(1, 2), sequence_parallel=True)
    check_between_stages(c)
    in_layers = {(r.kind, r.axes) for r in c.rows if len(r.loops) > 1}
    assert in_layers == {("all-gather", ("model",)), ("reduce-scatter", ("model",))}


@pytest.mark.parametrize("backend", TPUS)
def test_stages_on_tpu(backend: str):
    c = pipeline(backend=backend)
    unit = ROWS * T * MODEL.width * c.wire
    assert c.bytes("collective-permute", "pipeline", ticks=True) == 2 * c.table.ticks * unit
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        assert c.bytes(kind, "pipeline", "data", ticks=True) == 0, kind


def test_controls(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError):
        check_over_data(pipeline(zero=2))
    monkeypatch.setattr(engine, "to_next_stage", lambda x: engine.lax.all_gather(x, "pipeline")[0])
    with pytest.raises(AssertionError):
        check_between_stages(Pipeline(OneFOneB(), "cpu", (2, 1), "full", M))


# What is held.


@pytest.mark.parametrize(
    "remat", [pytest.param("stage", marks=pytest.mark.slow), "full", pytest.param("none", marks=pytest.mark.slow)]
)
def test_1f1b_holds_as_much_for_many_microbatches_as_for_few(remat: str):
    few, many = pipeline(remat=remat), pipeline(remat=remat, microbatches=4 * M)
    assert many.temporary == pytest.approx(few.temporary, rel=0.05)
    few, many = (pipeline(GPipe(), remat=remat, microbatches=n) for n in (M, 4 * M))
    x = ROWS * T * MODEL.width * 4
    assert many.temporary - few.temporary >= 3 * M * x  # an input for each, at the least
    assert many.temporary > 1.2 * few.temporary


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["stage", "full", "none"])
@pytest.mark.parametrize("schedule", [Interleaved(), ZeroBubble()], ids=lambda s: type(s).__name__)
def test_later_schedules_are_as_flat(schedule: Schedule, remat: str):
    few, many = (pipeline(schedule, remat=remat, microbatches=n) for n in (M, 4 * M))
    assert many.temporary == pytest.approx(few.temporary, rel=0.05)


# What is computed.


@pytest.mark.parametrize("remat", ["full", "none"])
def test_zero_bubble_computes_nothing_twice(remat: str):
    """Dot FLOPs of a tick in which everything runs: those of F, B and, apart, W."""
    flops = {s: _per_tick(pipeline(s, remat=remat)) for s in (OneFOneB(), ZeroBubble())}
    assert flops[ZeroBubble()] == pytest.approx(flops[OneFOneB()], rel=0.01)


def test_what_is_computed_again():
    """Nothing; each layer but for its last product, whose result nobody needs; each layer once more."""
    layers = MODEL.layers // STAGES
    scores = layers * 2 * 2 * ROWS * T * T * MODEL.width
    forward = 2 * ROWS * T * pipeline().layers + scores
    none, full, stage = (_per_tick(pipeline(remat=remat)) for remat in ("none", "full", "stage"))
    last = layers * 2 * ROWS * T * MODEL.mlp.width * MODEL.width
    assert full - none == pytest.approx(forward - last, rel=0.01)
    assert stage - full == pytest.approx(forward, rel=0.01)


def test_what_is_computed_again_is_not_held():
    none, full, stage = (pipeline(remat=remat).temporary for remat in ("none", "full", "stage"))
    assert stage < full < none / 2


def _per_tick(c: Pipeline) -> float:
    return hlo.dot_flops(c.text, trips=c.microbatches) / c.table.ticks


BILLION = Transformer(
    vocab_size=32_000,
    layers=16,
    width=2048,
    attention=AttentionConfig(heads=16),
    mlp=SwiGLU(width=5632),
    norm=RMSNorm(),
    positions=Rotary(),
    bias=False,
    tied_head=False,
    remat="full",
)
KERNELS = {"v5p:2x2x4": "tpu_custom_call", "v6e:4x4": "tpu_custom_call", "cuda": "mosaic_gpu"}


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("chips", KERNELS)
def test_a_billion_parameters_compile(chips: str):
    """On 16 chips, with the flash kernel of each; on TPU each permute travels while the slot behind it computes."""
    devices = aot.cuda_devices(16) if chips == "cuda" else aot.tpu_devices(chips)
    p = toys.program(
        BILLION,
        (1, 2, 2),
        stages=STAGES,
        zero=1,
        sequence_parallel=True,
        optimizer=AdamW(),
        loss=CrossEntropy(),
        compute=jnp.bfloat16,
        devices=devices,
    )
    compiled = p.lower_train_step(M, 2, 2048).compile()
    text = compiled.as_text()
    assert KERNELS[chips] in text
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 2**30
    rows = hlo.census(text, dict(p.mesh.shape), trips=M)
    ticks, unit = OneFOneB().table(STAGES, M).ticks, 1024 * 2048 * 2
    assert sum(r.bytes for r in rows if r.axes == ("pipeline",) and r.loops) == 2 * ticks * unit
    if chips == "cuda":  # there they are synchronous: XLA moves no computation that is behind a condition past them
        return
    order = re.findall(
        r"(collective-permute-start|collective-permute-done|conditional)\([^\n]*while/body/eval_jaxpr/"
        r"(ppermute|forward/cond|backward/cond)\"",
        text,
    )
    assert [what for what, _ in order] == [
        "collective-permute-start", "conditional", "collective-permute-start", "collective-permute-done",
        "conditional", "collective-permute-done",
    ]  # fmt: skip
