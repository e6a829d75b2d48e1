"""Schedules, optimizers, and what an optimizer is made of: rules, leaves and groups (docs/optimizers.md)."""

from mtx.optim.groups import Group, grouped
from mtx.optim.optimizers import AdamW, Lion, Optimizer, Sgd
from mtx.optim.rules import Given, Leaf, Now, Rule, State, from_optax
from mtx.optim.schedules import (
    Constant,
    Cosine,
    Counter,
    Fraction,
    Linear,
    Progress,
    Samples,
    Schedule,
    Steps,
    Tokens,
)
from mtx.optim.trained import Trained, trained, update
from mtx.optim.whole import each_whole

__all__ = [
    "AdamW",
    "Constant",
    "Cosine",
    "Counter",
    "Fraction",
    "Given",
    "Group",
    "Leaf",
    "Linear",
    "Lion",
    "Now",
    "Optimizer",
    "Progress",
    "Rule",
    "Samples",
    "Schedule",
    "Sgd",
    "State",
    "Steps",
    "Tokens",
    "Trained",
    "each_whole",
    "from_optax",
    "grouped",
    "trained",
    "update",
]
