"""Pipelines give what one device gives: every schedule, number of stages and way to split the rest, in float32."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_equality
import toys

from mtx import decode
from mtx.decode import Sampling
from mtx.layout import Placement
from mtx.model import Model, flatten
from mtx.optim import AdamW, Constant, Group, Sgd, Steps
from mtx.pipeline import GPipe, Interleaved, OneFOneB, ZeroBubble, engine
from mtx.spmd import ManualStorage

MODELS = {"gpt": toys.GPT, "llama": toys.LLAMA}
"""With a tied head, and with one of its own."""
SCHEDULES = (GPipe(), OneFOneB(), Interleaved(), ZeroBubble())
MESHES = ((2, 1, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1))
"""(pipeline, data, model) of eight devices."""
MICROBATCHES = 4


class Case(NamedTuple):
    schedule: int
    mesh: tuple[int, int, int]
    model: str
    zero: int
    sequence_parallel: bool
    dropout: bool
    documents: bool
    remat: str = "full"
    vocabulary: str = "sharded"
    layers: int = 16

    def __str__(self) -> str:
        stages, data, tensor = self.mesh
        words = [type(SCHEDULES[self.schedule]).__name__, f"p{stages}d{data}m{tensor}", self.model, f"zero{self.zero}"]
        words += [word for word in ("sequence_parallel", "dropout", "documents") if getattr(self, word)]
        return "-".join([*words, self.remat, self.vocabulary, f"{self.layers}layers"])

    def program(self, **kw):
        stages, data, tensor = self.mesh
        return toys.program(
            config(self.model, self.layers, self.dropout, self.remat),
            (1, data, tensor),
            stages=stages,
            schedule=SCHEDULES[self.schedule],
            zero=self.zero,
            sequence_parallel=self.sequence_parallel,
            vocabulary=self.vocabulary,
            documents=self.documents,
            **kw,
        )


def config(model: str, layers: int, dropout: bool = False, remat: str = "none"):
    return dataclasses.replace(toys.dropped(MODELS[model], 0.2 if dropout else 0.0), layers=layers, remat=remat)


REMAT, VOCABULARY, LAYERS = ("none", "selective", "full", "stage"), ("sharded", "replicated"), (16, 17)
"""17 layers are even on no mesh, with or without chunks."""


def whole_matrix() -> list[Case]:
    """Every combination that does something; what it computes again, keeps and stores takes turns."""
    flags = (False, True)
    factors = (range(len(SCHEDULES)), MESHES, MODELS, range(4), flags, flags, flags)
    cases = [Case(*values) for values in itertools.product(*factors)]
    cases = [c for c in cases if (c.mesh[1] > 1 or not c.zero) and (c.mesh[2] > 1 or not c.sequence_parallel)]
    turns = itertools.cycle(itertools.product(REMAT, VOCABULARY, LAYERS))
    random = np.random.default_rng(0)
    order = random.permutation(len(cases))
    return [cases[i]._replace(remat=r, vocabulary=v, layers=n) for i, (r, v, n) in zip(order, turns, strict=False)]


MATRIX = whole_matrix()
USUAL = [case for case in MATRIX if case.mesh in ((2, 2, 2), (4, 2, 1), (8, 1, 1))]
DEFAULT = test_equality.pairwise([case for case in USUAL if (case.model == "gpt") == (case.layers == 17)])
"""Every pair on three of the meshes, each model with one number of layers."""


@functools.cache
def weights(model: str, layers: int) -> dict:
    return toys.weights_of(config(model, layers))


@functools.cache
def reference(model: str, layers: int, dropout: bool, documents: bool) -> tuple[dict, np.ndarray]:
    p = toys.program(config(model, layers, dropout), documents=documents)
    return toys.gradients(p, weights(model, layers), toys.batch())


def check(case: Case) -> None:
    found, sums = toys.gradients(case.program(), weights(case.model, case.layers), toys.batch(), MICROBATCHES)
    wanted, wanted_sums = reference(case.model, case.layers, case.dropout, case.documents)
    np.testing.assert_allclose(sums, wanted_sums, rtol=test_equality.LOSS)
    toys.check_close(found, wanted, test_equality.GRADIENTS)


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_gradients(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MATRIX if case not in DEFAULT], ids=str)
def test_gradients_whole_matrix(case: Case):
    check(case)


def test_the_matrix_is_whole():
    assert len(MATRIX) == len(set(MATRIX)) == 672
    assert {case.schedule for case in DEFAULT} == set(range(len(SCHEDULES)))
    assert {(case.remat, case.vocabulary, case.layers) for case in MATRIX} == {
        *itertools.product(REMAT, VOCABULARY, LAYERS)
    }


@pytest.mark.parametrize(("schedule", "mesh", "zero"), [(2, (1, 1, 1), 0), (3, (2, 2, 1), 3)], ids=str)
def test_bfloat16_rounds_as_it_does_without_a_pipeline(schedule: int, mesh: tuple[int, int, int], zero: int):
    """Microbatch by microbatch the same products, summed in float32: far closer than bfloat16's 4e-3."""
    model, kw = config("llama", 5), {"zero": zero, "compute": jnp.bfloat16}
    p = toys.program(model, mesh, stages=2, schedule=SCHEDULES[schedule], **kw)
    found, sums = toys.gradients(p, weights("llama", 5), toys.batch(), MICROBATCHES)
    wanted, wanted_sums = toys.gradients(
        toys.program(model, mesh, **kw), weights("llama", 5), toys.batch(), MICROBATCHES
    )
    assert {str(g.dtype) for g in flatten(found).values()} == {"float32"}
    np.testing.assert_allclose(sums, wanted_sums, rtol=1e-5)
    toys.check_close(found, wanted, 1e-5)


# Controls: each breaks one thing, and the matrix must see it.

BREAKS = {
    "both stages' embeddings": lambda m: m.setattr(
        ManualStorage, "reduce_gradient", lambda self, w, g: jax.lax.psum(g, "data") if w.layers else g
    ),
    "gradients of one microbatch": lambda m: m.setattr(
        engine._Run, "_add", lambda self, sums, found, row: engine_first(self, sums, found, row)
    ),
    "dropout by row": lambda m: m.setattr(Placement, "first", property(lambda self: np.zeros(len(self.counts), int))),
    "a permute the wrong way": lambda m: m.setattr(engine, "to_stage_before", engine.to_next_stage),
    "a layer that is not there": lambda m: m.setattr(
        engine._Run, "if_there", lambda self, place, i, run, otherwise: run()
    ),
}


def engine_first(self, sums, found, row):
    leaves, structure = jax.tree.flatten(sums)
    found = [jnp.zeros(x.shape[1:]) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(structure, [engine._write(x, g, row) for x, g in zip(leaves, found, strict=True)])


@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_is_seen(what: str, monkeypatch: pytest.MonkeyPatch):
    case = Case(1, (4, 2, 1), "gpt", 0, False, True, True, layers=5)
    reference(case.model, case.layers, case.dropout, case.documents)
    BREAKS[what](monkeypatch)
    with pytest.raises(AssertionError):
        check(case)


# What the engine holds.


@pytest.mark.parametrize(
    "groups", [None, (Group(names="stacks/*", roles=("matrix",), frozen=True), Group())], ids=["trained", "frozen"]
)
@pytest.mark.parametrize("zero", [0, 3])
def test_what_a_layer_keeps_has_no_weights_in_it(zero: int, groups, monkeypatch: pytest.MonkeyPatch):
    """Selective remat keeps less than none, full the layer's input alone; and no residual has the shape of a matrix, or
    of what ZeRO stores of it."""
    start, kept = engine._Run.start, []
    monkeypatch.setattr(engine._Run, "start", lambda self: (kept.append(self.form.kept), start(self))[1])
    for remat in ("none", "selective", "full"):
        wide = dataclasses.replace(config("llama", 2, True, remat), width=96)
        p = toys.program(wide, (1, 2, 1), stages=2, zero=zero, optimizer=Sgd(groups=groups))
        p.lower_train_step(MICROBATCHES, 4, 8)
    none, selective, _ = (sum(x.size for x in found) for found in kept)
    assert selective < none
    assert [x.shape for x in kept[2] if x.dtype == jnp.float32] == [(2, 8, 96)]
    matrices = {w.shape[1:] for w in flatten(p.weights["stacks"]).values() if w.role != "vector"}
    shards = {tuple(n // 2 if i == j else n for i, n in enumerate(s)) for s in matrices for j in range(len(s))}
    assert not {x.shape for found in kept for x in found} & (matrices | shards)


# Steps, evaluation, generation, initial weights.


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(1, (4, 2, 1), "gpt", 1, False, True, True, layers=5), marks=pytest.mark.slow),
        Case(2, (2, 2, 2), "llama", 3, True, False, True, remat="none", layers=5),
    ],
    ids=str,
)
def test_three_steps(case: Case):
    optimizer = AdamW(schedule=Constant(peak_lr=1e-2, warmup=Steps(count=2)), clip_norm=0.5)

    def steps(p, microbatches: int):
        state, losses, step = toys.state_of(p, weights(case.model, case.layers)), [], p.compile_train_step()
        with jax.set_mesh(p.mesh):
            for seed in range(3):
                batch = toys.place(p, toys.batch(seed=seed), microbatches)
                state, metrics = step(state, batch, np.int32(microbatches))
                losses.append(jax.device_get(metrics))
            toys.layers_of(p, state.params)  # rows without a layer are still zeros
            found = p.ordered(state)
        assert step._cache_size() == 1
        return found, losses

    found, rows = steps(case.program(optimizer=optimizer), MICROBATCHES)
    alone = toys.program(config(case.model, case.layers, case.dropout), documents=case.documents, optimizer=optimizer)
    wanted, wanted_rows = steps(alone, 1)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for name, value in wanted_row.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-5, err_msg=name)
    gradients, _ = reference(case.model, case.layers, case.dropout, case.documents)
    total = np.sqrt(sum(np.sum(np.square(g)) for g in flatten(gradients).values()))
    told = {name for name, g in flatten(gradients).items() if np.linalg.norm(g) > 1e-4 * total}
    told -= {"stacks/main/block/attention/bias_KGH"}  # AdamW moves the keys' by rounding alone
    for tree in (lambda state: state.params, lambda state: state.parts["moments"]):
        a, b = (flatten(jax.tree.map(np.asarray, tree(s))) for s in (found, wanted))
        assert a.keys() == b.keys()
        own = {name for name in a if name in told or name.rpartition("/")[0] in told}
        a, b = ({name: x[name] for name in own} for x in (a, b))
        toys.check_close(a, b, 5e-5)


@pytest.mark.parametrize("schedule", range(len(SCHEDULES)), ids=lambda i: type(SCHEDULES[i]).__name__)
def test_evaluation(schedule: int):
    """Fewer microbatches than stages, and more."""
    case = Case(schedule, (2, 2, 2), "gpt", 3, True, False, True, layers=5)

    def sums(p, microbatches: int):
        batch = toys.place(p, toys.batch(sequences=12), microbatches)
        return toys.eval_sums(p, toys.state_of(p, weights("gpt", 5)).params, batch)

    wanted = sums(toys.program(config("gpt", 5)), 1)
    for microbatches in (1, 3, 6):
        np.testing.assert_allclose(sums(case.program(), microbatches), wanted, rtol=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiples(OneFOneB):
    """A user's: of the stages."""

    def fits(self, stages: int, microbatches: int) -> bool:
        return microbatches % stages == 0


def test_evaluation_takes_counts_that_the_schedule_does_not():
    def sums(p, microbatches: int):
        batch = toys.place(p, toys.batch(sequences=6), microbatches)
        return toys.eval_sums(p, toys.state_of(p, weights("gpt", 5)).params, batch)

    p = toys.program(config("gpt", 5), stages=2, schedule=Multiples())
    np.testing.assert_allclose(sums(p, 3), sums(toys.program(config("gpt", 5)), 1), rtol=1e-5)


@pytest.mark.parametrize("case", [Case(1, (4, 2, 1), "gpt", 2, False, False, True, layers=5)], ids=str)
def test_logits(case: Case):
    def logits(p):
        batch = jax.tree.map(lambda x: x[0], toys.place(p, toys.batch(sequences=4), 1))
        with jax.set_mesh(p.mesh):
            return np.asarray(jax.jit(p.logits)(toys.state_of(p, weights("gpt", 5)), batch))

    wanted = logits(toys.program(config("gpt", 5)))
    np.testing.assert_allclose(logits(case.program()), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "case",
    [
        Case(2, (2, 2, 2), "llama", 3, True, False, True, layers=5),
        Case(0, (8, 1, 1), "gpt", 0, False, False, True, layers=9),
    ],
    ids=str,
)
def test_generation(case: Case):
    prompts = [np.random.default_rng(n).integers(0, 250, n).tolist() for n in (1, 5, 3, 8, 2)]
    large = jax.tree.map(lambda x: x * (8 if x.ndim > 2 else 1), weights(case.model, case.layers))

    def tokens(p, sampling: Sampling):
        return decode.generate(p, toys.state_of(p, large).params, prompts, tokens=7, sampling=sampling)

    alone = toys.program(config(case.model, case.layers))
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=40)):
        assert tokens(case.program(), sampling) == tokens(alone, sampling)


@pytest.mark.parametrize(
    ("mesh", "layers"),
    [
        ((2, 2, 2), 17),
        ((8, 1, 1), 16),
        ((3, 1, 1), 7),
        pytest.param((2, 2, 2), 16, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), 17, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_initial_weights_and_the_layers_order(mesh: tuple[int, int, int], layers: int):
    """Three stages divide no dimension of most weights: each holds all of those in order."""
    vocabulary = "replicated" if mesh[0] == 3 else "sharded"
    case = Case(2, mesh, "gpt", 3 if mesh[1] > 1 else 0, False, False, True, vocabulary=vocabulary, layers=layers)
    p, alone = case.program(optimizer=AdamW()), toys.program(config("gpt", layers), optimizer=AdamW())
    state, wanted = p.init(7), alone.init(7)
    with jax.set_mesh(p.mesh):
        ordered = p.ordered(state)
        for x, y in zip(jax.tree.leaves(ordered), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6)
        described = p.abstract_ordered()
        for x, y in zip(jax.tree.leaves(ordered), jax.tree.leaves(described), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        back = p.placed(ordered)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), back, state)
    assert ordered.params["stacks"]["main"]["block"]["mlp"]["in_DF"].is_deleted(), "two copies of the state"


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "counts", "rows"),
    [
        (4, 2, 1, (2, 2), [0, 1, 2, 3]),
        (3, 2, 1, (2, 1), [0, 1, 2, -1]),
        (4, 2, 2, (1, 1, 1, 1), [0, 2, 1, 3]),
        (5, 2, 2, (2, 1, 1, 1), [0, 1, 3, -1, 2, -1, 4, -1]),
        (3, 1, 1, (3,), [0, 1, 2]),
    ],
)
def test_where_layers_lie(layers: int, stages: int, chunks: int, counts: tuple[int, ...], rows: list[int]):
    place = Placement.even(layers, stages, chunks)
    assert place.counts == counts and place.layer_of_row.tolist() == rows
    assert [rows[i] for i in place.row_of_layer] == list(range(layers))
    assert place.in_order == (rows == list(range(layers)))
    weights = flatten(Model(dataclasses.replace(toys.GPT, layers=layers), place).weights["stacks"])
    assert {w.shape[0] for w in weights.values()} == {len(rows)} == {place.rows}


LOADED_BACK = """
import conftest, jax, numpy as np, toys
from mtx.optim import AdamW, Constant

optimizer = AdamW(schedule=Constant(peak_lr=1e-2))
p = toys.program(toys.GPT, (1, 2, 1), zero=2, stages=2, optimizer=optimizer)
state, batch, count = toys.state_of(p, toys.weights_of(toys.GPT)), toys.place(p, toys.batch(), 2), np.int32(2)
with jax.set_mesh(p.mesh):
    for steps in (1, 30):  # compiled, then from the compile cache
        step = p.compile_train_step()
        for _ in range(steps):
            state, metrics = jax.block_until_ready(step(state, batch, count))
        jax.clear_caches()
print(metrics["train/loss"])
"""


def test_a_stage_of_one_layer_loaded_back_does_not_hang(tmp_path: Path):
    """Loaded back, XLA's CPU program orders only what depends on one another: in its own process, which a hang ends."""
    flags = "--xla_cpu_collective_call_terminate_timeout_seconds=20"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOADED_BACK], env=env, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.isfinite(float(done.stdout))
    assert any(entry.name.startswith("jit_train_step") for entry in tmp_path.iterdir())
