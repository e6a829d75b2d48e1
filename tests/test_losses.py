"""The chunked, split cross entropy against the plain definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx.losses import CrossEntropy, join_time, split_time
from mtx.pipeline import Interleaved
from mtx.spmd import Compiled


def plain(p, params, arrays, config: CrossEntropy):
    """Mean loss and gradients with whole logits, by automatic differentiation."""
    batch = jax.tree.map(lambda x: x[0], toys.place(p, arrays, 1))

    def loss(params):
        logits = p.model.logits(params, batch, p.doors(), p.masks)[..., : p.model.config.vocab_size]
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return jnp.sum((nll + config.z_loss * lse**2) * batch.weights) / jnp.sum(batch.weights)

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("chunk", [1, 7 * 32, 16 * 32, 10_000])
@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_equals_the_definition(chunk: int, z: float):
    config = CrossEntropy(chunk_tokens=chunk, z_loss=z)
    p = toys.program(toys.LLAMA, loss=config)
    params, arrays = toys.weights_of(toys.LLAMA), toys.batch()
    wanted_loss, wanted = plain(p, params, arrays, config)
    found, (objective, _, labels) = toys.gradients(p, params, arrays)
    np.testing.assert_allclose(objective / labels, wanted_loss, rtol=1e-6)
    toys.check_close(found, jax.tree.map(np.asarray, wanted), 1e-5)


def test_padding_of_the_vocabulary_is_no_token():
    """Rows beyond vocab_size change nothing and get no gradient."""
    model = dataclasses.replace(toys.LLAMA, vocab_size=193)
    p, params, arrays = toys.program(model), toys.weights_of(model), toys.batch(vocab=193)
    found, sums = toys.gradients(p, params, arrays)
    params["ends"]["head_VD"][193:] = 100.0
    again, again_sums = toys.gradients(p, params, arrays)
    np.testing.assert_array_equal(sums, again_sums)
    assert not np.any(again["ends"]["head_VD"][193:])
    assert np.any(found["ends"]["head_VD"][:193])


def test_whole_logits_never_exist():
    """The compiled step holds no array of batch x time x vocabulary."""
    model = dataclasses.replace(toys.LLAMA, vocab_size=4096)
    p = toys.program(model, loss=CrossEntropy(chunk_tokens=8 * 4))
    text = p.lower_train_step(1, 8, 16).compile().as_text()
    assert "[8,4,4096]" in text
    assert "[8,16,4096]" not in text
    assert "[128,4096]" not in text


def test_split_time_round_trip():
    x = jnp.arange(2 * 7 * 3.0).reshape(2, 7, 3)
    chunks = split_time(x, 3)
    assert chunks.shape == (3, 2, 3, 3)
    np.testing.assert_array_equal(join_time(chunks, 7), x)


# Scores of rows.

TIED = dataclasses.replace(toys.LLAMA, layers=5)
ROWS = [
    ((1, 1, 1), {}),
    ((1, 2, 4), {"zero": 3, "sequence_parallel": True}),
    ((2, 2, 2), {"zero": 1, "partition": Compiled()}),
    ((1, 1, 2), {"stages": 4, "zero": 0}),
    ((1, 2, 2), {"stages": 2, "zero": 3, "sequence_parallel": True, "schedule": Interleaved()}),
]


@functools.cache
def tied_weights() -> dict:
    """Two tokens, on different parts of a split vocabulary, have equal logits, which often are the largest."""
    params = toys.weights_of(TIED)
    params["ends"]["head_VD"][[7, 200]] = 20 * params["ends"]["head_VD"][7]
    return params


@functools.cache
def scored_rows() -> tuple[dict, dict[str, np.ndarray]]:
    """(rows whose targets often are the most probable token, their scores from whole logits in float64)."""
    p, arrays = toys.program(TIED), toys.batch(sequences=16)
    with jax.set_mesh(p.mesh):
        batch = jax.tree.map(lambda x: x[0], toys.place(p, arrays, 1))
        logits = np.asarray(jax.jit(p.logits)(toys.state_of(p, tied_weights()), batch), np.float64)[..., :250]
    greedy = logits.argmax(axis=-1)
    chosen = np.random.default_rng(3).integers(0, 3, greedy.shape)
    arrays["targets"] = np.where(chosen == 0, greedy, np.where(chosen == 1, 200, arrays["targets"])).astype(np.int32)
    arrays["targets"][4] = greedy[4]
    arrays["weights"][9] = 0.0
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    of_targets = np.take_along_axis(log_p, arrays["targets"][..., None], axis=-1)[..., 0]
    counts = arrays["weights"] > 0
    return arrays, {
        "log_probability": (of_targets * arrays["weights"]).sum(axis=-1),
        "targets": counts.sum(axis=-1),
        "greedy": (counts & (arrays["targets"] == greedy)).sum(axis=-1),
    }


@pytest.mark.parametrize(("mesh", "words"), ROWS, ids=str)
def test_scores_of_rows(mesh: tuple[int, int, int], words: dict):
    """On every kind of mesh, those of whole logits; an earlier token wins a tie."""
    p, (arrays, wanted) = toys.program(TIED, mesh, **words), scored_rows()
    assert 2 <= (wanted["greedy"] == wanted["targets"]).sum() < (wanted["greedy"] > 0).sum()
    with jax.set_mesh(p.mesh):
        found = jax.jit(p.eval_rows)(toys.state_of(p, tied_weights()).params, toys.place(p, arrays, 4))
    for name, scores in found._asdict().items():
        assert scores.shape == (4, 4) and scores.is_fully_replicated
        toys.check_copies(name, scores)
        np.testing.assert_allclose(np.asarray(scores).reshape(-1), wanted[name], rtol=1e-5, err_msg=name)


def test_scores_of_rows_need_no_whole_logits():
    model = dataclasses.replace(toys.LLAMA, vocab_size=4096)
    p = toys.program(model, loss=CrossEntropy(chunk_tokens=8 * 4))
    text = jax.jit(p.eval_rows).lower(p.abstract_state().params, p.abstract_batch(1, 8, 16)).compile().as_text()
    assert "[8,4,4096]" in text
    assert "[8,16,4096]" not in text and "[128,4096]" not in text
