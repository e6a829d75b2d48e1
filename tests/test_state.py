"""Parts of the train state: an average of weights on every mesh, in checkpoints, in runs that switch it on or off."""

import dataclasses
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import toys
from test_rules import ScheduleFree

from mtx import hlo
from mtx.building import build, open_weights
from mtx.checkpoint import Checkpoints, Store, named
from mtx.checkpoint import digests as checkpoint_digests
from mtx.config import read_config
from mtx.errors import ConfigError
from mtx.layout import Weight
from mtx.model import flatten
from mtx.optim import AdamW, Constant, Group, Steps
from mtx.pipeline import Interleaved
from mtx.spmd import Compiled, Params
from mtx.state import Ema, Part, TrainState, Update
from mtx.step import Program

MODEL = dataclasses.replace(toys.LLAMA, layers=3)
OPTIMIZER = AdamW(schedule=Constant(peak_lr=1e-2, warmup=Steps(count=2)))
EMA = Ema(decay=0.55, warmup_steps=2)
MESHES = {
    "one device": {},
    "replica, data and model, ZeRO 1": {"mesh": (2, 2, 2), "zero": 1},
    "data and model, ZeRO 3": {"mesh": (1, 4, 2), "zero": 3},
    "data and model, ZeRO 2, Compiled": {"mesh": (1, 4, 2), "zero": 2, "partition": Compiled()},
    "pipeline with padded rows, ZeRO 3": {"mesh": (1, 2, 2), "zero": 3, "stages": 2},
    "interleaved pipeline with padded rows": {"mesh": (1, 1, 2), "stages": 2, "schedule": Interleaved(chunks=2)},
}


def program(mesh: str = "one device", **kw) -> Program:
    return toys.program(MODEL, **{"optimizer": OPTIMIZER, "more_parts": (EMA,), **MESHES[mesh], **kw})


def host(p: Program, tree: Params) -> dict[str, np.ndarray]:
    """Arrays with a weight's shape by name, layers in order; rows without a layer must be zeros."""
    return flatten(toys.layers_of(p, jax.tree.map(np.asarray, tree)))


def steps(p: Program, count: int, bad: int | None = None) -> list[TrainState]:
    """Copies on the host of the state before and after each step; the gradients of step `bad` are not finite."""
    step, state = p.compile_train_step(), toys.state_of(p, toys.weights_of(MODEL))
    states = [jax.device_get(state)]
    with jax.set_mesh(p.mesh):
        for number in range(1, count + 1):
            arrays = toys.batch(seed=number)
            if number == bad:
                arrays["weights"][3, 3] = np.inf
            state, _ = step(state, toys.place(p, arrays, 4), np.int32(4))
            states.append(jax.device_get(state))
            for name, x in flatten(state.params).items():
                average = flatten(state.parts["ema"])[name]
                assert (average.sharding, average.dtype) == (x.sharding, jnp.float32), name
    return states


# The average.


@pytest.mark.parametrize("mesh", MESHES)
def test_the_average_is_that_of_float64(mesh: str):
    """Of the weights of each step, the third of which is skipped: it moves neither weights nor average, nor counts."""
    p, bad = program(mesh), 3
    states = steps(p, 6, bad)
    wanted, updates = {n: x.astype(np.float64) for n, x in host(p, states[0].params).items()}, 0
    for number, (before, after) in enumerate(itertools.pairwise(states), 1):
        assert int(after.skipped) == (number >= bad)
        if number == bad:
            for x, y in zip(jax.tree.leaves(before.parts), jax.tree.leaves(after.parts), strict=True):
                np.testing.assert_array_equal(x, y)
            continue
        updates += 1
        decay = min(0.55, updates / (updates + 2))
        wanted = {n: decay * wanted[n] + (1 - decay) * x for n, x in host(p, after.params).items()}
        for name, x in host(p, after.parts["ema"]).items():
            error = np.linalg.norm((x - wanted[name]).ravel())
            assert error <= 3e-7 * np.linalg.norm(wanted[name].ravel()), (number, name)
    assert updates == 5
    weights, average = (
        host(p, tree)["stacks/main/block/mlp/out_FD"] for tree in (states[-1].params, states[-1].parts["ema"])
    )
    assert np.linalg.norm((weights - average).ravel()) > 1e-3 * np.linalg.norm(weights.ravel())


def test_what_is_stored_in_bfloat16_is_averaged_in_float32():
    p = program(stored=jnp.bfloat16)
    state = steps_of(p, 2)
    average = flatten(state.parts["ema"])
    assert {str(x.dtype) for x in average.values()} == {"float32"}
    read = flatten(p.evaluated(state.params, state.parts))
    for name, x in flatten(state.params).items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], average[name].astype(x.dtype))
    assert any((x != x.astype(jnp.bfloat16)).any() for x in average.values())


def steps_of(p: Program, count: int) -> TrainState:
    step, state = p.compile_train_step(), p.init(0)
    with jax.set_mesh(p.mesh):
        for number in range(count):
            state, _ = step(state, toys.place(p, toys.batch(seed=number), 1), np.int32(1))
    return state


def test_a_high_decay_keeps_its_digits():
    """1 - 0.99999 in float32 is off by 1 %."""
    old, new = {"w": jnp.zeros((), jnp.float32)}, {"w": jnp.ones((), jnp.float32)}
    now = Update(gradients={}, params=new, updates=jnp.int32(10**7), rate=jnp.float32(0))
    _, average = Ema(decay=0.99999).step(now, old)
    np.testing.assert_allclose(average["w"], 1e-5, rtol=1e-6)


def test_evaluation_reads_the_average_where_it_lies_and_frozen_weights_as_they_are():
    groups = (Group(roles=("embedding",), frozen=True), Group())
    p = program("data and model, ZeRO 3", optimizer=dataclasses.replace(OPTIMIZER, groups=groups))
    state = p.init(0)
    frozen = {name for name, w in flatten(p.weights).items() if w.role == "embedding"}
    average, read = flatten(state.parts["ema"]), flatten(p.evaluated(state.params, state.parts))
    assert frozen and average.keys() == flatten(state.params).keys() - frozen
    for name, x in flatten(state.params).items():
        assert read[name] is (x if name in frozen else average[name])


def test_evaluation_of_the_weights_that_are_trained():
    p = program(more_parts=(dataclasses.replace(EMA, evaluate=False),))
    state = p.init(0)
    assert p.evaluated(state.params, state.parts) is state.params


def test_two_parts_that_evaluation_would_read_are_refused():
    optimizer = ScheduleFree(schedule=OPTIMIZER.schedule)
    with pytest.raises(ConfigError, match="optimizer=ScheduleFree has weights of its own for evaluation, and ema"):
        program(optimizer=optimizer)
    p = program(optimizer=optimizer, more_parts=(dataclasses.replace(EMA, evaluate=False),))
    assert p.evaluated_part is p.parts["moments"]


@pytest.mark.parametrize("mesh", ["data and model, ZeRO 3", "pipeline with padded rows, ZeRO 3"])
def test_the_average_needs_no_communication(mesh: str):
    def collectives(p: Program) -> list[str]:
        text = p.lower_train_step(4, 32, 16).compile().as_text()
        return sorted(map(str, hlo.census(text, dict(p.mesh.shape))))

    assert collectives(program(mesh)) == collectives(program(mesh, more_parts=()))


# Any part.


@dataclass(frozen=True)
class Scale(Part):
    """A number that a step doubles and a skipped step halves, as loss scales do."""

    name = "scale"

    def leaves(self, weights: Params) -> Params:
        return {"scale": Weight("", (), "vector")}

    def start(self, params: Params, seed: jax.Array) -> Params:
        return {"scale": 8.0 + seed.astype(jnp.float32)}

    def step(self, now: Update, old: Params) -> tuple[Params, Params]:
        return now.params, {"scale": old["scale"] * 2}

    def skipped(self, old: Params) -> Params:
        return {"scale": old["scale"] / 2}


def test_a_part_may_say_what_a_skipped_step_does():
    p = program("data and model, ZeRO 3", more_parts=(EMA, Scale()))
    states = steps(p, 3, bad=2)
    assert [float(state.parts["scale"]["scale"]) for state in states] == [8, 16, 8, 16]
    assert "scale/scale" in named(states[-1])


@pytest.mark.parametrize("order", [(EMA, Scale()), (Scale(), EMA)], ids=lambda order: order[0].name)
def test_a_checkpoint_of_one_mesh_goes_on_on_another(order: tuple[Part, ...], tmp_path: Path):
    """Every array is saved with its layers in their own order, and returns to where it belongs; a part that the
    checkpoint lacks starts from the weights, one that the program lacks is not read."""
    first, *others = (program(mesh, more_parts=order) for mesh in list(MESHES)[:-4:-1])
    step, state = first.compile_train_step(), first.init(1)
    with jax.set_mesh(first.mesh):
        state, _ = step(state, toys.place(first, toys.batch(), 4), np.int32(4))
        wanted = first.ordered(state)
    store = Store(tmp_path, Checkpoints())
    store.save(wanted, 1, {})
    store.close()
    found = store.newest()
    for p in others:
        restored = p.placed(store.restore(found, p.abstract_ordered()))
        assert jax.tree.map(lambda x: x.sharding, restored) == p.state_shardings
        for x, y in zip(jax.tree.leaves(p.ordered(restored)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    p = program("pipeline with padded rows, ZeRO 3", more_parts=(Scale(),))
    restored = p.placed(store.restore(found, p.abstract_ordered()))
    assert restored.parts.keys() == {"moments", "scale"}
    p = program("pipeline with padded rows, ZeRO 3")
    begun = p.started(dataclasses.replace(restored, parts={"moments": restored.parts["moments"]}))
    assert jax.tree.map(lambda x: x.sharding, begun) == p.state_shardings
    for (name, x), y in zip(flatten(begun.params).items(), flatten(begun.parts["ema"]).values(), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)
    with jax.set_mesh(p.mesh):
        p.compile_train_step()(
            begun, toys.place(p, toys.batch(), 4), np.int32(4)
        )  # which donates both: they are two buffers


# Runs.

WORDS = ["optimizer.schedule=Constant", "optimizer.schedule.peak_lr=0.01", "checkpoints.every_steps=6", "eval_every=0"]
ON = ["ema=Ema", "ema.decay=0.9", "ema.warmup_steps=0"]


def values(workdir: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in runs.rows(workdir) if name in row}


def trees(workdir: Path, step: int) -> set[str]:
    return Store(workdir / "checkpoints").at(step).manifest.trees


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps without an average, of which steps 6 and 12 are kept."""
    workdir = tmp_path_factory.mktemp("without")
    runs.train(workdir, "--devices", "1", *WORDS)
    return workdir


def test_a_run_that_switches_it_on_and_off(without: Path, tmp_path: Path):
    workdir = tmp_path / "run"
    shutil.copytree(without, workdir)
    shutil.rmtree(workdir / "checkpoints/12")
    # On, on another mesh.
    mesh = ["--devices", "4", "mesh.data=2", "mesh.model=2", "layout.zero=3"]
    said = runs.train(workdir, *WORDS, *mesh, *ON, "steps=9")
    assert "changed     ema: None -> Ema" in said
    assert "started     ema, which the checkpoint lacks, from the weights of step 6" in said
    assert (
        "ema         average of the weights, decay 0.9; evaluation and generation read it (ema.evaluate=false" in said
    )
    assert trees(workdir, 9) == trees(workdir, 6) | {"ema"}
    said = runs.train(workdir, "--devices", "1", *WORDS, *ON, "steps=9")
    assert "resumed     step 9" in said and "started" not in said and "come to its end before" in said
    # The verbs read it, and the weights where they are told to.
    verbs = [["eval", str(workdir), *more] for more in ([], ["ema.evaluate=false"], ["ema=None"], ["--step", "6"])]
    verbs += [["generate", str(workdir), "--prompt", "Line", *more] for more in ([], ["ema=None"])]
    average, raw, none, lacking, *texts = runs.ask(verbs)
    losses = [json.loads(answer.out)["loss"] for answer in (average, raw, none)]
    assert losses[0] == pytest.approx(values(workdir, "val/loss")[9], rel=1e-5)
    assert losses[1] == losses[2] < losses[0] - 1e-3
    assert "evaluation and generation read it" in average.err
    assert "evaluation and generation read the weights that are trained" in raw.err
    assert lacking.code == 66 and "holds no ema; ema=None reads the weights that were trained" in lacking.err
    assert texts[0].out != texts[1].out
    # For whoever exports: the average, and the weights.
    p = build(read_config(workdir), jax.devices()[:1])
    (_, exported), (_, trained) = (open_weights(workdir, p, evaluated=which) for which in (True, False))
    digests = Store(workdir / "checkpoints").at(9).manifest.arrays
    for tree, found in (("ema", exported), ("params", trained)):
        for name, x in named(found).items():
            assert checkpoint_digests({name: x})[0][name] == digests[f"{tree}/{name}"].digest
    # Off: refused, or left behind; what is trained is what it was without it.
    said = runs.train(workdir, "--devices", "1", *WORDS, code=64)
    assert "the run in this folder (step 9) has ema in its state, which this config no longer keeps. Undo" in said
    said = runs.train(workdir, "--devices", "1", *WORDS, "--accept-changes")
    assert "accepted: the state goes on without ema" in said
    assert trees(workdir, 12) == trees(without, 12)
    losses = [[*values(run, "train/loss").values()] for run in (workdir, without)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 12


def test_momentum_switched_on_starts_at_zero(tmp_path: Path):
    """The optimizer's state is a part as others are."""
    words = ["--devices", "1", *WORDS, "optimizer=Sgd"]
    runs.train(tmp_path, *words, "steps=6")
    said = runs.train(tmp_path, *words, "optimizer.momentum=0.9", "steps=7")
    assert "started     moments, which the checkpoint lacks, from the weights of step 6" in said
    said = runs.train(tmp_path, *words, "steps=8", code=64)
    assert "has moments in its state" in said


def test_init_from_averages_the_weights_that_it_takes(without: Path, tmp_path: Path):
    """Not those that were drawn before."""
    runs.train(tmp_path, "--devices", "1", f"init_from={without}", "steps=1", "seed=3", "ema=Ema", "ema.warmup_steps=0")
    p = build(read_config(tmp_path), jax.devices()[:1])
    average, trained = (flatten(open_weights(tmp_path, p, evaluated=which)[1]) for which in (True, False))
    for name in ("ends/token_VD", "stacks/main/block/mlp/out_FD"):
        x, a = np.asarray(trained[name]), np.asarray(average[name])
        assert 0 < np.linalg.norm((x - a).ravel()) < 0.05 * np.linalg.norm(x.ravel()), name
