"""Every pair of features is equal to one device or refused with a sentence, and docs/composition.md says which."""

import dataclasses
import functools
import itertools
import zlib

import composition
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from composition import DEFAULT, FEATURES, ROUNDED_LOSS, ROUNDING, Case, config_of, devices_of, optimizers
from corpora import corpus, texts

from data import Completion, Loader, SentencePairs
from mtx import config as configs
from mtx.building import build, make_loader
from mtx.config import Config
from mtx.model import flatten
from mtx.spmd import ManualActivations, ManualStorage, map_weights, replaced
from mtx.step import Program

LOSS = 1e-5
GRADIENTS = 1e-5
UPDATES = 3e-6
"""As in tests/test_rules.py: Newton-Schulz in float32 is itself 1.3e-6 off float64."""
STORED = 3e-4
"""The same of weights stored in bfloat16, of which few may be rounded to a neighbour."""
CASES = composition.cases_of_page()


def one_device(case: Case) -> Case:
    """The features of the reference: those that say what is computed."""
    return tuple(feature for feature in case if not feature.changes_nothing)


def without_rounding(case: Case) -> Case:
    """The case in float32."""
    return tuple(feature for feature in case if not feature.rounds)


def program_of(case: Case) -> tuple[Config, Program]:
    """The config and program of a case with one optimizer at most."""
    config = config_of(case)
    configs.check(config, devices_of(config))
    return config, build(config, jax.devices()[: devices_of(config)])


@functools.cache
def loader_of(config: Config) -> Loader:
    """Rows of a corpus in memory, of documents that the objective is for."""
    if isinstance(config.objective, SentencePairs):
        text = corpus([[b"One sentence. ", b"Another. ", b"The third. "] for _ in range(60)])
    elif isinstance(config.objective, Completion):
        text = corpus([[f"{i} and {i}".encode(), f"is {2 * i}".encode()] for i in range(60)])
    else:
        text = corpus(texts(60, 25, "d"))
    return make_loader(config, text)


def rows(config: Config) -> dict[str, np.ndarray]:
    """The arrays_BT of the first step, with so few targets in some rows that a mean of means would be another."""
    arrays = loader_of(config).train(range(config.batch.global_size))
    arrays["weights"][:3, 2:] = 0.0
    time = config.batch.sequence_length if config.length_warmup is None else config.length_warmup.length(0)
    return {name: x[:, :time] for name, x in arrays.items()}


def weights_of(p: Program) -> dict:
    """Host arrays of random weights, alike on every mesh, layers in order and as they are stored."""

    def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        return x + 1 if "gain" in name else x

    declared = flatten(p.model.ordered_weights)
    values = iter([random(name, weight.shape) for name, weight in declared.items()])
    params = map_weights(lambda _: next(values), p.model.ordered_weights)
    return map_weights(lambda w, x: x.astype(p.stored) if w.treatment.reduced else x, p.model.ordered_weights, params)


def gradients(case: Case) -> tuple[dict, np.ndarray]:
    """(gradients of the mean loss; objective, cross entropy and labels)."""
    config, p = program_of(optimizers(case)[0])
    return toys.gradients(p, weights_of(p), rows(config), configs.microbatches(config, dict(p.mesh.shape)))


def updated(case: Case) -> tuple[dict, ...]:
    """(weights, weights for evaluation) after three updates from given gradients, layers in order."""
    _, p = program_of(case)
    params = weights_of(p)
    state, step = toys.state_of(p, params), jax.jit(p.updated)
    shardings = p.trained_of(p.shardings("weights"))
    with jax.set_mesh(p.mesh):
        for seed in range(3):
            random = np.random.default_rng(seed)
            host = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), params)  # noqa: B023
            given = jax.tree.map(jax.device_put, p.trained_of(toys.rows_of(p, host)), shardings)
            new, parts = step(state, given, jnp.float32(0.01))
            state = dataclasses.replace(state, step=state.step + 1, params=replaced(state.params, new), parts=parts)
        both = state.params, p.evaluated(state.params, state.parts)
    return tuple(toys.layers_of(p, jax.tree.map(np.asarray, x)) for x in both)


def check_gradients(case: Case) -> None:
    found, sums = gradients(case)
    wanted, wanted_sums = gradients(one_device(case))
    if any(feature.rounds for feature in case):
        exact, exact_sums = gradients(without_rounding(one_device(case)))
        np.testing.assert_allclose(sums, exact_sums, rtol=ROUNDED_LOSS)
        usual = max(errors(wanted, exact).values())
        for name, error in errors(found, exact).items():
            assert error <= ROUNDING * usual, (
                f"{name}: off by {error:.2e} of its norm, one device by {usual:.2e} at most"
            )
    else:
        np.testing.assert_allclose(sums, wanted_sums, rtol=LOSS)
        toys.check_close(found, wanted, GRADIENTS)


def errors(found: dict, exact: dict) -> dict[str, float]:
    """What each tensor is off by, as a share of its norm or of 1e-4 of all tensors' together."""
    found, exact = flatten(found), flatten(exact)
    everything = np.sqrt(sum(np.sum(np.square(x)) for x in exact.values()))
    return {
        name: float(np.linalg.norm(np.asarray(found[name], np.float32) - x) / max(np.linalg.norm(x), 1e-4 * everything))
        for name, x in exact.items()
    }


def check_updates(case: Case) -> None:
    for one in optimizers(case):
        bound = STORED if config_of(one).precision.params == "bfloat16" else UPDATES
        for found, wanted in zip(updated(one), updated(one_device(one)), strict=True):
            toys.check_close(found, wanted, bound)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CASES]
)
def test_a_case_is_equal_to_one_device(name: str):
    check_gradients(CASES[name])
    check_updates(CASES[name])


BREAKS = {
    "gradients of one replica": ("1", lambda m: m.setattr(ManualStorage, "reduce_gradient", lambda self, w, g: g)),
    "dropout by local position": (
        "2",
        lambda m: m.setattr(
            ManualActivations, "index", lambda self, letters, letter, x: jnp.arange(x.shape[letters.index(letter)])
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_mesh_is_seen(what: str, monkeypatch: pytest.MonkeyPatch):
    name, broken = BREAKS[what]
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_gradients(CASES[name])


def test_the_page_says_what_the_code_does():
    """All pairs, their sentences and the cases."""
    assert composition.PAGE.read_text("utf-8") == composition.page(), "run `python tests/composition.py`"


def test_every_pair_is_refused_or_in_a_case():
    proven = set().union(*map(composition.proven, CASES.values()))
    assert {devices_of(config_of(optimizers(case)[0])) for case in CASES.values()} == {composition.DEVICES}
    for a, b in itertools.combinations(FEATURES, 2):
        if a.group != b.group:
            said = composition.refusals()[frozenset((a, b))]
            assert (said is None) == (frozenset((a, b)) in proven), f"{a.name}, {b.name}: {said}"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_changes_the_config(feature: composition.Feature):
    assert composition.refusal([feature]) is None
    default = feature.name in ("Manual", "CausalLm", "AdamW")
    assert (config_of([feature]) == composition.BASE) == default
