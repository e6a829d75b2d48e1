"""The contract of optimizers: rules of many kinds move weights on every mesh as they do on one device."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import runs
import toys
from jax import lax

from mtx import hlo
from mtx.checkpoint import Checkpoints, Store, named
from mtx.errors import ConfigError
from mtx.layout import Weight
from mtx.model import flatten
from mtx.optim import Constant, Leaf, Now, Optimizer, Rule, State, Steps, from_optax
from mtx.pipeline import Interleaved
from mtx.step import Program

MODEL = dataclasses.replace(toys.LLAMA, layers=3)
RATE = Constant(peak_lr=1e-2, warmup=Steps(count=2))
ADAM = from_optax(optax.scale_by_adam())


# Muon: whole matrices.


@dataclass(frozen=True)
class Orthogonal(Rule):
    """Momentum whose singular values are moved near 1 (Jordan et al. 2024)."""

    momentum: float
    elementwise = True

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        return {"momentum": Leaf.like(weight)}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        momentum = self.momentum * state["momentum"] + g
        sides = (weight.shape[0], -1) if weight.dims[0] == "D" else (-1, weight.shape[-1])  # D and the rest

        def whole(u: jax.Array) -> jax.Array:
            return orthogonal(u.reshape(sides)).reshape(u.shape)

        return now.descend(x, now.whole(whole, g + self.momentum * momentum)), {"momentum": momentum}


def orthogonal(u: jax.Array) -> jax.Array:
    """Five Newton-Schulz iterations on a matrix."""
    x = u if u.shape[0] <= u.shape[1] else u.T
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (2.0315 * a @ a - 4.775 * a) @ x
    return x if u.shape[0] <= u.shape[1] else x.T


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonal momentum for the layers' matrices, Adam for all else."""

    momentum: float = 0.95

    def rule(self, weight: Weight) -> Rule:
        return Orthogonal(self.momentum) if weight.role == "matrix" else ADAM


# Factored second moments: one layer at a time.


class Factored(Rule):
    """The gradient over its root mean square, a product of means over rows and columns (Shazeer and Stern 2018)."""

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        first, rest = weight.dims[:1], weight.dims[1:]
        if weight.role == "vector":
            return {"square": Leaf.like(weight)}
        return {"row": Leaf.without(weight, rest), "column": Leaf.without(weight, first)}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        def mean(old: jax.Array, new: jax.Array) -> jax.Array:
            return 0.9 * old + 0.1 * new

        square = g * g + 1e-30
        if weight.role == "vector":
            new = {"square": mean(state["square"], square)}
            return now.descend(x, g * lax.rsqrt(new["square"])), new
        row = mean(state["row"], square.mean(range(1, g.ndim)))
        column = mean(state["column"], square.mean(0))
        direction = g * lax.rsqrt(row / row.mean()).reshape(-1, *(1,) * (g.ndim - 1)) * lax.rsqrt(column)
        return now.descend(x, direction), {"row": row, "column": column}


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    def rule(self, weight: Weight) -> Rule:
        return Factored()


# Schedule-free: evaluation reads an average.


class Averaged(Rule):
    """Gradient descent at a point between the iterate z and its average (Defazio et al. 2024)."""

    between = 0.9

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        return {"z": Leaf.like(weight), "rates": Leaf.scalar(weight)}

    def start(self, weight: Weight, x: jax.Array) -> State:
        return {"z": jnp.array(x, jnp.float32, copy=True), "rates": jnp.zeros(())}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        z, rates = now.descend(state["z"], g), state["rates"] + now.rate**2
        share = now.rate**2 / rates
        average = (1 - share) * self.evaluated(weight, x, state) + share * z
        return self.between * average + (1 - self.between) * z, {"z": z, "rates": rates}

    def evaluated(self, weight: Weight, x: jax.Array, state: State) -> jax.Array:
        return (x - (1 - self.between) * state["z"]) / self.between


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Optimizer):
    def rule(self, weight: Weight) -> Rule:
        return Averaged()


# Without an epsilon, which rows of zeros do not survive.


class Unit(Rule):
    """The gradient over its norm in each layer."""

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        return {}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        return now.descend(x, unit(g)), {}


class WholeUnit(Unit):
    """The same, of whole matrices."""

    elementwise = True

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        return now.descend(x, now.whole(unit, g)), {}


def unit(g: jax.Array) -> jax.Array:
    return g / jnp.sqrt(jnp.sum(g * g))


@dataclass(frozen=True, kw_only=True)
class Normed(Optimizer):
    whole: bool

    def rule(self, weight: Weight) -> Rule:
        return WholeUnit() if self.whole else Unit()


# Momentum in eight bits: blocks.


class EightBits(Rule):
    """Momentum in int8, with a scale for each block of two along the last dimension (Dettmers et al. 2022)."""

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        return {"scale": Leaf.blocks(weight, weight.dims[-1], 2), "momentum": Leaf.like(weight, jnp.int8)}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        def blocks(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:-1], -1, 2)

        momentum = 0.9 * (blocks(state["momentum"]) * state["scale"][..., None]).reshape(g.shape) + g
        scale = jnp.abs(blocks(momentum)).max(-1) / 127 + 1e-30
        bits = jnp.round(blocks(momentum) / scale[..., None]).astype(jnp.int8).reshape(g.shape)
        return now.descend(x, momentum), {"scale": scale, "momentum": bits}


@dataclass(frozen=True, kw_only=True)
class Sgd8(Optimizer):
    def rule(self, weight: Weight) -> Rule:
        return EightBits()


OPTIMIZERS = {
    "muon": (Muon(schedule=RATE), 3e-6),
    "adafactor": (Adafactor(schedule=RATE), 1e-6),
    "schedule-free": (ScheduleFree(schedule=RATE), 1e-6),
    "eight bits": (Sgd8(schedule=RATE), 1e-6),
    "norm by layer": (Normed(schedule=RATE, whole=False), 1e-6),
    "norm of whole matrices": (Normed(schedule=RATE, whole=True), 1e-6),
}
"""With the bound on each tensor's difference: Newton-Schulz in float32 is itself 1.3e-6 off float64."""
MESHES = {
    "model": {"mesh": (1, 1, 8)},
    "data and model, ZeRO 3": {"mesh": (1, 4, 2), "zero": 3},
    "replica, data and model, ZeRO 1": {"mesh": (2, 2, 2), "zero": 1},
    "pipeline with padded rows, ZeRO 3": {"mesh": (1, 2, 2), "zero": 3, "stages": 2},
    "interleaved pipeline with padded rows": {"mesh": (1, 1, 2), "stages": 2, "schedule": Interleaved(chunks=2)},
}


def updated(p: Program, times: int = 3, rate: float = 0.01) -> tuple[dict, dict, dict]:
    """(weights, optimizer state, weights for evaluation) after updates from given gradients, layers in order."""
    params = toys.weights_of(MODEL)
    state, step = toys.state_of(p, params), jax.jit(p.updated)
    with jax.set_mesh(p.mesh):
        for seed in range(times):
            random = np.random.default_rng(seed)
            host = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), params)  # noqa: B023
            gradients = jax.tree.map(jax.device_put, toys.rows_of(p, host), p.shardings("weights"))
            new, parts = step(state, gradients, jnp.float32(rate))
            state = dataclasses.replace(state, step=state.step + 1, params=new, parts=parts)
        toys.layers_of(p, state.params)  # rows without a layer are still zeros
        evaluated = dataclasses.replace(state, params=p.evaluated(state.params, state.parts))
        found = p.ordered(state)
        return tuple(
            jax.tree.map(np.asarray, x) for x in (found.params, found.parts["moments"], p.ordered(evaluated).params)
        )


@functools.cache
def alone(name: str) -> tuple[dict, dict, dict]:
    return updated(toys.program(MODEL, optimizer=OPTIMIZERS[name][0]))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_is_the_same_on_every_mesh(name: str, mesh: str):
    optimizer, bound = OPTIMIZERS[name]
    p = toys.program(MODEL, optimizer=optimizer, **MESHES[mesh])
    for found, wanted in zip(updated(p), alone(name), strict=True):
        toys.check_close(found, wanted, bound)


@pytest.mark.parametrize(
    "mesh", [pytest.param("data and model, ZeRO 3", marks=pytest.mark.slow), "pipeline with padded rows, ZeRO 3"]
)
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_three_steps(name: str, mesh: str):
    """Of training: the gradients are a mesh's own, which rounds them otherwise."""

    def steps(mesh: str | None, microbatches: int) -> tuple[dict, list[float]]:
        p = toys.program(MODEL, optimizer=OPTIMIZERS[name][0], **(MESHES[mesh] if mesh else {}))
        state, step, losses = toys.state_of(p, toys.weights_of(MODEL)), p.compile_train_step(), []
        with jax.set_mesh(p.mesh):
            for seed in range(3):
                batch = toys.place(p, toys.batch(seed=seed), microbatches)
                state, metrics = step(state, batch, np.int32(microbatches))
                losses.append(metrics["train/loss"].item())
            return jax.tree.map(np.asarray, p.ordered(state).params), losses

    (found, losses), (wanted, wanted_losses) = steps(mesh, 4), steps(None, 1)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-6)
    toys.check_close(found, wanted, 5e-6)


@pytest.mark.parametrize("name", ["adafactor", "schedule-free", "eight bits"])
def test_a_checkpoint_of_one_mesh_goes_on_on_another(name: str, tmp_path: Path):
    """Every leaf is saved with its layers in their own order, and returns to where it belongs."""
    optimizer, _ = OPTIMIZERS[name]
    first, second = (toys.program(MODEL, optimizer=optimizer, **MESHES[mesh]) for mesh in list(MESHES)[-2:])
    state, step = toys.state_of(first, toys.weights_of(MODEL)), first.compile_train_step()
    with jax.set_mesh(first.mesh):
        state, _ = step(state, toys.place(first, toys.batch(), 4), np.int32(4))
    store = Store(tmp_path, Checkpoints())
    store.save(first.ordered(state), 1, {})
    store.close()
    for p in (first, second):
        found = p.placed(store.restore(store.newest(), p.abstract_ordered()))
        assert jax.tree.map(lambda x: x.sharding, found) == p.state_shardings
        for x, wanted in zip(jax.tree.leaves(p.ordered(found)), jax.tree.leaves(first.ordered(state)), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(wanted))
    leaves = {key.rpartition("/")[2] for key in flatten(state.parts["moments"])}
    name = "moments/stacks/main/block/mlp/out_FD"
    assert {f"{name}/{leaf}" for leaf in leaves if leaf != "square"} <= named(state).keys()


def test_blocks_that_do_not_divide_over_the_mesh_are_refused():
    narrow = dataclasses.replace(toys.GPT, mlp=dataclasses.replace(toys.GPT.mlp, width=8))
    toys.program(narrow, (1, 1, 4), optimizer=OPTIMIZERS["eight bits"][0])
    with pytest.raises(ConfigError, match=r"ff=4 of weight .*/mlp/bias_F/scale does not .* legal mesh.model: 1, 2, 4"):
        toys.program(narrow, (1, 1, 8), optimizer=OPTIMIZERS["eight bits"][0])


def test_two_ways_to_see_a_layer_are_one():
    for found, wanted in zip(alone("norm by layer"), alone("norm of whole matrices"), strict=True):
        toys.check_close(found, wanted, 1e-6)


def test_layers_are_not_mixed():
    """Each layer's step has the length that the rate and its own norm say."""
    p, params = toys.program(MODEL, optimizer=OPTIMIZERS["norm by layer"][0]), toys.weights_of(MODEL)
    after = flatten(updated(p, 1)[0])
    for name, x in flatten(params).items():
        w = flatten(p.weights)[name]
        moved = x * (1 - 0.01 * 0.1 * w.treatment.decays) - after[name]
        lengths = np.sqrt(np.sum(np.square(moved), axis=tuple(range(w.layers, x.ndim))))
        np.testing.assert_allclose(lengths, 0.01, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", ["data and model, ZeRO 3", "pipeline with padded rows, ZeRO 3"])
def test_whole_matrices_cost_two_exchanges_for_each_split_dimension(mesh: str):
    p = toys.program(MODEL, optimizer=OPTIMIZERS["muon"][0], **MESHES[mesh])
    state = p.abstract_state()
    with jax.set_mesh(p.mesh):
        compiled = jax.jit(p.updated).lower(state, state.params, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    rows = hlo.census(compiled.as_text(), dict(p.mesh.shape))
    matrices = [w for w in flatten(p.weights).values() if w.role == "matrix"]
    split = sum(sum(part is not None for part in p.layout.spec(w, "optimizer")[1:]) for w in matrices)
    assert {row.kind for row in rows} == {"all-to-all"}
    assert sum(row.count for row in rows) == 2 * split


# Evaluation.


def test_evaluation_reads_the_average():
    """z after n steps at a constant rate, averaged, is what the rule's definition says; the loss is that of it."""
    p, params = toys.program(MODEL, optimizer=ScheduleFree(schedule=RATE, weight_decay=0.0)), toys.weights_of(MODEL)
    random = [np.random.default_rng(seed) for seed in range(3)]
    steps = [jax.tree.map(lambda x, r=r: r.standard_normal(x.shape).astype(np.float32), params) for r in random]
    z, sums = params, jax.tree.map(np.zeros_like, params)
    for g in steps:
        z = jax.tree.map(lambda z, g: z - 0.5 * g, z, g)
        sums = jax.tree.map(np.add, sums, z)
    mean = jax.tree.map(lambda x: x / 3, sums)
    trained, moments, evaluated = updated(p, rate=0.5)
    toys.check_close(evaluated, mean, 1e-5)
    parts = {"moments": jax.tree.map(jnp.asarray, moments)}
    state = dataclasses.replace(toys.state_of(p, trained), parts=parts)
    batch = toys.place(p, toys.batch(), 1)
    average, own = p.evaluated(state.params, parts), state.params
    found, other, wanted = (toys.eval_sums(p, x, batch) for x in (average, own, toys.state_of(p, mean).params))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(other[0] - found[0]) > 0.01 * found[0]


RUN = """
import json, sys
import main
from mtx.config import root
from test_rules import ScheduleFree

root.Config.__annotations__["optimizer"] |= ScheduleFree  # as whoever adds one does, in config/root.py
folder, words = sys.argv[1], sys.argv[2:]
assert main.main(["main.py", *words]) == 0
assert main.main(["main.py", "eval", folder]) == 0

import jax
from pathlib import Path
from mtx.building import open_run, open_weights
from mtx.validation import validate

run = open_run(Path(folder), [], None)
eval_fn = jax.jit(run.program.eval_sums)
with jax.set_mesh(run.program.mesh):
    for params in (run.params, open_weights(Path(folder), run.program)[1]):
        print(validate(run.config, run.program, run.loader, eval_fn, params)["val/loss"])
"""


def test_a_run_and_its_verbs_evaluate_the_average(tmp_path: Path):
    words = ["optimizer=ScheduleFree", "optimizer.schedule.peak_lr=0.5", "mesh.pipeline=2", "model.layers=3"]
    command = runs.command(tmp_path / "run", *words, "--devices", "2")[2:]
    env = os.environ | {"PYTHONPATH": f"{runs.ROOT}{os.pathsep}{runs.ROOT}/tests"}
    child = [sys.executable, "-c", RUN, str(tmp_path / "run"), *command]
    said = subprocess.run(child, env=env, cwd=runs.ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    *_, by_verb, average, trained = said
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (logged,) = [row["val/loss"] for row in rows if row["step"] == 12 and "val/loss" in row]
    assert json.loads(by_verb)["loss"] == pytest.approx(logged, rel=1e-6)
    assert float(average) == pytest.approx(logged, rel=1e-6)
    assert abs(float(trained) - logged) > 1e-3


def test_without_such_a_rule_evaluation_reads_what_is_trained():
    p = toys.program(MODEL, optimizer=OPTIMIZERS["adafactor"][0])
    state = toys.state_of(p, toys.weights_of(MODEL))
    assert p.evaluated(state.params, state.parts) is state.params


# What optax's transformations may be.


@pytest.mark.parametrize(
    "transformation",
    [
        optax.scale_by_adam(nesterov=True),
        optax.scale_by_lion(),
        optax.chain(optax.trace(0.9), optax.scale(0.5)),
        optax.scale_by_rms(),
        optax.scale_by_radam(),
        optax.identity(),
    ],
    ids=["nadam", "lion", "chain", "rms", "radam", "identity"],
)
def test_optax_moves_a_weight_as_it_does_alone(transformation: optax.GradientTransformation):
    rule, weight = from_optax(transformation), Weight("DF", (4, 6))
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((4, 6)), jnp.float32)
    wanted, theirs, state = x, transformation.init(x), rule.start(weight, x)
    for step in range(3):
        g = jnp.asarray(random.standard_normal((4, 6)), jnp.float32)
        now = Now(jnp.int32(step), jnp.float32(0.1), 0.01, lambda f, u: f(u))
        x, state = rule.update(weight, now, g, x, state)
        direction, theirs = transformation.update(g, theirs, wanted)
        wanted = wanted - 0.1 * (direction + 0.01 * wanted)
        np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("transformation", "said"),
    [
        (optax.contrib.scale_by_muon(), "optax keeps ns_coeffs"),
        (optax.scale_by_factored_rms(min_dim_size_to_factor=2), r"optax keeps v_row of shape \(3,\)"),
        (optax.scale_by_trust_ratio(), "not elementwise"),
        (optax.clip_by_block_rms(1.0), "not elementwise"),
        (optax.add_noise(0.1, 0.5, 0), "optax keeps rng_key"),
    ],
    ids=["muon", "factored", "lamb", "block rms", "noise"],
)
def test_what_is_not_elementwise_is_refused(transformation: optax.GradientTransformation, said: str):
    with pytest.raises(ValueError, match=said):
        from_optax(transformation)
