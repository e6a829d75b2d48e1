"""The doors on global shapes: each states how its result is split, and XLA's partitioner communicates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtx import DIMENSIONS
from mtx.layout import RESIDUAL_TIME, Weight
from mtx.spmd.doors import Doors, letters_of


@dataclass(frozen=True)
class CompiledDoors(Doors):
    """Shardings stated, collectives found by XLA's partitioner. See `Doors`."""

    global_shapes = True

    def enter(self, x_BTD: jax.Array) -> jax.Array:
        batch = self.layout.activation("B")
        return jax.reshard(x_BTD, jax.P(*batch, None, None))

    def sum_residual(self, x_BTD: jax.Array) -> jax.Array:
        return jax.reshard(x_BTD, self.layout.activation("BTD"))

    def leave(self, y_BTD: jax.Array) -> jax.Array:
        return y_BTD

    def gather_for_use(self, w: nnx.Variable) -> jax.Array:
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

    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, out_sharding=self.layout.activation(letters_of(equation)[2]))

    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        result = letters_of(equation)[2]
        if "B" not in result:
            spec = self.layout.gathered(Weight(result, (1,) * len(result)))
        elif "D" in result:
            spec = jax.P(*self.layout.activation("B"), *(None for _ in result[1:]))
        else:
            spec = self.layout.activation(result)
        return jnp.einsum(equation, x, y, preferred_element_type=dtype, out_sharding=spec)

    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        specs = tuple(map(self.layout.activation, letters))
        # Without replication tracking, which kernels lack. A shared input's gradient is summed all the same.
        return jax.shard_map(f, in_specs=specs, out_specs=self.layout.activation(result), check_vma=False)(*arrays)

    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        table = self.gather_for_use(table_VD).astype(jnp.float32)
        x_BTD = table.at[token_BT].get(out_sharding=self.layout.activation("BTD"))
        return x_BTD.astype(self.compute)

    def first(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        return self.enter(x_BTD)[:, :1], 1.0

    def sum_time(self, x: jax.Array) -> jax.Array:
        return x

    def index(self, letter: Literal["T", "N", "V"], x: jax.Array, axis: int) -> jax.Array:
        names = self.layout.axes(RESIDUAL_TIME if letter == "T" else DIMENSIONS[letter], "activations")
        return jax.reshard(jnp.arange(x.shape[axis]), jax.P(names or None))

    def sum_over(self, letter: Literal["B", "V"], x: jax.Array) -> jax.Array:
        return x

    def max_over(self, letter: Literal["V"], x: jax.Array) -> jax.Array:
        return x

    def whole_vocabulary(self, logits_BTV: jax.Array) -> jax.Array:
        return jax.reshard(logits_BTV, jax.P(*self.layout.activation("B"), None, None))

    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype, out_sharding=self.layout.activation(letters))
