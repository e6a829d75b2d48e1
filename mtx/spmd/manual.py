"""The doors inside `jax.shard_map`: each writes its collective, and that of its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtx.layout import STAGES, ZERO, Axes, Weight
from mtx.spmd.doors import Activations, Storage


@dataclass(frozen=True)
class ManualStorage(Storage):
    """Collectives of weights by hand, inside shard_map. See `Storage`."""

    def for_use(self, w: nnx.Variable) -> jax.Array:
        if self.at_use or not w.weight.treatment.cast:
            return self.gather(w.weight, w[...])
        return w[...].astype(self.compute)

    def gather_stages(self, weight: Weight, value: jax.Array) -> jax.Array:
        if (dim := self.layout.vocab_dim(weight)) is None:
            return value
        value = value if self.at_use else value.astype(self.compute)  # ZeRO 3 scatters gradients in its own dtype
        return lax.all_gather(value, STAGES, axis=dim, tiled=True)

    def gather(self, weight: Weight, value: jax.Array) -> jax.Array:
        if not weight.treatment.cast:
            return value
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "weights")
        if zero is None:
            return value.astype(self.compute)
        return _gather_weight(zero, axes, self.compute, self._scattered, value)

    @property
    def _scattered(self) -> Any:
        """dtype in which ZeRO 3 scatters gradients."""
        return jnp.float32 if self.layout.layout.scatter == "float32" else self.compute

    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "weights")
        if zero is None or not self.at_use:
            return gradient
        return lax.psum_scatter(gradient.astype(self._scattered), axes, scatter_dimension=zero, tiled=True)

    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        zero, axes = self.layout.zero_dim(weight), self.layout.axes(ZERO, "gradients")
        if zero is None or not axes or self.at_use:
            return gradient
        return lax.psum_scatter(gradient.astype(jnp.float32), axes, scatter_dimension=zero, tiled=True)

    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        axes, done = self.layout.reduce_axes(weight), self.layout.axes(ZERO, "gradients")
        for dim, stored in self.layout.at_rest(weight):
            assert {*stored} <= {*axes}, f"{weight} is stored over {stored}, and its gradient is alike there"
            if stored != done:  # of ZeRO 2 and 3 shards were accumulated
                gradient = lax.psum_scatter(gradient, stored, scatter_dimension=dim, tiled=True)
            axes = tuple(axis for axis in axes if axis not in stored)
        return lax.psum(gradient, axes) if axes else gradient


@dataclass(frozen=True)
class ManualActivations(Activations):
    """Collectives of activations by hand, inside shard_map. See `Activations`."""

    def enter(self, x_BTD: jax.Array, letters: str) -> jax.Array:
        time, rest = self._crossed(letters)
        x_BTD = _gather(time, 1, x_BTD) if time else x_BTD
        return _sum_gradient(rest, x_BTD) if rest else x_BTD

    def leave(self, y_BTD: jax.Array, letters: str) -> jax.Array:
        time, rest = self._crossed(letters)
        y_BTD = _scatter(time, 1, y_BTD) if time else y_BTD
        return _sum(rest, y_BTD) if rest else y_BTD

    def _crossed(self, letters: str) -> tuple[Axes, Axes]:
        """The axes that split these letters: what they take over from residual time, and the rest."""
        axes = self.layout.splits(letters)
        time = self.layout.sequence_axes if {*self.layout.sequence_axes} <= {*axes} else ()
        return time, tuple(axis for axis in axes if axis not in time)

    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y)

    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=dtype)

    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        table, letter = self.storage.for_use(table_VD), table_VD.weight.dims[0]
        if not (axes := self.layout.splits(letter)):
            return _take(self._part_of_time(token_BT), table)
        rows = table.shape[0]
        local_BT = token_BT - lax.axis_index(axes) * rows
        here_BT = (local_BT >= 0) & (local_BT < rows)
        x_BTD = _take(jnp.clip(local_BT, 0, rows - 1), table)
        return self.leave(jnp.where(here_BT[..., None], x_BTD, 0), letter)

    def _part_of_time(self, x_BT: jax.Array) -> jax.Array:
        """This rank's part of the residual stream's time."""
        if not (axes := self.layout.sequence_axes):
            return x_BT
        size = x_BT.shape[1] // self.layout.size(*axes)
        return lax.dynamic_slice_in_dim(x_BT, lax.axis_index(axes) * size, size, axis=1)

    def first(self, letters: Literal["BT", "BTD"], x: jax.Array) -> jax.Array:
        axes = self.layout.letter_axes(letters)[1]
        return _of_first(axes, x[:, 0]) if axes else x[:, 0]

    def index(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        i = letters.index(letter)
        axes, size = self.layout.letter_axes(letters)[i], x.shape[i]
        return jnp.arange(size) + (lax.axis_index(axes) * size if axes else 0)

    def sum_over(self, letters: str, x: jax.Array) -> jax.Array:
        return lax.psum(x, axes) if (axes := self.layout.splits(letters)) else x

    def max_over(self, letters: str, x: jax.Array) -> jax.Array:
        return lax.pmax(x, axes) if (axes := self.layout.splits(letters)) else x

    def whole(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        i = letters.index(letter)
        return _gather(axes, i, x) if (axes := self.layout.letter_axes(letters)[i]) else x

    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        parts = (self.layout.size(*axes) for axes in self.layout.letter_axes(letters))
        return jnp.zeros([size // part for size, part in zip(shape, parts, strict=True)], dtype)

    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        return f(*arrays)


# Megatron's f and g, and their sequence-parallel forms. Written as pairs, so that no gradient rule of
# lax.psum is relied on: inside shard_map without replication tracking it would count ranks twice.


def _pair(forward: Callable, backward: Callable, static: int = 1) -> Callable:
    """f(*static arguments, x) with a gradient of its own: both take the axes first."""
    f = jax.custom_vjp(forward, nondiff_argnums=tuple(range(static)))
    f.defvjp(lambda *args: (forward(*args), None), lambda *args: (backward(*args[:static], args[-1]),))
    return f


def _same(axes: Axes, x: jax.Array) -> jax.Array:
    return x


def _psum(axes: Axes, x: jax.Array) -> jax.Array:
    return lax.psum(x, axes)


def _all_gather(axes: Axes, dim: int, x: jax.Array) -> jax.Array:
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def _psum_scatter(axes: Axes, dim: int, x: jax.Array) -> jax.Array:
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def _at_first(axes: Axes, x: jax.Array) -> jax.Array:
    return jnp.where(lax.axis_index(axes) == 0, x, jnp.zeros_like(x))


_sum_gradient = _pair(_same, _psum)
_sum = _pair(_psum, _same)
_gather = _pair(_all_gather, _psum_scatter, 2)
_scatter = _pair(_psum_scatter, _all_gather, 2)
_of_first = _pair(lambda axes, x: _psum(axes, _at_first(axes, x)), _at_first)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _gather_weight(zero: int, axes: Axes, compute: Any, scatter: Any, shard: jax.Array) -> jax.Array:
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
