"""The train state: weights, counters, and named parts that declare what they hold and how a step changes it.

The optimizer's state is a part, and an average of the weights; a new one is a subclass of `Part`.
"""

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mtx.errors import Problem
from mtx.layout import BoundLayout, Placement
from mtx.model import flatten
from mtx.optim import Counter, Given, Now, Rule, Trained, each_whole, update
from mtx.spmd import Params, map_weights


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the seed that it never does.

    As a pytree, and so in checkpoints, parts stand beside the other fields: `params/...`, `moments/...`, `step`.
    """

    step: jax.Array
    params: Params
    samples: Counter
    tokens: Counter
    skipped: jax.Array
    """Steps whose gradients were not finite; they moved the counters, and no weights."""
    seed: jax.Array
    parts: dict[str, Params]
    """Arrays of each `Part` of the program, by its name."""

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """The fields, with the parts in the order of their names instead of `parts`; the names."""
        names = tuple(sorted(self.parts))
        own = (self.step, self.params, self.samples, self.tokens, self.skipped, self.seed)
        return (*own, *(self.parts[name] for name in names)), names

    def tree_flatten_with_keys(self) -> tuple[list[tuple[jax.tree_util.GetAttrKey, Any]], tuple[str, ...]]:
        """The same, each with its name."""
        trees, names = self.tree_flatten()
        keys = ("step", "params", "samples", "tokens", "skipped", "seed", *names)
        return [(jax.tree_util.GetAttrKey(key), tree) for key, tree in zip(keys, trees, strict=True)], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], trees: Any) -> "TrainState":
        """The inverse."""
        step, params, samples, tokens, skipped, seed, *parts = trees
        return cls(step, params, samples, tokens, skipped, seed, dict(zip(names, parts, strict=True)))


class Update(NamedTuple):
    """What parts see of a step. All trees hold the weights that are trained, and no others."""

    gradients: Params
    """float32, of the mean loss, clipped."""
    params: Params
    """The weights, as the parts before this one have left them."""
    updates: jax.Array
    """int32: how often the weights have been updated before; steps that were skipped do not count."""
    rate: jax.Array
    """float32: the schedule's learning rate."""


class Part(abc.ABC):
    """One named part of the train state. All trees of weights that it is given hold those that are trained alone."""

    name: ClassVar[str]
    """In the state, and the first part of its arrays' names in checkpoints."""

    @abc.abstractmethod
    def leaves(self, weights: Params) -> Params:
        """A `Weight` for each array, in nested dicts: its shape, how it is split and the order of its layers follow."""

    @abc.abstractmethod
    def start(self, params: Params, seed: jax.Array) -> Params:
        """The arrays of a new run, or of one whose checkpoint lacks the part, from the weights as they are stored."""

    @abc.abstractmethod
    def step(self, now: Update, old: Params) -> tuple[Params, Params]:
        """The weights and the part's arrays after a step; a skipped one has `skipped` instead, and the old weights."""

    def skipped(self, old: Params) -> Params:
        """The part's arrays after a step whose gradients were not finite."""
        return old

    @property
    def is_evaluated(self) -> bool:
        """Whether evaluation and generation read other weights than training (`evaluated`)."""
        return False

    def evaluated(self, params: Params, arrays: Params) -> Params:
        """The weights that evaluation and generation read, of the dtypes of `params`."""
        return params

    def describe(self) -> str:
        """Returns what a run says of the part at its start; nothing if empty."""
        return ""


@dataclass(frozen=True)
class OptimizerState(Part):
    """What the rules of an optimizer keep of each weight; its step is the one that moves the weights."""

    trained: Params
    """A `Trained` for each weight."""
    mesh: Mesh
    layout: BoundLayout
    placement: Placement
    name = "moments"

    def leaves(self, weights: Params) -> Params:
        return map_weights(lambda t: {name: leaf for name, (leaf, _) in t.leaves.items()}, self.trained)

    def start(self, params: Params, seed: jax.Array) -> Params:
        return map_weights(Trained.start, self.trained, params)

    def step(self, now: Update, old: Params) -> tuple[Params, Params]:
        def given(t: Trained, g: jax.Array, x: jax.Array, old: dict[str, jax.Array]) -> Given:
            whole = partial(each_whole, self.mesh, self.layout, self.placement, t.weight)
            return Given(t.weight.layer, Now(now.updates, now.rate * t.rate, t.decay, whole), g, x, old)

        each = map_weights(given, self.trained, now.gradients, now.params, old)
        return update(self.placement, flatten(self.trained), flatten(each))

    @property
    def is_evaluated(self) -> bool:
        return any(type(t.rule).evaluated is not Rule.evaluated for t in flatten(self.trained).values())

    def evaluated(self, params: Params, arrays: Params) -> Params:
        return self._evaluated(params, arrays)

    @cached_property
    def _evaluated(self) -> Callable[[Params, Params], Params]:
        def run(params: Params, arrays: Params) -> Params:
            def one(t: Trained, x: jax.Array, state: dict[str, jax.Array]) -> jax.Array:
                return t.evaluated(self.placement, x, state)

            return map_weights(one, self.trained, params, arrays)

        def sharding(t: Trained) -> NamedSharding:
            return NamedSharding(self.mesh, self.layout.spec(t.weight, "weights"))

        return jax.jit(run, out_shardings=map_weights(sharding, self.trained))


@dataclass(frozen=True, kw_only=True)
class Ema(Part):
    """An exponential moving average of the weights that are trained, in float32."""

    decay: float = 0.999
    """Share of the old average that a step keeps."""
    warmup_steps: int = 10
    """The n-th update of a run keeps at most n / (n + warmup_steps), which soon forgets the initial weights; 0: always
    the decay."""
    evaluate: bool = True
    """Evaluation, samples, eval and generate read the average; False: the weights that are trained."""
    name = "ema"

    def check(self) -> Iterator[Problem]:
        if not 0 <= self.decay < 1:
            yield "decay", "must be at least 0 and below 1, such as 0.999"
        if self.warmup_steps < 0:
            yield "warmup_steps", "must be at least 0; 0: always the decay"

    def leaves(self, weights: Params) -> Params:
        return weights

    def start(self, params: Params, seed: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def step(self, now: Update, old: Params) -> tuple[Params, Params]:
        n = (now.updates + 1).astype(jnp.float32)
        # The new weights' share, not 1 - min(...), which has three digits left at a decay of 0.9999.
        share = jnp.maximum(1 - self.decay, self.warmup_steps / (n + self.warmup_steps))
        return now.params, jax.tree.map(lambda a, x: a + share * (x.astype(jnp.float32) - a), old, now.params)

    @property
    def is_evaluated(self) -> bool:
        return self.evaluate

    def evaluated(self, params: Params, arrays: Params) -> Params:
        return jax.tree.map(lambda x, a: a.astype(x.dtype), params, arrays)  # no copy where they are float32

    def describe(self) -> str:
        other = "the average" if not self.evaluate else "the weights that are trained"
        read = "it" if self.evaluate else "the weights that are trained"
        value = str(not self.evaluate).lower()
        return (
            f"average of the weights, decay {self.decay:g}; evaluation and generation read {read} "
            f"(ema.evaluate={value}: {other})"
        )
