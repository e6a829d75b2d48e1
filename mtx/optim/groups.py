"""Groups: which rate and decay a weight has, and whether it is trained at all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mtx.errors import ConfigError, Problem
from mtx.layout import Role, Weight


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights that share a rate and a decay; Group() has all that no group before it has."""

    roles: tuple[Role, ...] = ()
    """Roles of its weights; none: every role."""
    names: str = "*"
    """Pattern of their names, such as stacks/main/block/mlp/*, where * stands for any part, slashes included."""
    rate: float = 1.0
    """Times the schedule's learning rate."""
    weight_decay: float | None = None
    """Instead of the optimizer's; gains and biases are not decayed all the same. None: the optimizer's."""
    frozen: bool = False
    """They never change: no gradient of them is computed, and no optimizer state kept."""

    def check(self) -> Iterator[Problem]:
        if self.rate <= 0:
            yield "rate", "must be positive; frozen=True is what never changes a weight"
        if self.weight_decay is not None and self.weight_decay < 0:
            yield "weight_decay", "must not be negative"
        if self.frozen and (self.rate != 1.0 or self.weight_decay is not None):
            yield "frozen", "leaves rate and weight_decay without effect; drop them"

    def matches(self, name: str, weight: Weight) -> bool:
        return (not self.roles or weight.role in self.roles) and fnmatchcase(name, self.names)


def grouped(groups: Sequence[Group] | None, weights: Mapping[str, Weight]) -> dict[str, Group]:
    """The group of each weight that its model lets train, by name: the first that matches it; None is one of all.

    Raises: ConfigError if a weight has no group, a group no weight, or nothing is left to train.
    """
    groups = (Group(),) if groups is None else groups
    weights, found = {name: weight for name, weight in weights.items() if weight.trainable}, {}
    for name, weight in weights.items():
        group = next((i for i, group in enumerate(groups) if group.matches(name, weight)), None)
        if group is None:
            raise ConfigError(
                f"optimizer.groups has no group for {name} ({weight.role}); end with Group() for all others."
            )
        found[name] = group
    for i, group in enumerate(groups):
        if i in found.values():
            continue
        said = " ".join(
            [f"roles={','.join(group.roles)}"] * bool(group.roles) + [f"names={group.names}"] * (group.names != "*")
        )
        here = f"optimizer.groups[{i}] ({said or 'every weight'})"
        if taken := [name for name, weight in weights.items() if group.matches(name, weight)]:
            raise ConfigError(
                f"{here} is left without a weight: group {found[taken[0]]} has {taken[0]} before it; move it up, or "
                "drop it."
            )
        roles = ", ".join(sorted({weight.role for weight in weights.values()}))
        raise ConfigError(
            f"{here} matches no weight; there are the roles {roles}, and names such as {next(reversed(weights))}."
        )
    if all(groups[i].frozen for i in found.values()):
        raise ConfigError("optimizer.groups freezes every weight; leave one to train.")
    return {name: groups[i] for name, i in found.items()}
