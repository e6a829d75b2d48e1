"""Rules: how gradients move weights. A rule reads a weight's declaration, and declares its state in the same way."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtx.layout import Weight

State = dict[str, jax.Array]


@dataclass(frozen=True)
class Leaf:
    """One array of a weight's state, declared by the weight's letters.

    It is stacked over layers where the weight is, though no rule sees that; how it is split over the mesh, the order of
    its layers and its name in checkpoints follow from the weight's.
    """

    dims: str
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    @staticmethod
    def like(weight: Weight, dtype: Any = jnp.float32) -> "Leaf":
        return Leaf(weight.dims, weight.shape, dtype)

    @staticmethod
    def without(weight: Weight, letters: str, dtype: Any = jnp.float32) -> "Leaf":
        """The weight's shape without some of its dimensions; without all of them, a scalar."""
        assert set(letters) <= set(weight.dims), (letters, weight)
        sizes = {letter: n for letter, n in zip(weight.dims, weight.shape, strict=True) if letter not in letters}
        return Leaf("".join(sizes), tuple(sizes.values()), dtype)

    @staticmethod
    def scalar(weight: Weight, dtype: Any = jnp.float32) -> "Leaf":
        return Leaf.without(weight, weight.dims, dtype)

    @staticmethod
    def blocks(weight: Weight, letter: str, size: int, dtype: Any = jnp.float32) -> "Leaf":
        """An element for each block of `size` along one dimension, which it must divide."""
        i = weight.dims.index(letter)
        assert weight.shape[i] % size == 0, (letter, size, weight)
        return Leaf(weight.dims, (*weight.shape[:i], weight.shape[i] // size, *weight.shape[i + 1 :]), dtype)


@dataclass(frozen=True)
class Now:
    """Facts of the step that a rule may use, besides its arrays."""

    updates: jax.Array
    """int32: how often the weights have been updated before; steps that were skipped do not count."""
    rate: jax.Array
    """float32: the learning rate of the weight's group."""
    decay: float
    """Decoupled weight decay of the weight's group; 0 for gains and biases."""
    whole: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]
    """`now.whole(f, u)`, for elementwise rules: f of each layer's u, which has the weight's shape, unsplit."""

    def descend(self, x: jax.Array, direction: jax.Array) -> jax.Array:
        """x after a step against a direction, with decoupled weight decay."""
        if self.decay:
            direction = direction + self.decay * x
        return x - self.rate * direction


class Given(NamedTuple):
    """Inputs of a rule for one weight."""

    weight: Weight
    now: Now
    g: jax.Array
    x: jax.Array
    state: State


class Rule(abc.ABC):
    """How a gradient moves one weight. Methods get the weight's declaration without L, and see one layer at a time."""

    elementwise: ClassVar[bool] = False
    """No element of a result depends on another's, but through `now.whole`: arrays may be stacked and split then."""

    @abc.abstractmethod
    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        """The state's arrays by name."""

    def start(self, weight: Weight, x: jax.Array) -> State:
        """The state of a new run."""
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in self.state(weight).items()}

    @abc.abstractmethod
    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """The weight's new value and state; g is the float32 gradient, clipped."""

    def update_all(self, given: Mapping[str, Given]) -> dict[str, tuple[jax.Array, State]]:
        """`update` of all weights of an elementwise rule, by name, which may compute once what they share."""
        return {name: self.update(*one) for name, one in given.items()}

    def evaluated(self, weight: Weight, x: jax.Array, state: State) -> jax.Array:
        """Returns what evaluation and generation read instead of x."""
        return x


def from_optax(transformation: optax.GradientTransformation) -> Rule:
    """The rule that descends along what an elementwise optax transformation makes of the gradient.

    Its state may have arrays like the weight, and counts of updates, of which none is stored: `Now` has the number.
    Raises: ValueError if it is not elementwise, or keeps anything else.
    """
    probe = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    state = jax.eval_shape(transformation.init, probe)
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    for name, leaf in named.items():
        is_count = leaf.shape == () and leaf.dtype == jnp.int32 and name.split(".")[-1] == "count"
        if leaf.shape != probe.shape and not is_count:
            raise ValueError(
                f"optax keeps {name} of shape {leaf.shape} for a weight of shape {probe.shape}, which is neither like "
                "the weight nor a count; write a Rule that declares it."
            )
    jaxpr = jax.make_jaxpr(transformation.update)(probe, state, probe).jaxpr
    if (primitive := _mixing(jaxpr, probe.shape)) is not None:
        raise ValueError(f"the optax transformation is not elementwise ({primitive}); write a Rule that sees a layer.")
    return _FromOptax(
        transformation, structure, {name: leaf.dtype if leaf.shape else None for name, leaf in named.items()}
    )


@dataclass(frozen=True)
class _FromOptax(Rule):
    transformation: optax.GradientTransformation
    structure: Any
    """Tree of optax's state for one array."""
    dtypes: Mapping[str, Any]
    """dtype of each leaf of that tree, in order; None for a count."""
    elementwise = True

    def state(self, weight: Weight) -> Mapping[str, Leaf]:
        return {name: Leaf.like(weight, dtype) for name, dtype in self.dtypes.items() if dtype is not None}

    def update(self, weight: Weight, now: Now, g: jax.Array, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        return self.update_all({"": Given(weight, now, g, x, state)})[""]

    def update_all(self, given: Mapping[str, Given]) -> dict[str, tuple[jax.Array, State]]:
        """In one call of optax for all weights, so that what depends on the count alone is computed once."""
        updates = next(iter(given.values())).now.updates
        old = [
            updates if dtype is None else {key: one.state[name] for key, one in given.items()}
            for name, dtype in self.dtypes.items()
        ]
        g, x = {key: one.g for key, one in given.items()}, {key: one.x for key, one in given.items()}
        found: Any = self.transformation.update(g, self.structure.unflatten(old), x)
        directions, state = found
        new = dict(zip(self.dtypes, self.structure.flatten_up_to(state), strict=True))
        return {
            key: (one.now.descend(one.x, directions[key]), {name: new[name][key] for name in one.state})
            for key, one in given.items()
        }


_MIX = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev")
"""Primitives whose result has its operand's shape, and whose elements depend on one another."""


def _mixing(jaxpr: Any, shape: tuple[int, ...]) -> str | None:
    """The first primitive that may let elements of arrays of this shape depend on one another."""
    for eqn in jaxpr.eqns:
        inner = [x for value in eqn.params.values() for x in (value if isinstance(value, tuple | list) else (value,))]
        inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        if inner:
            if found := next(filter(None, (_mixing(x, shape) for x in inner)), None):
                return found
            continue
        given, made = ({v.aval.shape for v in vs} for vs in (eqn.invars, eqn.outvars))
        if not given | made <= {(), shape} or (shape in given and () in made) or eqn.primitive.name in _MIX:
            return eqn.primitive.name
    return None
