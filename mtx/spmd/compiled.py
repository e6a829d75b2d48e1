"""The doors on global shapes: each states how its result is split, and XLA's partitioner communicates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtx import DIMENSIONS
from mtx.layout import Weight
from mtx.spmd.doors import Activations, Storage, letters_of


@dataclass(frozen=True)
class CompiledStorage(Storage):
    """Shardings of weights stated, collectives found by XLA's partitioner. See `Storage`."""

    def for_use(self, w: nnx.Variable) -> jax.Array:
        return self.gather(w.weight, w[...])

    def gather(self, weight: Weight, value: jax.Array) -> jax.Array:
        if not weight.treatment.cast:
            return value
        return jax.reshard(value.astype(self.compute), self.layout.gathered(weight))

    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "gradients"))

    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "weights"))

    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "weights")) if self.at_use else gradient


@dataclass(frozen=True)
class CompiledActivations(Activations):
    """Shardings of activations stated, collectives found by XLA's partitioner. See `Activations`."""

    global_shapes = True

    def enter(self, x_BTD: jax.Array, letters: str) -> jax.Array:
        if not self.layout.splits(letters):
            return x_BTD
        time = any(self.layout.takes_time(DIMENSIONS[letter]) for letter in letters)
        return jax.reshard(x_BTD, self.layout.entered("BTD") if time else self.layout.activation("BTD"))

    def leave(self, y_BTD: jax.Array, letters: str) -> jax.Array:
        return jax.reshard(y_BTD, self.layout.activation("BTD")) if self.layout.splits(letters) else y_BTD

    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, out_sharding=self.layout.activation(letters_of(equation)[2]))

    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        spec = self.layout.entered(letters_of(equation)[2])
        return jnp.einsum(equation, x, y, preferred_element_type=dtype, out_sharding=spec)

    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        table = self.storage.for_use(table_VD).astype(jnp.float32)
        x_BTD = table.at[token_BT].get(out_sharding=self.layout.activation("BTD"))
        return x_BTD.astype(self.compute)

    def first(self, letters: Literal["BT", "BTD"], x: jax.Array) -> jax.Array:
        return self.whole(letters, "T", x)[:, 0]

    def index(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        i = letters.index(letter)
        return jax.reshard(jnp.arange(x.shape[i]), jax.P(self.layout.letter_axes(letters)[i] or None))

    def sum_over(self, letters: str, x: jax.Array) -> jax.Array:
        return x

    def max_over(self, letters: str, x: jax.Array) -> jax.Array:
        return x

    def whole(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        spec = zip(letters, self.layout.activation(letters), strict=True)
        return jax.reshard(x, jax.P(*(None if name == letter else axes for name, axes in spec)))

    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=self.layout.activation(letters))

    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        specs = tuple(map(self.layout.activation, letters))
        # Without replication tracking, which kernels lack. A shared input's gradient is summed all the same.
        return jax.shard_map(f, in_specs=specs, out_specs=self.layout.activation(result), check_vma=False)(*arrays)
