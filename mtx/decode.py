"""Sampling text from a model: one forward pass per token, the whole row each time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from mtx.model import Batch
from mtx.step import Program, TrainState

TEMPERATURE = 0.8


def sample(
    program: Program,
    state: TrainState,
    prompt: list[int],
    length: int,
    *,
    time: int,
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
    position = np.broadcast_to(np.arange(time, dtype=np.int32), start.shape)
    ones = np.ones_like(start)
    arrays = {"tokens": start, "targets": start, "weights": ones.astype(np.float32), "segments": ones}
    fixed = program.place(arrays | {"positions": position}, program.rows_spec)

    @jax.jit
    def fill(state: TrainState, fixed: Batch) -> jax.Array:
        def body(i: jax.Array, tokens_BT: jax.Array) -> jax.Array:
            logits_BTV = program.logits(state, fixed._replace(tokens=tokens_BT), i - 1)
            logits_V = jax.reshard(logits_BTV, P(None, None, None))[0, 0, : program.model.config.vocab_size]
            key = jax.random.fold_in(jax.random.key(seed), i)
            token = jax.random.categorical(key, logits_V / TEMPERATURE).astype(jnp.int32)
            column = jax.reshard(jnp.full((rows, 1), token), program.rows_spec)
            return lax.dynamic_update_slice_in_dim(tokens_BT, column, i, axis=1)

        tokens_BT = lax.fori_loop(len(prompt), length, body, fixed.tokens)
        return jax.reshard(tokens_BT, P(None, None))[0, :length]

    with jax.set_mesh(program.mesh):
        return np.asarray(fill(state, fixed))
