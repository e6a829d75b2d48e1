"""What is kept of a layer's forward pass for its backward pass, and which weights a function reads."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtx.pipeline.split import Halves
from mtx.spmd import Params


class Form(NamedTuple):
    """How a layer's vjp is put together again from what was kept of it and the weights."""

    structure: Any
    weight_of: tuple[int | None, ...]
    """Per leaf: which of the weights it is; None if it was kept."""
    kept: list[jax.ShapeDtypeStruct]

    """Shapes of the rest, of one layer."""

    @staticmethod
    def of(vjp: Any, weights: Params) -> "Form":
        leaves, structure = jax.tree.flatten(vjp)
        own = {id(w): i for i, w in enumerate(jax.tree.leaves(weights))}
        return Form(structure, tuple(own.get(id(leaf)) for leaf in leaves), [])

    def without(self, vjp: Any) -> list[jax.Array]:
        return [leaf for leaf, i in zip(jax.tree.leaves(vjp), self.weight_of, strict=True) if i is None]

    def vjp(self, weights: Params, kept: list[jax.Array]) -> Any:
        own, rest = jax.tree.leaves(weights), iter(kept)
        leaves = [next(rest) if i is None else own[i] for i in self.weight_of]
        assert next(rest, None) is None, "another trace of the layer kept more"
        return jax.tree.unflatten(self.structure, leaves)


class Split(NamedTuple):
    """A layer's backward pass, cut in two."""

    halves: Halves
    left: list[jax.ShapeDtypeStruct]
    """What the first half leaves for the second, of one layer."""


class Used(NamedTuple):
    """Which leaves of a tree a function reads."""

    flags: tuple[bool, ...]

    def take(self, tree: Any) -> list[Any]:
        leaves = jax.tree.leaves(tree)
        return [leaf for leaf, used in zip(leaves, self.flags, strict=True) if used]

    def put(self, tree: Any, some: list[Any]) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        rest = iter(some)
        return jax.tree.unflatten(
            structure, [next(rest) if used else leaf for leaf, used in zip(leaves, self.flags, strict=True)]
        )


def used(f: Callable[[Any], Any], tree: Any) -> Used:
    """Which leaves f reads."""
    jaxpr = jax.make_jaxpr(f)(tree).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    return Used(tuple(id(v) in read for v in jaxpr.invars))


def zeros_of(shapes: Any) -> Any:
    """Zeros of these shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
