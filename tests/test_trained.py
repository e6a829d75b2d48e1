"""Frozen weights: no gradient of them is computed or accumulated, no state kept, and they never change; and what a role
means for a weight."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import nnx
from jax.nn import initializers

from mtx import hlo, model
from mtx.layers import weight
from mtx.layout import TREATMENTS, Role, Weight
from mtx.model import flatten
from mtx.optim import AdamW, Constant, Group, Steps
from mtx.pipeline import Interleaved, OneFOneB, ZeroBubble
from mtx.spmd import Compiled, Manual
from mtx.step import Program

RATE = Constant(peak_lr=1e-2, warmup=Steps(count=2))
SEQUENCES, TIME, MICROBATCHES = 16, 16, 4
FROZEN = (Group(names="stacks/main/block/mlp/*", frozen=True), Group(roles=("embedding",), frozen=True), Group())
CASES: dict[str, dict[str, Any]] = {
    "one device": {},
    **{f"ZeRO {zero}": {"mesh": (1, 4, 2), "zero": zero} for zero in range(4)},
    "compiled, ZeRO 1": {"mesh": (1, 4, 2), "zero": 1, "partition": Compiled()},
    "compiled, ZeRO 3": {"mesh": (1, 4, 2), "zero": 3, "partition": Compiled()},
    "sequence parallel": {"mesh": (2, 1, 4), "sequence_parallel": True},
    "1F1B, ZeRO 2": {"mesh": (1, 2, 1), "stages": 2, "zero": 2, "schedule": OneFOneB()},
    "interleaved": {"mesh": (1, 1, 2), "stages": 2, "schedule": Interleaved(chunks=2)},
    "zero bubble, ZeRO 3": {"mesh": (1, 2, 1), "stages": 2, "zero": 3, "schedule": ZeroBubble()},
}
SLOW = ("ZeRO 1", "ZeRO 2", "compiled, ZeRO 1", "sequence parallel", "interleaved")
MODEL = dataclasses.replace(toys.LLAMA, layers=4)


def program(groups: tuple[Group, ...] | None, **kw: Any) -> Program:
    return toys.program(MODEL, optimizer=AdamW(schedule=RATE, groups=groups), **kw)


cases = pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)


@functools.cache
def gradients_of_all() -> dict[str, np.ndarray]:
    return flatten(toys.gradients(program(None), toys.weights_of(MODEL), toys.batch())[0])


def flops(p: Program) -> int:
    """Of all matrix products of a step on one device."""
    text = p.lower_train_step(MICROBATCHES, SEQUENCES, TIME).compile().as_text()
    return hlo.dot_flops(text, trips=MICROBATCHES)


def flops_of_gradients(p: Program, weights: Iterable[Weight]) -> int:
    """Of the products of activations and cotangents that are the gradients of stacked weights."""
    times = MICROBATCHES
    if p.stages > 1:  # a tick without a job counts as one with one
        times = len(p.schedule.table(p.stages, MICROBATCHES, keeps=True).rows) // p.model.placement.chunks
    return times * 2 * sum(math.prod(w.shape) for w in weights) * SEQUENCES * TIME // p.mesh.size


@cases
def test_no_gradient_of_a_frozen_weight_is_computed(case: str):
    """The compiled step lacks exactly the products that would be their gradients."""
    p = program(FROZEN, **CASES[case])
    frozen = [w for name, w in flatten(p.weights).items() if name.startswith("stacks/main/block/mlp/")]
    assert flops(program(None, **CASES[case])) - flops(p) == flops_of_gradients(p, frozen)


@cases
def test_the_others_have_their_gradients(case: str):
    p = program(FROZEN, **CASES[case])
    found, _ = toys.gradients(p, toys.weights_of(MODEL), toys.batch(), MICROBATCHES)
    wanted = {name: g for name, g in gradients_of_all().items() if name in flatten(p.trained)}
    assert len(wanted) == len(gradients_of_all()) - 3
    toys.check_close(found, wanted, 1e-5)


@cases
def test_frozen_weights_have_no_state_and_never_change(case: str):
    p = program(FROZEN, **CASES[case])
    before = jax.device_get(toys.state_of(p, toys.weights_of(MODEL)))
    state, step = toys.state_of(p, toys.weights_of(MODEL)), p.compile_train_step()
    with jax.set_mesh(p.mesh):
        for seed in range(2):
            state, _ = step(state, toys.place(p, toys.batch(seed=seed), MICROBATCHES), np.int32(MICROBATCHES))
    frozen = {"ends/token_VD", "stacks/main/block/mlp/in_DJF", "stacks/main/block/mlp/out_FD"}
    assert p.frozen == frozen
    after = flatten(state.params)
    for name, x in flatten(before.params).items():
        assert np.array_equal(x, np.asarray(after[name])) == (name in frozen), name
    assert {name.rpartition("/")[0] for name in flatten(state.parts["moments"])} == after.keys() - frozen


def test_no_gradient_of_a_frozen_weight_is_accumulated():
    """The sums over microbatches lack it: here 2 of 3 parts of the layers, in float32."""

    def temporaries(p: Program) -> int:
        compiled = p.lower_train_step(MICROBATCHES, SEQUENCES, TIME).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    wide = dataclasses.replace(MODEL, mlp=replace(MODEL.mlp, width=1024))
    some, every = (toys.program(wide, optimizer=AdamW(schedule=RATE, groups=groups)) for groups in (FROZEN, None))
    layers = sum(
        math.prod(w.shape) for name, w in flatten(some.weights).items() if name.startswith("stacks/main/block/mlp/")
    )
    assert temporaries(every) - temporaries(some) > 4 * layers


# Roles.


class Adapted(model.Layer):
    """A layer that is frozen, and small matrices beside it that are trained."""

    frozen = True

    def __init__(self, config: model.Transformer, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        for _, variable in nnx.to_flat_state(nnx.state(self)):
            variable.set_metadata(weight=replace(variable.weight, trainable=not self.frozen))
        D = config.width
        self.down_DQ = weight(rngs, "DQ", (D, 4), initializers.normal(0.5), role="adapter")
        self.up_QD = weight(rngs, "QD", (4, D), initializers.normal(0.5), meets="BTQ", role="adapter")

    def __call__(self, x_BTD, context, cache=None):
        y_BTD, sums, cache = super().__call__(x_BTD, context, cache)
        project = context.doors.project
        return y_BTD + project("BTQ,QD->BTD", project("BTD,DQ->BTQ", x_BTD, self.down_DQ), self.up_QD), sums, cache


class Thawed(Adapted):
    frozen = False


ADAPTERS = (Group(roles=("adapter",), rate=2.0, weight_decay=0.0), Group(frozen=True))


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Gradients on one device; and from now on models have adapters."""
    monkeypatch.setattr(model, "Layer", Adapted)
    wide = dataclasses.replace(MODEL, bias=True)
    found, _ = toys.gradients(toys.program(wide, optimizer=AdamW(groups=ADAPTERS)), adapted_weights(), toys.batch())
    return flatten(found)


def adapted_weights() -> dict:
    p = toys.program(dataclasses.replace(MODEL, bias=True))
    return jax.tree.map(np.asarray, p.init(3).params)


@pytest.mark.parametrize("case", ["ZeRO 3", "zero bubble, ZeRO 3"])
def test_no_gradient_of_what_a_model_froze_is_computed(case: str, monkeypatch: pytest.MonkeyPatch):
    found = {}
    for block in (Adapted, Thawed):
        monkeypatch.setattr(model, "Layer", block)
        p = program(None, **CASES[case])
        found[block] = flops(p)
    matrices = [w for w in flatten(p.weights["stacks"]).values() if w.role == "matrix"]
    assert found[Thawed] - found[Adapted] == flops_of_gradients(p, matrices)


@pytest.mark.parametrize(
    "case", ["ZeRO 3", "zero bubble, ZeRO 3", pytest.param("sequence parallel", marks=pytest.mark.slow)]
)
def test_adapters_alone_are_trained(case: str, adapted: dict[str, np.ndarray]):
    """A model's own frozen weights; the groups freeze the rest."""
    config = dataclasses.replace(MODEL, bias=True)
    p = toys.program(config, optimizer=AdamW(schedule=RATE, groups=ADAPTERS), **CASES[case])
    assert flatten(p.trained).keys() == {"stacks/main/block/down_DQ", "stacks/main/block/up_QD"} == adapted.keys()
    assert {(t.rate, t.decay) for t in flatten(p.trained).values()} == {(2.0, 0.0)}
    found, _ = toys.gradients(p, adapted_weights(), toys.batch(), MICROBATCHES)
    toys.check_close(found, adapted, 1e-5)
    state, step = toys.state_of(p, adapted_weights()), p.compile_train_step()
    with jax.set_mesh(p.mesh):
        state, metrics = step(state, toys.place(p, toys.batch(), MICROBATCHES), np.int32(MICROBATCHES))
    assert flatten(state.parts["moments"]).keys() == {f"{name}/{leaf}" for name in adapted for leaf in ("mu", "nu")}
    total = np.sqrt(sum(np.sum(np.square(g)) for g in adapted.values()))
    np.testing.assert_allclose(metrics["train/grad_norm"], total, rtol=1e-5)


def test_a_role_says_how_a_weight_is_stored_used_and_split(adapted: dict[str, np.ndarray]):
    p = toys.program(MODEL, (1, 4, 2), zero=3, stored=jnp.bfloat16, compute=jnp.bfloat16)
    state = flatten(p.init(0).params)
    dtypes = {w.role: str(state[name].dtype) for name, w in flatten(p.weights).items()}
    assert dtypes == {
        "embedding": "bfloat16",
        "head": "bfloat16",
        "matrix": "bfloat16",
        "vector": "float32",
        "adapter": "float32",
    }
    specs = {name: p.layout.spec(w, "weights") for name, w in flatten(p.weights).items()}
    assert specs["stacks/main/block/down_DQ"] == jax.P(None, "data", None)
    assert specs["stacks/main/block/norm_mlp/gain_D"] == jax.P(None, None)


@pytest.mark.parametrize("role", TREATMENTS)
@pytest.mark.parametrize("partition", [Manual(), Compiled()], ids=["manual", "compiled"])
def test_a_role_decides_what_is_cast_and_gathered(role: Role, partition: Manual | Compiled):
    p = toys.program(toys.GPT, (1, 4, 2), zero=1, compute=jnp.bfloat16, partition=partition)
    declared = Weight("DF", (8, 16), role)
    spec = p.layout.spec(declared, "weights")
    assert ("data" in spec) == TREATMENTS[role].zero
    doors = p.doors()

    def use(x: jax.Array) -> jax.Array:
        return doors.storage.for_use(nnx.Param(doors.storage.gather(declared, x), weight=declared))

    run = p.mapped(use, spec, p.layout.gathered(declared))
    with jax.set_mesh(p.mesh):
        used = jax.jit(run)(jax.device_put(np.ones((8, 16), np.float32), p.sharding(spec)))
    assert str(used.dtype) == ("bfloat16" if TREATMENTS[role].cast else "float32")
    assert used.sharding.spec == p.layout.gathered(declared)
