"""Groups of devices, as compiled programs write them, by the names of mesh axes."""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import combinations

import numpy as np

from mtx.hlo.program import Op, ints, refuse

UNKNOWN_AXES = ("?",)


class MeshAxes:
    """Names sets of device groups by mesh axes."""

    def __init__(self, shape: Mapping[str, int]):
        self.names, self.sizes = tuple(shape), tuple(shape.values())
        self.size = math.prod(self.sizes)
        ids = np.arange(self.size).reshape(self.sizes)
        wide = [i for i, n in enumerate(self.sizes) if n > 1]
        subsets = [axes for n in range(1, len(wide) + 1) for axes in combinations(wide, n)]
        self._axes = {_as_sets(_groups_along(ids, axes)): axes for axes in subsets}

    def of_groups(self, groups: list[list[int]]) -> tuple[str, ...]:
        axes = self._axes.get(_as_sets(groups))
        return UNKNOWN_AXES if axes is None else tuple(self.names[i] for i in axes)

    def of_pairs(self, pairs: list[tuple[int, int]]) -> tuple[str, ...]:
        """The axes along which some source differs from its target."""
        ends = np.array(np.unravel_index(np.array(pairs), self.sizes))
        moved = (ends[..., 0] != ends[..., 1]).any(axis=1)
        return tuple(name for name, m in zip(self.names, moved, strict=True) if m)


def _as_sets(groups: list[list[int]]) -> frozenset[frozenset[int]]:
    return frozenset(map(frozenset, groups))


def _groups_along(ids: np.ndarray, axes: Iterable[int]) -> list[list[int]]:
    axes = tuple(axes)
    rest = [i for i in range(ids.ndim) if i not in axes]
    return ids.transpose(*rest, *axes).reshape(-1, math.prod(ids.shape[i] for i in axes)).tolist()


def device_groups(op: Op, devices: int) -> list[list[int]]:
    """The three forms of `replica_groups`: a mesh with names of its axes, an iota, a list."""
    mesh = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^)]*\))*)\))? \{([^}():]*)\}"
    if match := re.search(mesh, op.attributes):
        return _mesh_groups(*match.groups())
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", op.attributes):
        return _iota(match[2]).reshape(ints(match[1])).tolist()
    if match := re.search(r"replica_groups=\{((?:\{[\d, ]*\}[, ]*)*)\}", op.attributes):
        return [ints(group) for group in re.findall(r"\{([^}]*)\}", match[1])] or [list(range(devices))]
    refuse("replica groups", op)


def _iota(form: str) -> np.ndarray:
    """`[4,2]T(1,0)`: consecutive numbers of shape [4, 2], transposed; also a plain list `0,2,1,3`."""
    if not form.startswith("["):
        return np.array(ints(form))
    shape, _, permutation = form.partition("T")
    ids = np.arange(math.prod(ints(shape))).reshape(ints(shape))
    return ids.transpose(ints(permutation)) if permutation else ids


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """`'a'=2,'b'=4`, `[4,2]T(1,0)` or nothing, `'a','b'` -> groups."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _iota(device_ids or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
    return _groups_along(ids, [list(sizes).index(name) for name in re.findall(r"'([^']+)'", axes)])
