"""Every pair of features is equal to one device or refused with a sentence, and docs/composition.md says which."""

import itertools

import composition
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from composition import DEFAULT, FEATURES, LEAST, ROUNDING, Case

from mtx.model import flatten
from mtx.spmd import ManualActivations, ManualStorage

LOSS = 1e-5
GRADIENTS = 1e-5
UPDATES = 3e-6
"""As in tests/test_rules.py: Newton-Schulz in float32 is itself 1.3e-6 off float64."""
CASES = composition.cases_of_page()


def check_gradients(case: Case) -> None:
    found, sums = composition.gradients(case)
    wanted, wanted_sums = composition.gradients(composition.one_device(case))
    if any(feature.rounds for feature in case):
        exact, exact_sums = composition.gradients(composition.without_rounding(composition.one_device(case)))
        np.testing.assert_array_less(off(sums, exact_sums), np.maximum(ROUNDING * off(wanted_sums, exact_sums), 1e-3))
        check_rounding(found, wanted, exact)
    else:
        np.testing.assert_allclose(sums, wanted_sums, rtol=LOSS)
        toys.check_close(found, wanted, GRADIENTS)


def off(x: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(x / exact - 1)


def check_rounding(found: dict, alone: dict, exact: dict) -> None:
    """Each gradient of a mesh is about as far from float32's as that of one device is."""
    found, alone, exact = flatten(found), flatten(alone), flatten(exact)
    everything = np.sqrt(sum(np.sum(np.square(x)) for x in exact.values()))
    for name, x in exact.items():
        scale = max(np.linalg.norm(x), 1e-4 * everything)
        error, usual = (np.linalg.norm(np.asarray(tree[name], np.float32) - x) / scale for tree in (found, alone))
        assert error <= max(ROUNDING * usual, LEAST), f"{name}: off by {error:.2e}, one device by {usual:.2e}"


def check_updates(case: Case) -> None:
    for one in composition.optimizers(case):
        for found, wanted in zip(
            composition.updated(one), composition.updated(composition.one_device(one)), strict=True
        ):
            toys.check_close(found, wanted, UPDATES)


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
    for a, b in itertools.combinations(FEATURES, 2):
        if a.group != b.group:
            said = composition.refusals()[frozenset((a, b))]
            assert (said is None) == (frozenset((a, b)) in proven), f"{a.name}, {b.name}: {said}"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_changes_the_config(feature: composition.Feature):
    assert composition.refusal([feature]) is None
    default = feature.name in ("Manual", "CausalLm", "AdamW")
    assert (composition.config_of([feature]) == composition.BASE) == default
