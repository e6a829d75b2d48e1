"""The equality matrix: one global batch, one seed, every mesh and lowering against one device, in float32."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx.layout import megatron
from mtx.model import flatten
from mtx.optim import AdamW, Constant, Sgd, Steps
from mtx.spmd import Compiled, Manual, ManualActivations, ManualStorage, manual, map_weights

UNIFORM = {"gpt": toys.GPT, "llama": toys.LLAMA, "odd": toys.ODD}
MODELS = UNIFORM | {"alternating": toys.ALTERNATING, "wide": toys.WIDE_FIRST}
GRADIENTS = 1e-5
LOSS = 1e-5


class Case(NamedTuple):
    model: str
    dropout: bool
    accumulate: int
    mesh: tuple[int, int, int]
    zero: int
    sequence_parallel: bool
    compiled: bool

    def __str__(self) -> str:
        replica, data, tensor = self.mesh
        words = [self.model, f"r{replica}d{data}m{tensor}", f"zero{self.zero}", f"acc{self.accumulate}"]
        words += [word for word in ("dropout", "sequence_parallel", "compiled") if getattr(self, word)]
        return "-".join(words)

    def program(self, **kw):
        return toys.program(
            toys.dropped(MODELS[self.model], 0.2 if self.dropout else 0.0),
            self.mesh,
            zero=self.zero,
            sequence_parallel=self.sequence_parallel,
            partition=Compiled() if self.compiled else Manual(),
            **kw,
        )


def whole_matrix() -> list[Case]:
    """Every combination that does something: ZeRO needs data > 1, sequence parallelism model > 1."""
    factors = (MODELS, (False, True), (1, 4), toys.MESHES, range(4), (False, True), (False, True))
    cases = [Case(*values) for values in itertools.product(*factors)]
    return [c for c in cases if (c.mesh[1] > 1 or not c.zero) and (c.mesh[2] > 1 or not c.sequence_parallel)]


def pairwise(cases: list[Case]) -> list[Case]:
    """A greedy cover: every pair of values that occurs together somewhere occurs in what is chosen."""

    def pairs(case: Case) -> set:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


MATRIX = whole_matrix()
USUAL = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (2, 1, 4))
"""Each axis alone, each pair of axes, and all three."""
STACKED = [
    Case("alternating", False, 4, (1, 8, 1), 2, False, False),
    Case("alternating", True, 4, (1, 4, 2), 3, True, False),
    Case("alternating", False, 1, (2, 2, 2), 3, True, True),
    Case("wide", True, 4, (8, 1, 1), 0, False, False),
    Case("wide", False, 4, (1, 1, 8), 0, True, False),
    Case("wide", False, 1, (2, 2, 2), 2, False, True),
    Case("wide", True, 4, (2, 1, 4), 0, True, False),
]
"""Models of several kinds of layer: each axis, lowering and ZeRO 2 and 3 once."""
DEFAULT = pairwise([case for case in MATRIX if case.mesh in USUAL and case.model in UNIFORM]) + STACKED


@functools.cache
def weights(model: str) -> dict:
    return toys.weights_of(MODELS[model])


@functools.cache
def reference(model: str, dropout: bool) -> tuple[dict, np.ndarray]:
    plain = dataclasses.replace(MODELS[model].attention, backend="plain")
    one = dataclasses.replace(MODELS[model], attention=plain)
    p = toys.program(toys.dropped(one, 0.2 if dropout else 0.0))
    return toys.gradients(p, weights(model), toys.batch())


def check(case: Case) -> None:
    found, sums = toys.gradients(case.program(), weights(case.model), toys.batch(), case.accumulate)
    wanted, wanted_sums = reference(case.model, case.dropout)
    np.testing.assert_allclose(sums, wanted_sums, rtol=LOSS)
    toys.check_close(found, wanted, GRADIENTS)


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_gradients(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in MATRIX if case not in DEFAULT], ids=str)
def test_gradients_whole_matrix(case: Case):
    check(case)


def test_the_matrix_is_whole():
    assert len(MATRIX) == 1720
    assert {case.mesh for case in DEFAULT} == set(USUAL) < set(toys.MESHES)


# Tables of the user's own.

REPLACED = {"whole vocabulary": {"vocab"}, "whole feed-forward": {"ff"}, "whole heads": {"heads", "kv_heads"}}


@pytest.mark.parametrize(
    ("what", "model"),
    [
        pytest.param(what, model, marks=() if i == j else pytest.mark.slow)
        for i, what in enumerate(REPLACED)
        for j, model in enumerate(MODELS)
    ],
)
def test_a_replaced_table_changes_nothing(what: str, model: str):
    rows = tuple(row for row in megatron(1, False) if row.dimension not in REPLACED[what])
    p = toys.program(MODELS[model], (1, 2, 4), rows=rows)
    assert not list(p.layout.layout.check())
    found, sums = toys.gradients(p, weights(model), toys.batch(), 4)
    np.testing.assert_allclose(sums, reference(model, False)[1], rtol=LOSS)
    toys.check_close(found, reference(model, False)[0], GRADIENTS)


# Controls: each breaks one collective of the layout, and the matrix must see it.

BREAKS = {
    "no sum at the entry": lambda m: m.setattr(manual, "_sum_gradient", lambda axes, x: x),
    "no sum of norm gains over model": lambda m: m.setattr(
        ManualStorage, "reduce_gradient", lambda self, w, g: jax.lax.psum(g, self.layout.batch_axes)
    ),
    "gradients of one replica": lambda m: m.setattr(ManualStorage, "reduce_gradient", lambda self, w, g: g),
    "dropout by local position": lambda m: m.setattr(
        ManualActivations, "index", lambda self, letters, letter, x: jnp.arange(x.shape[letters.index(letter)])
    ),
}
BROKEN = {
    "no sum at the entry": Case("gpt", False, 1, (1, 2, 4), 0, False, False),
    "no sum of norm gains over model": Case("llama", False, 1, (1, 2, 4), 0, True, False),
    "gradients of one replica": Case("gpt", False, 1, (2, 4, 1), 0, False, False),
    "dropout by local position": Case("gpt", True, 1, (1, 1, 8), 0, True, False),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_layout_is_seen(what: str, monkeypatch: pytest.MonkeyPatch):
    BREAKS[what](monkeypatch)
    with pytest.raises(AssertionError):
        check(BROKEN[what])


# Steps: the optimizer sees the same thing everywhere.

STEPS = {
    "sgd": (Sgd(schedule=Constant(peak_lr=0.1, warmup=Steps(count=2)), clip_norm=0.5, momentum=0.9), 1e-5),
    "adamw": (AdamW(schedule=Constant(peak_lr=1e-2, warmup=Steps(count=2)), clip_norm=0.5), 5e-5),
}
STEP_CASES = [
    Case("gpt", True, 4, (1, 8, 1), 1, False, False),
    Case("llama", False, 1, (2, 2, 2), 2, True, False),
    Case("gpt", False, 4, (1, 2, 4), 3, True, False),
    Case("llama", True, 4, (1, 1, 8), 0, False, False),
    Case("gpt", True, 1, (2, 2, 2), 3, True, True),
    Case("llama", False, 4, (1, 4, 2), 1, False, True),
]


@functools.cache
def three_steps(case: Case | None, model: str, dropout: bool, optimizer: str) -> tuple[tuple[dict, dict], list[dict]]:
    """(weights, optimizer state), metrics of each step."""
    kw = {"optimizer": STEPS[optimizer][0]}
    p = case.program(**kw) if case else toys.program(toys.dropped(MODELS[model], 0.2 if dropout else 0.0), **kw)
    count = case.accumulate if case else 1
    state, rows = toys.state_of(p, weights(model)), []
    step = p.compile_train_step()
    with jax.set_mesh(p.mesh):
        for seed in range(3):
            state, metrics = step(state, toys.place(p, toys.batch(seed=seed), count), np.int32(count))
            rows.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    return jax.tree.map(np.asarray, (state.params, state.parts["moments"])), rows


STEP_DEFAULT = [(STEP_CASES[i], name) for i, name in ((0, "sgd"), (1, "adamw"), (2, "sgd"), (5, "adamw"))]


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        pytest.param(case, name, marks=() if (case, name) in STEP_DEFAULT else pytest.mark.slow, id=f"{case}-{name}")
        for case in STEP_CASES
        for name in STEPS
    ],
)
def test_three_steps(case: Case, optimizer: str):
    both, rows = three_steps(case, case.model, case.dropout, optimizer)
    wanted_both, wanted_rows = three_steps(None, case.model, case.dropout, optimizer)
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        for name, value in wanted_row.items():
            np.testing.assert_allclose(row[name], value, rtol=2e-5, err_msg=name)
    for found, wanted in zip(both, wanted_both, strict=True):
        if optimizer == "adamw":
            found, wanted = without_noise(case, found), without_noise(case, wanted)
        toys.check_close(found, wanted, STEPS[optimizer][1])


def without_noise(case: Case, arrays: dict) -> dict:
    """Weights or moments without those that rounding alone moves: AdamW divides by the gradient's size, and some have
    a true gradient of zero (GPT-2's key bias)."""
    gradients, _ = reference(case.model, case.dropout)
    total = np.sqrt(sum(np.sum(np.square(g)) for g in flatten(gradients).values()))
    keep = {name for name, g in flatten(gradients).items() if np.linalg.norm(g) > 1e-4 * total}
    kept = {name: x for name, x in flatten(arrays).items() if name in keep or name.rpartition("/")[0] in keep}
    return {
        name: np.delete(x, -2, axis=2) if "attention/bias_KGH" in name else x  # queries and values; not keys
        for name, x in kept.items()
    }


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=() if mesh in USUAL[:4] else pytest.mark.slow) for mesh in toys.MESHES],
    ids=str,
)
def test_initial_weights(mesh: tuple[int, int, int]):
    p = toys.program(toys.GPT, mesh, zero=3 if mesh[1] > 1 else 0, optimizer=AdamW())
    found, wanted = p.init(7), toys.program(toys.GPT).init(7)
    moments = flatten(found.parts["moments"])
    for (name, x), y in zip(flatten(found.params).items(), flatten(wanted.params).values(), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-6, err_msg=name)
        assert x.sharding == flatten(p.shardings("weights"))[name]
        for moment in (moments.pop(f"{name}/mu"), moments.pop(f"{name}/nu")):
            assert (moment.shape, moment.sharding) == (x.shape, x.sharding), name
            assert not np.asarray(moment).any(), name
    assert not moments


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_random_bits(mesh: tuple[int, int, int]):
    p = toys.program(toys.GPT, mesh, zero=3 if mesh[1] > 1 else 0)

    def bits(seed: jax.Array) -> dict:
        key = jax.random.key(seed)
        return map_weights(lambda w: jax.random.bits(key, w.shape), p.weights)

    with jax.set_mesh(p.mesh):
        found = jax.jit(bits, out_shardings=p.shardings("weights"))(np.uint32(3))
    wanted = jax.jit(bits)(np.uint32(3))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), found, wanted)
