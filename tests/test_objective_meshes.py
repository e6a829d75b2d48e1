"""What objectives let tokens see, prefixes and both sides, on meshes and in pipelines: equal to one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import toys
from corpora import corpus

from data import CausalLm, MaskedLm, PrefixLm, PythonDocs, SentencePairs, SpanCorruption
from mtx import config as configs
from mtx.building import build, make_loader
from mtx.model import flatten
from mtx.pipeline import OneFOneB
from mtx.spmd import Compiled

BOTH = dataclasses.replace(toys.GPT, causal=False)
MODELS = {"prefix": toys.LLAMA, "both": BOTH, "pairs": dataclasses.replace(BOTH, pairs=True)}
BOUND = 1e-5
CASES = [
    ("prefix", (1, 2, 4), {"sequence_parallel": True, "zero": 2}),
    ("prefix", (2, 2, 2), {"partition": Compiled()}),
    ("prefix", (1, 2, 2), {"stages": 2, "zero": 1, "schedule": OneFOneB()}),
    ("both", (1, 4, 2), {"zero": 3}),
    ("both", (1, 2, 2), {"stages": 2}),
    ("pairs", (1, 2, 4), {"sequence_parallel": True, "zero": 3}),
    ("pairs", (2, 2, 2), {"sequence_parallel": True, "partition": Compiled()}),
    ("pairs", (1, 2, 2), {"stages": 2, "zero": 2}),
]


@functools.cache
def rows() -> dict[str, np.ndarray]:
    """Documents of random lengths, each token with its prefix's end."""
    arrays = toys.batch()
    random = np.random.default_rng(5)
    prefix = np.zeros_like(arrays["segments"])
    for row, segments in enumerate(arrays["segments"]):
        for segment in np.unique(segments):
            (here,) = np.nonzero(segments == segment)
            prefix[row, here] = random.integers(here[0] + 1, here[-1] + 2)
    return arrays | {"prefix": prefix}


def batch(sees: str) -> dict[str, np.ndarray]:
    if sees != "pairs":
        return rows() if sees == "prefix" else toys.batch()
    arrays = toys.batch()
    label = np.random.default_rng(6).integers(0, 2, (len(arrays["tokens"]), 1), np.int32)
    return arrays | {"types": arrays["segments"] % 2, "label": np.broadcast_to(label, arrays["tokens"].shape)}


@functools.cache
def weights(sees: str) -> dict:
    return toys.weights_of(MODELS[sees])


@functools.cache
def reference(sees: str) -> dict:
    return toys.gradients(toys.program(MODELS[sees], prefix=sees == "prefix"), weights(sees), batch(sees))[0]


@pytest.mark.parametrize(("sees", "mesh", "words"), CASES, ids=str)
def test_gradients(sees: str, mesh: tuple[int, int, int], words: dict):
    p = toys.program(MODELS[sees], mesh, prefix=sees == "prefix", **words)
    found, _ = toys.gradients(p, weights(sees), batch(sees), 4)
    toys.check_close(found, reference(sees), BOUND)


def test_a_prefix_is_seen_and_nothing_else_is():
    """Gradients change with what is inside a prefix, and not at all without prefixes."""
    p = toys.program(MODELS["prefix"], prefix=True)
    none = rows() | {"prefix": np.zeros_like(rows()["prefix"])}
    causal, _ = toys.gradients(toys.program(MODELS["prefix"]), weights("prefix"), toys.batch())
    toys.check_close(toys.gradients(p, weights("prefix"), none)[0], causal, BOUND)
    with pytest.raises(AssertionError, match="off by"):
        toys.check_close(reference("prefix"), causal, 1e-2)


@pytest.mark.parametrize(
    "words",
    [
        {"objective": PrefixLm()},
        {"objective": MaskedLm()},
        {"objective": SpanCorruption()},
        {"objective": CausalLm()},
        {"objective": SentencePairs()},
    ],
    ids=lambda words: type(words["objective"]).__name__,
)
def test_a_config_s_rows_fit_its_program(words: dict):
    """What the loader makes is what the program reads: one loss through the public parts, on eight devices."""
    quick = configs.load("configs/quickstart.py").config
    pairs = isinstance(words["objective"], SentencePairs)
    causal = not isinstance(words["objective"], MaskedLm | SentencePairs)
    config = dataclasses.replace(
        quick,
        model=dataclasses.replace(quick.model, vocab_size=300, layers=1, causal=causal, pairs=pairs),
        mesh=dataclasses.replace(quick.mesh, data=4, model=2),
        **words,
    )
    configs.check(config, 8)
    sentences = corpus([[b"One sentence. ", b"Another. ", b"The third of them. "] for _ in range(40)])
    loader = make_loader(config, sentences if pairs else PythonDocs().load())
    p = build(config, jax.devices())
    placed = p.place({name: x[None] for name, x in loader.train(range(8)).items()}, p.batch_spec)
    expected = p.abstract_batch(1, 8, 128)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), placed) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    state = p.init(0)
    with jax.set_mesh(p.mesh):
        nats, labels = jax.jit(p.eval_sums)(state.params, placed)
    assert 4 < nats / labels < 8 and labels == placed.weights.sum()
    assert all(np.isfinite(x).all() for x in flatten(state.params).values())
