"""The doors through which layers, losses and steps reach the mesh, and the configs that say how it is done."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

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
class Storage(abc.ABC):
    """The doors of weights: from their stored shards to the arrays in use, and their gradients back."""

    layout: BoundLayout
    compute: Any
    """dtype of matrices in use."""

    @property
    def at_use(self) -> bool:
        """Whether weights reach the layers as stored, to be cast and gathered there: ZeRO 3."""
        return self.layout.gathers_at_use

    @abc.abstractmethod
    def for_use(self, w: nnx.Variable) -> jax.Array:
        """The weight as layers multiply with it, from what reaches them: `gather`ed already, but under ZeRO 3."""

    def gather_stages(self, weight: Weight, value: jax.Array) -> jax.Array:
        """A stored weight's value with what other pipeline stages hold of it at rest: once per step."""
        return value

    @abc.abstractmethod
    def gather(self, weight: Weight, value: jax.Array) -> jax.Array:
        """A stored weight's value cast and gathered: once per step, or at its use under ZeRO 3.

        The gradient of the result is scattered.
        """

    @abc.abstractmethod
    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """The part of a microbatch's gradient that is accumulated: a shard under ZeRO 2 and 3."""

    @abc.abstractmethod
    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """The accumulated float32 gradient summed over `BoundLayout.reduce_axes`, split as the stored weight is."""

    @abc.abstractmethod
    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        """The transpose of `for_use`, for hand-written backward passes."""


@dataclass(frozen=True)
class Activations(abc.ABC):
    """The doors of activations, for layers and losses. Which axes split a letter is the layout's matter."""

    storage: Storage
    device: jax.Device
    """One of the mesh's, present or not; all are of a kind."""
    unrolled: bool = False
    """Whether layers are straight-line code, in which XLA would merge what remat repeats."""
    global_shapes = False

    @property
    def layout(self) -> BoundLayout:
        return self.storage.layout

    @property
    def compute(self) -> Any:
        return self.storage.compute

    def parts(self, letters: str) -> int:
        """The number of devices that share the letters of an array as the code sees it: 1 inside the Manual region."""
        return self.layout.size(*self.layout.splits(letters)) if self.global_shapes else 1

    def project(self, equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
        """x times a weight. The letters decide: a split letter of the weight that stays is a column projection (enter
        the region where heads, ff or vocab are split), one that is contracted is a row projection (leave it with an
        all-reduce, or a reduce-scatter of time).

        Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.
        """
        met, letters, result = letters_of(equation)
        assert met == w.weight.meets, f"{w.weight} is used in {equation}; declare it with meets={met!r}"
        x = self.enter(x, "".join(letter for letter in letters if letter in result))
        y = self._multiply(equation, x, w)
        return self.leave(y, "".join(letter for letter in letters if letter not in result))

    def _multiply(self, equation: str, x: jax.Array, w: nnx.Param) -> jax.Array:
        """An einsum with a weight; a weight that ZeRO 3 gathered is never saved for the backward pass."""
        if not self.storage.at_use or self.layout.zero_dim(w.weight) is None:
            return self.residual_einsum(equation, x, self.storage.for_use(w))

        def gather_and_multiply(x: jax.Array, value: jax.Array) -> jax.Array:
            return self.residual_einsum(equation, x, self.storage.gather(w.weight, value))

        return jax.checkpoint(gather_and_multiply, prevent_cse=self.unrolled)(x, w[...])

    @abc.abstractmethod
    def enter(self, x_BTD: jax.Array, letters: str) -> jax.Array:
        """From the residual stream to where these letters are split, over axes of time too; x itself if none is."""

    @abc.abstractmethod
    def leave(self, y_BTD: jax.Array, letters: str) -> jax.Array:
        """From partial sums over what splits these letters to the residual stream: the transpose of `enter`."""

    @abc.abstractmethod
    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """An einsum whose result, if it has a D, belongs to the residual stream (or is a part of its sum)."""

    @abc.abstractmethod
    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """An einsum of what has entered, without communication but for batch sums that the lowering may do at once."""

    @abc.abstractmethod
    def embed(self, token_BT: jax.Array, table_VD: nnx.Param) -> jax.Array:
        """Rows of a table whose vocabulary may be split, as x_BTD of the residual stream."""

    @abc.abstractmethod
    def first(self, letters: Literal["BT", "BTD"], x: jax.Array) -> jax.Array:
        """x of each sequence's first token, without T: alike on every rank that has a part of time."""

    @abc.abstractmethod
    def index(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        """Global indices along one letter of an activation x of these letters."""

    @abc.abstractmethod
    def sum_over(self, letters: str, x: jax.Array) -> jax.Array:
        """The sum of what the ranks hold that split these letters; with an arrow, but for those behind it (`BTNH->N`).
        Not differentiated."""

    @abc.abstractmethod
    def max_over(self, letters: str, x: jax.Array) -> jax.Array:
        """The maximum of the same. Not differentiated."""

    @abc.abstractmethod
    def whole(self, letters: str, letter: str, x: jax.Array) -> jax.Array:
        """An activation with all of one letter, of which other ranks hold parts. Its gradient is summed over them."""

    @abc.abstractmethod
    def zeros(self, letters: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """An activation of zeros, split as its letters say; `shape` is the global one."""

    @abc.abstractmethod
    def local(self, f: Callable[..., jax.Array], letters: Sequence[str], result: str, *arrays: jax.Array) -> jax.Array:
        """f of what each device holds, where it communicates nothing: for kernels, which XLA cannot split."""


def letters_of(equation: str) -> tuple[str, str, str]:
    """The letters of an einsum: the first operand's, the second's, the result's."""
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
