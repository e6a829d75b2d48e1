"""What layers and losses may ask of the mesh, and the configs that say how it is done."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from mtx import DIMENSIONS
from mtx.layout import BoundLayout, Weight

Params: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """dtypes. Softmax, norms, losses and accumulated gradients are float32 whatever this says."""

    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of matrix products and activations; auto is bfloat16 where the chip multiplies it natively."""
    params: Literal["float32", "bfloat16"] = "float32"
    """dtype of the stored matrices; gains, biases, routers, adapters and the optimizer's state stay float32."""

    def resolve(self, device: jax.Device) -> tuple[Any, str]:
        """The compute dtype on a device, and why."""
        if self.compute != "auto":
            return jnp.dtype(self.compute), "asked for"
        if device.platform == "tpu":
            return jnp.dtype("bfloat16"), f"{device.device_kind} multiplies it natively"
        if device.platform in ("gpu", "cuda"):
            if float(device.compute_capability) >= 8.0:
                return jnp.dtype("bfloat16"), f"{device.device_kind} multiplies it natively"
            return jnp.dtype("float32"), f"{device.device_kind} is too old for bfloat16"
        return jnp.dtype("float32"), "a CPU gains nothing from bfloat16"


@dataclass(frozen=True, kw_only=True)
class Manual:
    """Every collective is written by the doors, inside one shard_map over all mesh axes."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """XLA's partitioner finds the collectives from annotated parameters and activations."""


@dataclass(frozen=True)
class Doors(abc.ABC):
    """What both lowerings offer to layers and losses. `layout` is bound to the mesh."""

    layout: BoundLayout
    compute: Any
    device: jax.Device
    """One of the mesh's, present or not; all are of a kind."""
    unrolled: bool = False
    """Whether layers are straight-line code, in which XLA would merge what remat repeats."""
    global_shapes = False

    @property
    def at_use(self) -> bool:
        """Whether weights reach the layers as stored, to be cast and gathered there: ZeRO-3."""
        return self.layout.layout.zero == 3

    def split(self, letter: str) -> bool:
        """Whether weights split this letter over `model`."""
        return "model" in self.layout.axes(DIMENSIONS[letter], "weights")

    def project(self, equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
        """x times a weight. The letters decide: a split letter that stays is a column projection (enter
        the region where heads, ff or vocab are split), one that is contracted is a row projection (leave
        it with an all-reduce, or a reduce-scatter of time).

        Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.
        """
        _, letters, result = letters_of(equation)
        if any(self.split(letter) for letter in letters if letter in result):
            x = self.enter(x)
        y = self.multiply(equation, x, w)
        if any(self.split(letter) for letter in letters if letter not in result):
            y = self.leave(y)
        return y

    @abc.abstractmethod
    def enter(self, x_BTD: jax.Array) -> jax.Array:
        """From the residual stream to where every `model` rank holds all of time."""

    @abc.abstractmethod
    def leave(self, y_BTD: jax.Array) -> jax.Array:
        """From partial sums over `model` to the residual stream."""

    @abc.abstractmethod
    def gather_for_use(self, w: nnx.Variable) -> jax.Array:
        """The stored weight in the compute dtype, whole but for `model`; its gradient is scattered."""

    def multiply(self, equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
        """An einsum with a weight; a weight that ZeRO-3 gathered is never saved for the backward pass."""

        if not self.at_use or self.layout.zero_dim(w.weight) is None:
            return self.residual_einsum(equation, x, self.gather_for_use(w))

        def gather_and_multiply(x: jax.Array, value: jax.Array) -> jax.Array:
            return self.residual_einsum(equation, x, self.gather(w.weight, value))

        return jax.checkpoint(gather_and_multiply, prevent_cse=self.unrolled)(x, w[...])

    @abc.abstractmethod
    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """An einsum whose result, if it has a D, belongs to the residual stream (or is a part of its sum)."""

    @abc.abstractmethod
    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        """Rows of a table whose vocabulary may be split, as x_BTD of the residual stream."""

    @abc.abstractmethod
    def index(self, letter: Literal["T", "N", "V"], x: jax.Array, axis: int) -> jax.Array:
        """Global indices along an axis of x. T is the residual stream's time."""

    @abc.abstractmethod
    def sum_over(self, letter: Literal["B", "V"], x: jax.Array) -> jax.Array:
        """Add what the ranks that split this letter hold. Not differentiated."""

    @abc.abstractmethod
    def max_over(self, letter: Literal["V"], x: jax.Array) -> jax.Array:
        """The maximum over the ranks that split this letter. Not differentiated."""

    @abc.abstractmethod
    def whole_vocabulary(self, logits_BTV: jax.Array) -> jax.Array:
        """Logits with the parts of V that other ranks hold. Not differentiated."""

    @abc.abstractmethod
    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """An activation of zeros, split as its letters say; `shape` is the global one."""

    @abc.abstractmethod
    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """An einsum without communication but for batch sums that the lowering may do at once."""

    @abc.abstractmethod
    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        """f of what each device holds, where it communicates nothing: for kernels, which XLA cannot split."""

    @abc.abstractmethod
    def first(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """The first of this rank's time (T = 1) in the residual stream, and 1 if it is the sequence's first, else 0."""

    @abc.abstractmethod
    def sum_time(self, x: jax.Array) -> jax.Array:
        """Add what the ranks that split the residual stream's time hold. Not differentiated."""

    def gather_stages(self, weight: Weight, value: jax.Array) -> jax.Array:
        """A stored weight's value with what other pipeline stages hold of it at rest: once per step."""
        return value

    @abc.abstractmethod
    def gather(self, weight: Weight, value: jax.Array) -> jax.Array:
        """A stored weight's value cast and gathered: once per step, or at its use under stage 3."""

    @abc.abstractmethod
    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """What of a microbatch's gradient is accumulated: stages 2 and 3 keep a shard."""

    @abc.abstractmethod
    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """The accumulated float32 gradient summed over every rank that holds a part, split as the weight is."""

    @abc.abstractmethod
    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """The transpose of `gather_for_use`, for hand-written backward passes."""

    @abc.abstractmethod
    def sum_residual(self, x_BTD: jax.Array) -> jax.Array:
        """The transpose of `enter`, for hand-written backward passes."""


def letters_of(equation: str) -> tuple[str, str, str]:
    """Of an einsum: the first operand's, the second's, the result's."""
    operands, result = equation.split("->")
    x, w = operands.split(",")
    return x, w, result


def map_weights(f: Callable, weights: Mapping, *trees: Mapping) -> dict:
    """f(weight, *what the trees have there) over a nested dict of declarations; the trees may have more than it."""
    return {
        name: map_weights(f, weight, *(tree[name] for tree in trees))
        if isinstance(weight, Mapping)
        else f(weight, *(tree[name] for tree in trees))
        for name, weight in weights.items()
    }


def replaced(params: Mapping, some: Mapping) -> dict:
    """A nested dict with the values that `some`, a part of it, has instead."""
    return {
        name: replaced(value, some.get(name, {})) if isinstance(value, Mapping) else some.get(name, value)
        for name, value in params.items()
    }
