"""The doors inside `jax.shard_map`: each writes its collective, and that of its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtx import DIMENSIONS
from mtx.layout import RESIDUAL_TIME, STAGES, ZERO, Weight
from mtx.spmd.doors import Doors


@dataclass(frozen=True)
class ManualDoors(Doors):
    """Collectives by hand, inside shard_map. See `Doors`."""

    @property
    def model(self) -> int:
        return self.layout.size("model")

    def enter(self, x_BTD: jax.Array) -> jax.Array:
        if self.model == 1:
            return x_BTD
        return _gather_time(x_BTD) if self.layout.sequence_parallel else _sum_gradient(x_BTD)

    def sum_residual(self, x_BTD: jax.Array) -> jax.Array:
        if self.model == 1:
            return x_BTD
        return _scatter_time(x_BTD) if self.layout.sequence_parallel else lax.psum(x_BTD, "model")

    def leave(self, y_BTD: jax.Array) -> jax.Array:
        if self.model == 1:
            return y_BTD
        return _scatter_time(y_BTD) if self.layout.sequence_parallel else _sum(y_BTD)

    def gather_for_use(self, w: nnx.Variable) -> jax.Array:
        weight, value = w.weight, w[...]
        if not weight.treatment.cast:
            return value
        if not self.at_use:
            return value.astype(self.compute)
        return self.gather(weight, value)

    def gather_stages(self, weight: Weight, value: jax.Array) -> jax.Array:
        if (dim := self.layout.vocab_dim(weight)) is None:
            return value
        value = value if self.at_use else value.astype(self.compute)  # ZeRO-3 scatters gradients in its own dtype
        return lax.all_gather(value, STAGES, axis=dim, tiled=True)

    def gather(self, weight: Weight, value: jax.Array) -> jax.Array:
        if not weight.treatment.cast:
            return value
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "weights")
        if zero is None:
            return value.astype(self.compute)
        scatter = jnp.float32 if self.layout.layout.scatter == "float32" else self.compute
        return _gather_weight(zero, axes, self.compute, scatter, value)

    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "weights")
        if zero is None or not self.at_use:
            return gradient
        dtype = jnp.float32 if self.layout.layout.scatter == "float32" else self.compute
        return lax.psum_scatter(gradient.astype(dtype), axes, scatter_dimension=zero, tiled=True)

    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "gradients")
        if zero is None or not axes or self.at_use:
            return gradient
        return lax.psum_scatter(gradient.astype(jnp.float32), axes, scatter_dimension=zero, tiled=True)

    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        zero, axes = self.layout.zero_dim(weight), self.layout.batch_axes
        if zero is not None:
            scattered = self.layout.axes(ZERO, "weights")
            axes = tuple(axis for axis in axes if axis not in scattered)
            if not self.at_use and not self.layout.axes(ZERO, "gradients"):
                gradient = lax.psum_scatter(gradient, scattered, scatter_dimension=zero, tiled=True)
        if self.layout.sequence_parallel and not self.layout.split_by_model(weight):
            axes = (*axes, "model")  # each rank saw its part of time
        if self.layout.size(STAGES) > 1 and not weight.layers:  # one stage has it, or two: a tied head's embedding
            if (dim := self.layout.vocab_dim(weight)) is not None:
                gradient = lax.psum_scatter(gradient, STAGES, scatter_dimension=dim, tiled=True)
            else:
                axes = (*axes, STAGES)
        return lax.psum(gradient, axes) if axes else gradient

    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y)

    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        table = self.gather_for_use(table_VD)
        if not self.split(table_VD.weight.dims[0]):
            return _take(self._residual(token_BT), table)
        rows = table.shape[0]
        local_BT = token_BT - lax.axis_index("model") * rows
        here_BT = (local_BT >= 0) & (local_BT < rows)
        x_BTD = _take(jnp.clip(local_BT, 0, rows - 1), table)
        return self.leave(jnp.where(here_BT[..., None], x_BTD, 0))

    def first(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        split = self.layout.sequence_parallel and self.model > 1
        return x_BTD[:, :1], (lax.axis_index("model") == 0).astype(jnp.float32) if split else 1.0

    def sum_time(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, "model") if self.layout.sequence_parallel and self.model > 1 else x

    def _residual(self, x_BT: jax.Array) -> jax.Array:
        if not self.layout.sequence_parallel:
            return x_BT
        size = x_BT.shape[1] // self.model
        return lax.dynamic_slice_in_dim(x_BT, lax.axis_index("model") * size, size, axis=1)

    def index(self, letter: Literal["T", "N", "V"], x: jax.Array, axis: int) -> jax.Array:
        size = x.shape[axis]
        names = self.layout.axes(RESIDUAL_TIME if letter == "T" else DIMENSIONS[letter], "activations")
        offset = lax.axis_index("model") * size if "model" in names else 0
        return jnp.arange(size) + offset

    def _axes(self, letter: str) -> tuple[str, ...]:
        return self.layout.axes(DIMENSIONS[letter], "activations")

    def sum_over(self, letter: Literal["B", "V"], x: jax.Array) -> jax.Array:
        return lax.psum(x, axes) if (axes := self._axes(letter)) else x

    def max_over(self, letter: Literal["V"], x: jax.Array) -> jax.Array:
        return lax.pmax(x, axes) if (axes := self._axes(letter)) else x

    def whole_vocabulary(self, logits_BTV: jax.Array) -> jax.Array:
        axes = self._axes("V")
        return lax.all_gather(logits_BTV, axes, axis=2, tiled=True) if axes else logits_BTV

    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        parts = (self.layout.size(*self._axes(letter)) for letter in letters)
        return jnp.zeros([size // part for size, part in zip(shape, parts, strict=True)], dtype)

    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)

    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        return f(*arrays)


# Megatron's f and g, and their sequence-parallel forms. Written as pairs, so that no gradient rule of
# lax.psum is relied on: inside shard_map without replication tracking it would count ranks twice.


def _pair(forward: Callable, backward: Callable) -> Callable:
    f = jax.custom_vjp(forward)
    f.defvjp(lambda x: (forward(x), None), lambda _, g: (backward(g),))
    return f


def _psum(x: jax.Array) -> jax.Array:
    return lax.psum(x, "model")


def _all_gather(x_BTD: jax.Array) -> jax.Array:
    return lax.all_gather(x_BTD, "model", axis=1, tiled=True)


def _psum_scatter(x_BTD: jax.Array) -> jax.Array:
    return lax.psum_scatter(x_BTD, "model", scatter_dimension=1, tiled=True)


_sum_gradient = _pair(lambda x: x, _psum)
_sum = _pair(_psum, lambda g: g)
_gather_time = _pair(_all_gather, _psum_scatter)
_scatter_time = _pair(_psum_scatter, _all_gather)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather_weight(zero: int, axes: tuple[str, ...], compute: Any, scatter: Any, shard: jax.Array) -> jax.Array:
    return lax.all_gather(shard.astype(compute), axes, axis=zero, tiled=True)


def _gather_weight_forward(zero, axes, compute, scatter, shard):
    return _gather_weight(zero, axes, compute, scatter, shard), jnp.zeros((), shard.dtype)


def _gather_weight_backward(zero, axes, compute, scatter, stored, gradient):
    summed = lax.psum_scatter(gradient.astype(scatter), axes, scatter_dimension=zero, tiled=True)
    return (summed.astype(stored.dtype),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


@jax.custom_vjp
def _take(index_BT: jax.Array, table_VD: jax.Array) -> jax.Array:
    return table_VD[index_BT]


def _take_forward(index_BT, table_VD):
    return table_VD[index_BT], (index_BT, jnp.zeros((table_VD.shape[0], 0), table_VD.dtype))


def _take_backward(saved, g_BTD):
    index_BT, rows = saved
    summed = jnp.zeros((rows.shape[0], g_BTD.shape[-1]), jnp.float32)  # a common token adds thousands of terms
    return None, summed.at[index_BT].add(g_BTD.astype(jnp.float32)).astype(rows.dtype)


_take.defvjp(_take_forward, _take_backward)
