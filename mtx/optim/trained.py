"""The weights that training changes, each with its rule, its group's rate and decay, and its state's declarations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from mtx.layout import Placement, Weight
from mtx.model import flatten, unflatten
from mtx.optim.groups import grouped
from mtx.optim.optimizers import Optimizer
from mtx.optim.rules import Given, Leaf, Rule, State
from mtx.optim.whole import where_layers
from mtx.spmd import Params


@dataclass(frozen=True)
class Trained:
    """One weight that training changes, and how."""

    weight: Weight
    rule: Rule
    rate: float
    """Factor of its group on the schedule's learning rate."""
    decay: float
    """Weight decay of its group; 0 if its role is not decayed."""
    leaves: Mapping[str, tuple[Weight, Any]]
    """Declaration and dtype of each array of its state."""

    def start(self, x: jax.Array) -> State:
        """The state of a new run."""
        start = partial(self.rule.start, self.weight.layer)
        return jax.vmap(start)(x) if self.weight.layers else start(x)

    def evaluated(self, placement: Placement, x: jax.Array, state: State) -> jax.Array:
        """What evaluation reads instead of x, as `update` does it."""
        evaluated = partial(self.rule.evaluated, self.weight.layer)
        if self.rule.elementwise or not self.weight.layers:
            return evaluated(x, state).astype(x.dtype)
        return where_layers(placement, jax.vmap(evaluated)(x, state), x).astype(x.dtype)


def trained(optimizer: Optimizer, weights: Params) -> Params:
    """A nested dict like `weights`, without those that are frozen. Raises: ConfigError; see `grouped`."""
    flat, found = flatten(weights), {}
    for name, group in grouped(optimizer.groups, flat).items():
        if group.frozen:
            continue
        weight = flat[name]
        decay = optimizer.weight_decay if group.weight_decay is None else group.weight_decay
        rule = optimizer.rule(weight.layer)
        leaves = {key: (_declared(weight, leaf), leaf.dtype) for key, leaf in rule.state(weight.layer).items()}
        found[name] = Trained(weight, rule, group.rate, decay if weight.treatment.decays else 0.0, leaves)
    return unflatten(found)


def update(placement: Placement, trained: Mapping[str, Trained], given: Mapping[str, Given]) -> tuple[Params, Params]:
    """(new values, new states), as nested dicts, of weights by name.

    Rules that are not elementwise see one layer at a time; rows of the placement that hold none stay as they are.
    """
    found = {}
    for rule in {id(t.rule): t.rule for t in trained.values()}.values():
        own = {name: given[name] for name, t in trained.items() if t.rule is rule}
        if rule.elementwise:
            found |= rule.update_all(own)
            continue
        for name, one in own.items():
            layer = partial(rule.update, one.weight, one.now)
            if trained[name].weight.layers:
                new = jax.vmap(layer)(one.g, one.x, one.state)
                found[name] = jax.tree.map(partial(where_layers, placement), new, (one.x, one.state))
            else:
                found[name] = layer(one.g, one.x, one.state)
    return unflatten({name: x for name, (x, _) in found.items()}), unflatten({n: s for n, (_, s) in found.items()})


def _declared(weight: Weight, leaf: Leaf) -> Weight:
    """The declaration of a leaf, with the weight's L."""
    assert set(leaf.dims) <= set(weight.layer.dims), f"{leaf} has a dimension that {weight} lacks"
    n = weight.layers
    return replace(weight, dims=weight.dims[:n] + leaf.dims, shape=weight.shape[:n] + leaf.shape, of=weight)
