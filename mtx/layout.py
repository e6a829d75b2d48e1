"""The layout: which mesh axes each named dimension is split over, in four columns.

A layout is plain data, a table of `Row`s. `megatron` makes the preset from `zero` and
`sequence_parallel`; a config may replace the table. `BoundLayout` is the table on one mesh: it derives
every `PartitionSpec` and refuses conflicts and indivisible dimensions by name.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np
from jax.sharding import PartitionSpec

from mtx import DIMENSIONS
from mtx.errors import ConfigError, Problem
from mtx.mesh import AXES, BATCH_AXES

Axes = tuple[str, ...]
Column = Literal["weights", "gradients", "optimizer", "activations"]
Role = Literal["embedding", "head", "matrix", "vector", "router", "adapter"]
"""Purposes of a weight: a table that tokens look up, the output projection, any other projection, a gain or a bias, the
projection that chooses experts, a small trained addition to a projection."""

ZERO = "zero"
"""Stands for a weight's ZeRO dimension: the largest that divides and is not minor-most."""
RESIDUAL_TIME = "residual_time"
"""Time in the residual stream, where norms and dropout run (`BTD`). Elsewhere it is `time`: in the batch (`BT`), and
where another letter takes over the axes that split the residual stream's time (`BTNH`)."""
SPLIT_BY_MODEL = ("heads", "kv_heads", "ff", "vocab")
"""The dimensions that tensor parallelism may split."""
NEED_TIME = ("heads", "kv_heads", "vocab")
"""Those of them that need all of time: attention sees it, and the loss compares logits with the batch's targets."""
NO_FEATURES = frozenset({"batch", "time", "key_time", "layer"})
"""The dimensions of an activation that say which token it is of, and in which layer."""
TIME_AXES = ("context",)
"""The axes that may split time everywhere, in attention too."""
LAYER = "layer"
STAGES = "pipeline"
"""The axis that splits layers; stored tables of the vocabulary too, if the layout says so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The mesh axes that split one dimension, in four columns."""

    dimension: str
    """A name of `mtx.DIMENSIONS`, or `zero`, or `residual_time`."""
    weights: Axes = ()
    """Axes of the stored masters."""
    gradients: Axes = ()
    """Axes of the gradient accumulator."""
    optimizer: Axes = ()
    """Axes of the optimizer state."""
    activations: Axes = ()
    """Axes of activations."""
    gathered: Literal["step", "use"] = "step"
    """When the shards of row `zero` are gathered: once per step, or wherever a layer uses the weight (ZeRO 3)."""

    def problems(self) -> Iterator[str]:
        """What no door could make right: splits that the layers' communication does not foresee."""
        name, known = self.dimension, {*DIMENSIONS.values(), ZERO, RESIDUAL_TIME}
        columns = (self.weights, self.gradients, self.optimizer, self.activations)
        if name not in known:
            yield f"names no dimension {name!r}; legal: {', '.join(sorted(known))}"
        elif unknown := [axis for column in columns for axis in column if axis not in AXES]:
            yield f"maps {name} to {unknown[0]!r}, not a mesh axis; legal: {', '.join(AXES)}"
        elif twice := [axis for column in columns for axis in column if column.count(axis) > 1]:
            yield f"maps {name} to {twice[0]} twice in one column; name it once"
        elif self.gathered == "use" and (name != ZERO or not self.weights or self.gradients != self.weights):
            yield f"gathers {name} at its use, which is for zero with weights and gradients split alike"
        elif name == LAYER:
            if set(columns) != {(STAGES,)}:
                yield f"must split all four columns of {name} over {STAGES}"
        elif name in SPLIT_BY_MODEL:
            if name == "vocab" and STAGES in self.weights:  # split at rest only
                at_rest = (*self.activations, STAGES)
                columns = (
                    columns if (self.weights, self.optimizer) != (at_rest,) * 2 else (self.gradients, self.activations)
                )
            if len(set(columns)) > 1 or STAGES in columns[0]:
                at_rest = f"; weights and optimizer state of vocab over {STAGES} besides" if name == "vocab" else ""
                yield f"must split all four columns of {name} over the same axes, such as model, or none{at_rest}"
        elif name == ZERO:
            alike = self.weights == self.optimizer and self.gradients in ((), self.weights)
            if self.activations or not alike or not {*self.weights} <= {*BATCH_AXES}:
                yield (
                    "must split weights and optimizer state of zero over data, or other axes of batch; gradients too, "
                    "or not; no activations"
                )
        elif any(columns[:3]) or (self.activations and name not in ("batch", "time", RESIDUAL_TIME)):
            yield f"splits {name}; what can be split over model: {', '.join(SPLIT_BY_MODEL)}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How weights, gradients, optimizer state and activations are split over the mesh."""

    zero: Literal[0, 1, 2, 3] = 0
    """ZeRO stage over mesh.data: 1 optimizer state and masters, 2 gradients too, 3 weights gathered per layer."""
    sequence_parallel: bool = False
    """Split the residual stream's time over mesh.model (Korthikanti et al. 2022): same bytes, less memory."""
    scatter: Literal["float32", "compute"] = "float32"
    """dtype in which stage 3 reduce-scatters a layer's gradients; compute: that of precision.compute."""
    vocabulary: Literal["sharded", "replicated"] = "sharded"
    """Embedding and head on the stages of a pipeline. sharded: a part at rest on each, gathered once per step and its
    gradient scattered; replicated: whole on each, its gradient all-reduced."""
    rows: tuple[Row, ...] | None = None
    """The whole table, instead of the preset that zero and sequence_parallel choose."""

    def check(self) -> Iterator[Problem]:
        if self.scatter != "float32" and self.zero_stage != 3:
            yield "scatter", "is for layout.zero=3; leave it at float32"
        if self.rows is None:
            return
        replaced = "has no effect: layout.rows replaces the preset"
        if self.vocabulary != "sharded":
            yield "vocabulary", f"{replaced}; its row `vocab` decides"
        if self.zero:
            decides = "; its row `zero` decides" if self.zero_stage else " and has no row `zero` over data"
            yield "zero", replaced + decides
        if self.sequence_parallel:
            none = "has no effect: layout.rows has no row `residual_time` over model"
            yield "sequence_parallel", f"{replaced}; its row `residual_time` decides" if self.sequence_axes else none
        twice = [row.dimension for row in self.rows if self.row(row.dimension) is not row]
        if twice:
            yield "rows", f"has two rows for {twice[0]}; keep one"
        for why in (*(why for row in self.rows for why in row.problems()), *self._conflicts()):
            yield "rows", why

    def _conflicts(self) -> Iterator[str]:
        """Reasons why rows that are right by themselves do not go together."""
        batch, time, residual_time, heads, kv_heads = (
            self.row(name).activations for name in ("batch", "time", RESIDUAL_TIME, "heads", "kv_heads")
        )
        if heads != kv_heads:
            if heads and kv_heads:
                yield f"splits heads over {', '.join(heads)} and kv_heads over {', '.join(kv_heads)}; split both alike"
            else:
                yield "splits one of heads and kv_heads; split both over model, or neither"
        if batch != BATCH_AXES:
            yield f"must split the activations of batch over {', '.join(BATCH_AXES)}"
        if wrong := [axis for axis in time if axis not in TIME_AXES]:
            yield f"splits time over {wrong[0]}, of which attention sees only a part; legal: {', '.join(TIME_AXES)}"
        if residual_time[: len(time)] != time:
            yield f"splits time over {', '.join(time)}; residual_time must begin with the same axes"
        for name in SPLIT_BY_MODEL:
            for other, axes in (("batch", batch), ("time", time)):
                if both := [axis for axis in self.row(name).activations if axis in axes]:
                    yield f"maps both {other} and {name} to {both[0]}, and an activation has both"
        sequence = {*self.sequence_axes}
        whole = {name: sequence - {*self.row(name).activations} for name in SPLIT_BY_MODEL}
        if any(whole[name] for name in NEED_TIME):
            axes = ", ".join(self.sequence_axes)
            yield f"splits residual_time over {axes}, which needs {', '.join(NEED_TIME)} split too"
        elif sequence - whole["ff"] and whole["ff"]:
            yield f"splits residual_time over {', '.join(self.sequence_axes)} and ff over a part of them; all, or none"

    def row(self, dimension: str) -> Row:
        """The row of a dimension, which splits nothing if the table has none."""
        return next((row for row in self.table() if row.dimension == dimension), Row(dimension=dimension))

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that row `zero` of the table amounts to."""
        row = self.row(ZERO)
        return 3 if row.gathered == "use" else 2 if row.gradients else 1 if row.weights else 0

    @property
    def sequence_axes(self) -> Axes:
        """The axes that split time in the residual stream and nowhere else: sequence parallelism, if there are any."""
        time = self.row("time").activations
        return tuple(axis for axis in self.row(RESIDUAL_TIME).activations if axis not in time)

    def table(self) -> tuple[Row, ...]:
        if self.rows is not None:
            return self.rows
        return megatron(self.zero, self.sequence_parallel, self.vocabulary == "sharded")


@cache
def megatron(zero: int, sequence_parallel: bool, shard_vocabulary: bool = True) -> tuple[Row, ...]:
    """Megatron-LM's tensor (and sequence) parallelism with ZeRO over `data`, and layers over `pipeline`.

    Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4; Rajbhandari et al. 2020.
    """

    def split(dimension: str, by: Axes = ("model",), at_rest: Axes = ()) -> Row:
        return Row(dimension=dimension, weights=by + at_rest, gradients=by, optimizer=by + at_rest, activations=by)

    return (
        Row(dimension="batch", activations=BATCH_AXES),
        Row(dimension="time", activations=("context",)),
        Row(dimension=RESIDUAL_TIME, activations=("context", "model") if sequence_parallel else ("context",)),
        *(split(dimension) for dimension in SPLIT_BY_MODEL if dimension != "vocab"),
        split("vocab", at_rest=(STAGES,) if shard_vocabulary else ()),
        split(LAYER, (STAGES,)),
        Row(
            dimension=ZERO,
            weights=("data",) if zero >= 1 else (),
            gradients=("data",) if zero >= 2 else (),
            optimizer=("data",) if zero >= 1 else (),
            gathered="use" if zero >= 3 else "step",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """How the trainer treats the weights of one role."""

    decays: bool = True
    """True: weight decay applies to them."""
    reduced: bool = True
    """True: they are stored in `precision.params`; else in float32."""
    cast: bool = True
    """True: they are used in `precision.compute`; else as they are stored."""
    zero: bool = True
    """True: ZeRO splits them over `data`. What it splits is cast, so that gathers move the compute dtype."""
    multiplied: bool = True
    """True: each token is multiplied with them, which counts as model FLOPs."""

    def __post_init__(self):
        assert self.cast or not self.zero, self


TREATMENTS: Mapping[Role, Treatment] = {
    "embedding": Treatment(multiplied=False),
    "head": Treatment(),
    "matrix": Treatment(),
    "vector": Treatment(decays=False, reduced=False, cast=False, zero=False, multiplied=False),
    "router": Treatment(reduced=False, cast=False, zero=False),  # bfloat16 would choose other experts
    "adapter": Treatment(reduced=False),
}


@dataclass(frozen=True)
class Weight:
    """Declaration of a weight: a letter per dimension, the global shape, its role, and whether it is trained.

    The arrays of an optimizer's state are declared in the same way.
    """

    dims: str
    shape: tuple[int, ...]
    role: Role = "matrix"
    trainable: bool = True
    """False: no gradient of it is computed, no optimizer state kept, and it never changes."""
    meets: str = "BTD"
    """Letters of the activation that it multiplies or is added to: its gradient is summed over the axes that split them
    and not the weight."""
    of: "Weight | None" = None
    """The weight that this array is a part of the optimizer's state of; ZeRO splits both alike."""

    def __post_init__(self):
        assert len(self.dims) == len(self.shape), self

    @property
    def treatment(self) -> Treatment:
        return TREATMENTS[self.role]

    @property
    def layer(self) -> "Weight":
        """The declaration of one layer of a stacked weight; of any other, itself."""
        return replace(self, dims=self.dims[self.layers :], shape=self.shape[self.layers :])

    @property
    def layers(self) -> int:
        """1 if the weight is stacked over layers, which only a pipeline splits; else 0."""
        return int(self.dims.startswith("L"))


@dataclass(frozen=True)
class Placement:
    """Where layers lie. Virtual stage `chunk * stages + stage` of a pipeline is on stage `stage`.

    The leading dimension of stacked weights has a row for each layer in the order (stage, chunk, layer); virtual stages
    with fewer layers than others end with rows of zeros that nothing reads. In checkpoints layers are in their own
    order, without such rows.
    """

    counts: tuple[int, ...]
    """Layers of each virtual stage."""
    stages: int = 1

    @staticmethod
    def even(layers: int, stages: int = 1, chunks: int = 1) -> "Placement":
        """As even as can be; the earlier virtual stages have more, as the last has the head to compute."""
        least, more = divmod(layers, stages * chunks)
        return Placement(tuple(least + (k < more) for k in range(stages * chunks)), stages)

    @property
    def chunks(self) -> int:
        """Virtual stages of each stage."""
        return len(self.counts) // self.stages

    @property
    def size(self) -> int:
        """Rows of a virtual stage."""
        return max(self.counts)

    @property
    def is_even(self) -> bool:
        return len(set(self.counts)) == 1

    @cached_property
    def first(self) -> np.ndarray:
        """The first layer of each virtual stage."""
        return np.cumsum((0, *self.counts[:-1]))

    @cached_property
    def layer_of_row(self) -> np.ndarray:
        """int [rows]; -1 for a row without a layer."""
        order = [chunk * self.stages + stage for stage in range(self.stages) for chunk in range(self.chunks)]
        i = np.arange(self.size)
        return np.concatenate([np.where(i < self.counts[k], self.first[k] + i, -1) for k in order])

    @property
    def row_of_layer(self) -> np.ndarray:
        """int [layers]."""
        return np.argsort(self.layer_of_row, kind="stable")[self.rows - sum(self.counts) :]

    @property
    def rows(self) -> int:
        return len(self.counts) * self.size

    @property
    def in_order(self) -> bool:
        """Whether rows are the layers themselves."""
        return self.is_even and self.chunks == 1


@dataclass(frozen=True)
class BoundLayout:
    """A layout on one mesh. Axes of size 1 never appear in what it returns."""

    layout: Layout
    sizes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(layout: Layout, mesh_sizes: Mapping[str, int]) -> "BoundLayout":
        return BoundLayout(layout, tuple(mesh_sizes.items()))

    def size(self, *axes: str) -> int:
        return math.prod(dict(self.sizes)[axis] for axis in axes)

    def axes(self, dimension: str, column: Column) -> Axes:
        """The axes, larger than 1, that split a dimension in a column."""
        return self._present(getattr(self.layout.row(dimension), column))

    def _present(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if self.size(axis) > 1)

    @property
    def batch_axes(self) -> Axes:
        return self.axes("batch", "activations")

    @property
    def sequence_axes(self) -> Axes:
        """The axes that split time in the residual stream and nowhere else."""
        return self._present(self.layout.sequence_axes)

    def letter_axes(self, letters: str) -> list[Axes]:
        """The axes of each letter of an activation; T is `residual_time` in the residual stream."""
        names = [DIMENSIONS[letter] for letter in letters]
        if {*names} - NO_FEATURES and not any(self.takes_time(name) for name in names):
            names = [RESIDUAL_TIME if name == "time" else name for name in names]
        return [self.axes(name, "activations") for name in names]

    def takes_time(self, dimension: str) -> bool:
        """Returns whether a dimension is split over the axes of the residual stream's time, which then is not."""
        return bool(self.sequence_axes) and {*self.sequence_axes} <= {*self.axes(dimension, "activations")}

    def splits(self, letters: str) -> Axes:
        """The axes that split an activation, in the order of its letters; of `BTNH->N`, those of B, T and H."""
        letters, _, kept = letters.partition("->")
        each = zip(letters, self.letter_axes(letters), strict=True)
        return tuple(dict.fromkeys(axis for letter, axes in each if letter not in kept for axis in axes))

    def activation(self, letters: str) -> PartitionSpec:
        """The PartitionSpec of an activation, by its letters."""
        return _spec(self.letter_axes(letters))

    def entered(self, letters: str) -> PartitionSpec:
        """The PartitionSpec of an activation that has left the residual stream by `enter`: T is split as in `BT`."""
        return _spec([self.letter_axes(letter)[0] for letter in letters])

    def reduce_axes(self, weight: Weight) -> Axes:
        """The axes over which a weight's gradient is summed: they split the activation that it meets, and not itself.

        Every activation is of some layer too, so that a pipeline's stages, which L splits, sum what they share.
        """
        own = {axis for axes in self._in_use(weight) for axis in axes}
        return tuple(axis for axis in self.splits(weight.meets + "L") if axis not in own)

    def at_rest(self, weight: Weight) -> list[tuple[int, Axes]]:
        """(dimension, axes) that split the stored weight and not the one in use, those gathered last first."""
        zero, vocab = (self.zero_dim(weight), self.axes(ZERO, "weights")), (self.vocab_dim(weight), (STAGES,))
        return [(dim, axes) for dim, axes in (zero, vocab) if dim is not None]

    def zero_dim(self, weight: Weight) -> int | None:
        """Index in `weight.dims` of the dimension that ZeRO splits; None if the weight stays whole.

        The largest that divides and is not minor-most (TPUs scatter a minor-most one badly); the
        minor-most if only that divides. Of an optimizer's state: the weight's own, if that is there and divides.
        """
        data = self.size(*self.axes(ZERO, "weights"))
        if data == 1 or not weight.treatment.zero:
            return None
        if weight.of is not None:
            letter = None if (i := self.zero_dim(weight.of)) is None else weight.of.dims[i]
            there = [i for i, own in enumerate(weight.dims) if own == letter and self._local(weight, i) % data == 0]
            return there[0] if there else None
        last = len(weight.dims) - 1
        local = [self._local(weight, i) for i in range(len(weight.dims))]
        able = [i for i in range(weight.layers, last + 1) if local[i] % data == 0]
        return max(able, key=lambda i: (i != last, local[i]), default=None)

    def _local(self, weight: Weight, i: int) -> int:
        return weight.shape[i] // self.size(*self.axes(DIMENSIONS[weight.dims[i]], "weights"))

    def spec(self, weight: Weight, column: Column) -> PartitionSpec:
        """The spec of a weight, its gradient accumulator, or its optimizer state."""
        axes = [self.axes(DIMENSIONS[letter], column) for letter in weight.dims]
        if (zero := self.zero_dim(weight)) is not None:
            axes[zero] = axes[zero] + self.axes(ZERO, column)
        if (vocab := self.vocab_dim(weight)) is not None and STAGES in axes[vocab]:
            axes[vocab] = (*(axis for axis in axes[vocab] if axis != STAGES), STAGES)  # it is gathered first
        return _spec(axes)

    def vocab_dim(self, weight: Weight) -> int | None:
        """Index of the dimension that the pipeline splits at rest, to be gathered once per step, if there is one."""
        split = [STAGES in self.axes(DIMENSIONS[letter], "weights") for letter in weight.dims[weight.layers :]]
        return weight.layers + split.index(True) if any(split) else None

    def ordered_spec(self, weight: Weight, column: Column) -> PartitionSpec:
        """The spec of a stacked weight whose layers are in their own order: another dimension is split instead."""
        axes = [_as_tuple(entry or ()) for entry in self.spec(weight, column)]
        axes[0] = ()
        if (i := self.exchange_dim(weight)) is not None:
            axes[i] = (*axes[i], STAGES)
        return _spec(axes)

    def exchange_dim(self, weight: Weight) -> int | None:
        """Index of the largest dimension, of one device, that the pipeline could split; None if it divides none."""
        spec = self.spec(weight, "weights")
        local = [size // self.size(*_as_tuple(entry or ())) for size, entry in zip(weight.shape, spec, strict=True)]
        able = [i for i in range(weight.layers, len(local)) if local[i] % self.size(STAGES) == 0]
        return max(able, key=lambda i: local[i], default=None)

    def _in_use(self, weight: Weight) -> list[Axes]:
        return [self.axes(DIMENSIONS[letter], "activations") for letter in weight.dims]

    def gathered(self, weight: Weight) -> PartitionSpec:
        """The PartitionSpec of a weight in use: split as its letters are in activations."""
        return _spec(self._in_use(weight))

    @property
    def gathers_at_use(self) -> bool:
        """True if stored shards are gathered by the layers that use them (ZeRO 3), and not once per step."""
        return self.layout.row(ZERO).gathered == "use"

    def check(self, weights: Mapping[str, Weight]) -> None:
        """Refuse a conflict or an indivisible dimension.

        Raises: ConfigError naming weight, dimension, axis, sizes and legal values.
        """
        for name, weight in weights.items():
            taken: dict[str, str] = {}
            for letter, size in zip(weight.dims, weight.shape, strict=True):
                dimension = DIMENSIONS[letter]
                axes = self.axes(dimension, "weights")
                parts = self.size(*axes)
                if size % parts:
                    legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                    raise ConfigError(
                        f"dimension {dimension}={size} of weight {name} does not divide over "
                        f"mesh.{'*'.join(axes)}={parts}; "
                        f"legal mesh.{'*'.join(axes)}: {legal}."
                    )
                for axis in axes:
                    if axis in taken:
                        raise ConfigError(
                            f"layout.rows maps both {taken[axis]} and {dimension} of weight {name} to mesh "
                            f"axis {axis}; map one of them to no axis."
                        )
                    taken[axis] = dimension

    def bytes_per_device(self, weight: Weight, column: Column, itemsize: int) -> int:
        return itemsize * math.prod(weight.shape) // self.shards(weight, column)

    def shards(self, weight: Weight, column: Column) -> int:
        axes = [axis for entry in self.spec(weight, column) if entry for axis in _as_tuple(entry)]
        return self.size(*axes)

    def show(self, weights: Mapping[str, Weight], itemsize: int, whole: bool) -> str:
        """The sharding table: parameter, shape, dimensions, spec, MiB per device; the largest whole tensor."""
        rows = sorted(weights.items(), key=lambda item: -math.prod(item[1].shape))
        shown = rows if whole else rows[:8]
        cells = [("parameter", "shape", "dimensions", "split over", "MiB/device")]
        for name, weight in shown:
            mib = self.bytes_per_device(weight, "weights", itemsize) / 2**20
            shape = "x".join(str(size) for size in weight.shape)
            spec = [
                f"{DIMENSIONS[letter]}:{'*'.join(_as_tuple(entry))}"
                for letter, entry in zip(weight.dims, self.spec(weight, "weights"), strict=True)
                if entry
            ]
            cells.append((name, shape, weight.dims, " ".join(spec) or "(whole)", f"{mib:.3f}"))
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        if len(shown) < len(rows):
            lines.append(f"... {len(rows) - len(shown)} smaller ones: -v shows them")
        whole_ones = [item for item in rows if self.shards(item[1], "weights") == 1]
        if whole_ones and math.prod(size for _, size in self.sizes) > 1:
            name, weight = whole_ones[0]
            mib = self.bytes_per_device(weight, "weights", itemsize) / 2**20
            lines.append(f"largest tensor that every device holds whole: {name}, {mib:.3f} MiB")
        return "\n".join(lines)


def _spec(axes: list[Axes]) -> PartitionSpec:
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in axes))


def _as_tuple(entry: str | Axes) -> Axes:
    return (entry,) if isinstance(entry, str) else tuple(entry)
