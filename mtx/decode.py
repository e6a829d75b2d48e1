"""Sampling text from a model: one forward pass per token, the whole row each time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.model import Batch
from mtx.step import Program, TrainState


def sample(
    program: Program,
    state: TrainState,
    prompt: list[int],
    length: int,
    *,
    time: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """`length` tokens that begin with `prompt`, made in rows of `time` tokens (at least `length`).

    Equal on every mesh up to rounding: each token's key depends on (seed, position) alone.
    """
    assert program.model.config.causal
    assert 0 < len(prompt) <= length <= time
    rows = program.layout.size(*program.layout.batch_axes)
    start = np.zeros((rows, time), np.int32)
    start[:, : len(prompt)] = prompt
    rows_spec = P(*program.batch_spec[1:])
    position = np.broadcast_to(np.arange(time, dtype=np.int32), start.shape)
    ones = np.ones_like(start)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, program.sharding(rows_spec), lambda index: x[index])

    def next_token(i: jax.Array, tokens_BT: jax.Array, state: TrainState, fixed: Batch) -> jax.Array:
        logits_BTV = program.logits(state, fixed._replace(tokens=tokens_BT))
        logits_BV = lax.dynamic_index_in_dim(logits_BTV, i - 1, axis=1, keepdims=False)
        logits_V = jax.reshard(logits_BV, P(None, None))[0, : program.model.config.vocab_size]
        key = jax.random.fold_in(jax.random.key(seed), i)
        token = jax.random.categorical(key, logits_V / max(temperature, 1e-6)).astype(jnp.int32)
        column = jax.reshard(jnp.full((rows, 1), token), P(*rows_spec[:1], None))
        return lax.dynamic_update_slice_in_dim(tokens_BT, column, i, axis=1)

    @jax.jit
    def fill(state: TrainState, fixed: Batch) -> jax.Array:
        def body(i: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            return next_token(i, tokens_BT, state, fixed)

        tokens_BT = lax.fori_loop(len(prompt), length, body, fixed.tokens)
        return jax.reshard(tokens_BT, P(None, None))[0, :length]

    fixed = Batch(*map(place, (start, start, ones.astype(np.float32), ones, position)))
    with jax.set_mesh(program.mesh):
        return np.asarray(fill(state, fixed))
