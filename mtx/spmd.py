"""The doors: the few functions through which layers touch the mesh.

Layers speak in an einsum's letters; the layout says which letters are split, and the doors turn that
into communication. Two lowerings of the same doors:

* `Manual`: the code runs inside one `jax.shard_map` over every axis and sees local shapes; each door
  writes its collective and, as a custom VJP, the collective of its gradient (Megatron-LM's f and g).
  A cotangent of a value that `model` ranks hold alike is held alike by them, whole.
* `Compiled`: the code sees global shapes; each door states the sharding of its result and XLA's
  partitioner finds the communication.

On one device both do nothing but multiply.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mtx import DIMENSIONS
from mtx.layout import RESIDUAL_TIME, STAGES, ZERO, BoundLayout, Placement, Weight

Params: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """dtypes. Softmax, norms, losses and accumulated gradients are float32 whatever this says."""

    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of matrix products and activations; auto is bfloat16 where the chip multiplies it natively."""
    params: Literal["float32", "bfloat16"] = "float32"
    """dtype of the stored matrices; moments stay float32."""

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
        _, letters, result = _letters(equation)
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
        if not weight.is_matrix:
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
        if not weight.is_matrix:
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
        if not weight.is_matrix:
            return value
        return jax.reshard(value.astype(self.compute), self.layout.gathered(weight))

    def scatter_microbatch(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "gradients"))

    def reduce_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "weights"))

    def scatter_gradient(self, weight: Weight, gradient: jax.Array) -> jax.Array:
        return jax.reshard(gradient, self.layout.spec(weight, "weights")) if self.at_use else gradient

    def residual_einsum(self, equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, out_sharding=self.layout.activation(_letters(equation)[2]))

    def local_einsum(self, equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        result = _letters(equation)[2]
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


class VirtualStage(NamedTuple):
    """One of this stage's, as traced numbers."""

    row: jax.Array
    """Its first row in the stage's stacked weights."""
    layer: jax.Array
    """Its first layer."""
    count: jax.Array
    """How many it has."""
    is_first: jax.Array
    is_last: jax.Array


def this_stage(place: Placement, chunk: jax.Array) -> VirtualStage:
    """This pipeline stage's chunk of this number; inside the Manual region."""
    virtual = chunk * place.stages + lax.axis_index(STAGES)
    return VirtualStage(
        row=chunk * place.size,
        layer=jnp.asarray(place.first)[virtual],
        count=jnp.asarray(place.counts)[virtual],
        is_first=virtual == 0,
        is_last=virtual == len(place.counts) - 1,
    )


def relay(place: Placement, run: Callable[[jax.Array, tuple[Any, Any]], Any], moving: Any, own: Any) -> Any:
    """(moving, own) through all virtual stages, one after the other; `moving` ends on every stage, `own` stays.

    `run(chunk, (moving, own))` is one of this stage's chunks. Not differentiated; inside the Manual region.
    """
    here = lax.axis_index(STAGES)

    def hop(k: jax.Array, now: Any) -> Any:
        moving, own = lax.cond(k % place.stages == here, lambda: run(k // place.stages, now), lambda: now)
        return jax.tree.map(to_next_stage, moving), own

    moving, own = lax.fori_loop(0, len(place.counts), hop, (moving, own))
    return jax.tree.map(lambda x: lax.psum(jnp.where(here == 0, x, jnp.zeros_like(x)), STAGES), moving), own


def to_next_stage(x: jax.Array) -> jax.Array:
    """What each stage holds, moved one stage on; the last stage's goes to the first."""
    stages = lax.axis_size(STAGES)
    return lax.ppermute(x, STAGES, [(i, (i + 1) % stages) for i in range(stages)])


def to_stage_before(x: jax.Array) -> jax.Array:
    """What each stage holds, moved one stage back; the first stage's goes to the last."""
    stages = lax.axis_size(STAGES)
    return lax.ppermute(x, STAGES, [(i, (i - 1) % stages) for i in range(stages)])


def _letters(equation: str) -> tuple[str, str, str]:
    operands, result = equation.split("->")
    x, w = operands.split(",")
    return x, w, result


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


def map_weights(f: Callable, weights: Mapping, *trees: Mapping) -> dict:
    """f(weight, *leaves) over nested dicts of equal shape; `weights` has a Weight at each leaf."""
    return {
        name: f(weight, *(tree[name] for tree in trees))
        if isinstance(weight, Weight)
        else map_weights(f, weight, *(tree[name] for tree in trees))
        for name, weight in weights.items()
    }
