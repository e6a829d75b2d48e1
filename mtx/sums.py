"""Statistics that layers and losses give beside their results: what each declares, and how its values are put together.

A layer returns (x, sums): values by name, each computed from the part of a microbatch that this device holds. They are
put together over layers, microbatches, pipeline stages and mesh axes as their declarations say.
"""

import abc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp

from mtx.errors import ConfigError
from mtx.spmd import Activations

Sums: TypeAlias = dict[str, jax.Array]
"""Values of statistics by name, float32."""
Denominator: TypeAlias = Literal["label", "token", "row"]


@dataclass(frozen=True)
class Statistic(abc.ABC):
    """The declaration of a statistic; `Sum` and `Max` are its kinds."""

    letters: str
    """Letters of the activation that it is of and, behind an arrow, those that its value still has: `BTF->F` is one
    number per hidden unit, `BTD->` is one number. Ranks that split the other letters hold parts of the value."""
    per_layer: bool = False
    """Whether each layer has a value of its own: the result is stacked, with a leading L, in the layers' own order. L
    counts the layers of the kinds that declare it; a kind that does not has no row."""
    empty: ClassVar[float]
    """The value of nothing."""

    def __post_init__(self) -> None:
        of, arrow, kept = self.letters.partition("->")
        assert arrow and {*kept} <= {*of} - {*"BTL"}, (
            f"{self}: letters of an activation -> of its value, without B and T"
        )

    @property
    def in_objective(self) -> bool:
        """Whether it is a part of the objective. If not, it has no gradient."""
        return False

    @property
    def reduced(self) -> str:
        """`letters` with those of the layers, which pipelines split, unless each has a value of its own."""
        return self.letters if self.per_layer else f"L{self.letters}"

    @property
    def kept(self) -> str:
        """Letters of the value."""
        return self.letters.partition("->")[2]

    @abc.abstractmethod
    def both(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The value of two parts together."""

    @abc.abstractmethod
    def over_layers(self, x_L: jax.Array) -> jax.Array:
        """The value of all layers together, from theirs, stacked."""

    @abc.abstractmethod
    def over_ranks(self, doors: Activations, x: jax.Array) -> jax.Array:
        """The value of all ranks together."""


@dataclass(frozen=True)
class Sum(Statistic):
    """A statistic that is summed, and may be a part of the objective."""

    coefficient: float | None = None
    """The objective has coefficient * the sum of all its values / denominator; None: it is no part of it."""
    per: Denominator = "label"
    """What objective and metrics divide it by, counted over the global batch: the weight of the labels, as the loss is;
    tokens, without padding; or rows."""
    empty = 0.0

    @property
    def in_objective(self) -> bool:
        return self.coefficient is not None

    def both(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + y

    def over_layers(self, x_L: jax.Array) -> jax.Array:
        return jnp.sum(x_L, axis=0)

    def over_ranks(self, doors: Activations, x: jax.Array) -> jax.Array:
        return doors.sum_over(self.reduced, x)


@dataclass(frozen=True)
class Max(Statistic):
    """A statistic whose values' maximum is taken."""

    empty = -float("inf")

    def both(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.maximum(x, y)

    def over_layers(self, x_L: jax.Array) -> jax.Array:
        return jnp.max(x_L, axis=0)

    def over_ranks(self, doors: Activations, x: jax.Array) -> jax.Array:
        return doors.max_over(self.reduced, x)


Statistics: TypeAlias = Mapping[str, Statistic]
"""Declarations by name."""


def as_declared(declared: Statistics, sums: Sums) -> Sums:
    """A layer's values in float32; those that are no part of the objective, without a gradient."""
    assert sums.keys() == declared.keys(), f"a layer declares {sorted(declared)} and gives {sorted(sums)}"
    sums = {name: x.astype(jnp.float32) for name, x in sums.items()}
    return {name: x if declared[name].in_objective else jax.lax.stop_gradient(x) for name, x in sums.items()}


def both(declared: Statistics, x: Sums, y: Sums) -> Sums:
    """The values of two parts of a batch together."""
    return {name: declared[name].both(x[name], y[name]) for name in x}


def of_kinds(kinds: Mapping[str, Statistics]) -> Statistics:
    """The declarations of all kinds of layer together, from those of each by the kind's name.

    Raises: ConfigError if two kinds declare one name differently.
    """
    found: dict[str, Statistic] = {}
    for kind, declared in kinds.items():
        for name, statistic in declared.items():
            if found.setdefault(name, statistic) != statistic:
                first = next(other for other, before in kinds.items() if name in before)
                raise ConfigError(
                    f"layers of {first} declare statistic {name} as {found[name]}, and those of {kind} as {statistic}; "
                    "give it one declaration, or two names."
                )
    return found


def in_order(stacks: Sequence[Sequence[Sums]]) -> Sums:
    """Values of all layers in their own order, with a leading L, from those of each kind of layer, stacked, stack by
    stack and block by block. A kind without a statistic has no row of it.

    Raises: ConfigError if a value's shape differs between kinds.
    """
    found: Sums = {}
    for name in dict.fromkeys(name for kinds in stacks for sums in kinds for name in sums):
        values = [own for kinds in stacks if (own := [sums[name] for sums in kinds if name in sums])]
        if len(shapes := dict.fromkeys(x_L.shape[1:] for own in values for x_L in own)) > 1:
            raise ConfigError(
                f"statistic {name} has values of shapes {' and '.join(map(str, shapes))} in layers of several kinds; "
                "give it one shape, or a name for each."
            )
        rows = [own[0] if len(own) == 1 else jnp.stack(own, 1).reshape(-1, *own[0].shape[1:]) for own in values]
        found[name] = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
    return found


def over_layers(declared: Statistics, sums_L: Sums) -> Sums:
    """The values of all layers together, from theirs, stacked; those per layer stay stacked."""
    return {name: x if declared[name].per_layer else declared[name].over_layers(x) for name, x in sums_L.items()}


def over_ranks(declared: Statistics, sums: Sums, doors: Activations) -> Sums:
    """The values of all ranks together: those that are reduced alike travel as one array."""
    if doors.global_shapes:
        return sums
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name in sums:
        groups[type(declared[name]), doors.layout.splits(declared[name].reduced)].append(name)
    found = {}
    for names in groups.values():
        flat = declared[names[0]].over_ranks(doors, jnp.concatenate([sums[name].reshape(-1) for name in names]))
        for name in names:
            found[name], flat = flat[: sums[name].size].reshape(sums[name].shape), flat[sums[name].size :]
    return found


def seeds_of(declared: Statistics, denominator: Callable[[Denominator], jax.Array]) -> Sums:
    """The cotangent of each value that is a part of the objective, which the step divides by the labels' weight."""
    return {
        name: statistic.coefficient * denominator("label") / denominator(statistic.per)
        for name, statistic in declared.items()
        if isinstance(statistic, Sum) and statistic.coefficient is not None
    }


def added(objective: jax.Array, seeds: Sums, sums: Sums) -> jax.Array:
    """The objective with what the sums add to it."""
    for name, seed in seeds.items():
        objective = objective + seed * jnp.sum(sums[name])
    return objective
