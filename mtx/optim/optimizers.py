"""The optimizers that a config may name. Each chooses a rule for every weight; all else is the same in all."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import optax

from mtx.errors import Problem
from mtx.layout import Weight
from mtx.optim.groups import Group
from mtx.optim.rules import Rule, from_optax
from mtx.optim.schedules import Constant, Cosine, Linear


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base of the optimizers: a schedule, decoupled weight decay, clipping, groups of weights."""

    schedule: Constant | Linear | Cosine = Cosine()
    """Learning rate over the run."""
    weight_decay: float = 0.1
    """Decoupled, times the learning rate; gains and biases are not decayed."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; None: never."""
    groups: tuple[Group, ...] | None = None
    """Weights that share a rate and a decay, or are frozen; the first that matches a weight has it. None: all alike."""

    def check(self) -> Iterator[Problem]:
        if self.weight_decay < 0:
            yield "weight_decay", "must not be negative"
        if self.clip_norm is not None and self.clip_norm <= 0:
            yield "clip_norm", "must be positive, or None"

    def rule(self, weight: Weight) -> Rule:
        """The rule that moves a weight, declared without L."""
        raise AssertionError("a subclass defines it")


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, "must be at least 0 and below 1"
        if self.epsilon <= 0:
            yield "epsilon", "must be positive"

    def rule(self, weight: Weight) -> Rule:
        return self._rule

    @cached_property
    def _rule(self) -> Rule:
        return from_optax(optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.epsilon))


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum (Chen et al. 2023)."""

    b1: float = 0.9
    """Weight of the momentum in the update."""
    b2: float = 0.99
    """Decay of the momentum."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, "must be at least 0 and below 1"

    def rule(self, weight: Weight) -> Rule:
        return self._rule

    @cached_property
    def _rule(self) -> Rule:
        return from_optax(optax.scale_by_lion(b1=self.b1, b2=self.b2))


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Gradient descent with momentum."""

    momentum: float = 0.0
    """Decay of the running sum of gradients; 0: none is kept."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate; gains and biases are not decayed."""

    def check(self) -> Iterator[Problem]:
        yield from super().check()
        if not 0 <= self.momentum < 1:
            yield "momentum", "must be at least 0 and below 1"

    def rule(self, weight: Weight) -> Rule:
        return self._rule

    @cached_property
    def _rule(self) -> Rule:
        return from_optax(optax.trace(decay=self.momentum) if self.momentum else optax.identity())
