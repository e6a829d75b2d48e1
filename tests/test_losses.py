"""The chunked, split cross entropy against the plain definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from mtx.losses import CrossEntropy, join_time, split_time


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
