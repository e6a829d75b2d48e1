"""Cases: the checks and measurements that make up a part of the day."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pallas_kernels.attention import Chip

Row = dict[str, Any]
"""Columns of a result, in the order of the table. `notes`: lines below the table; `failed`: why the case is wrong."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement or check."""

    name: str
    run: Callable[[], Row]
    """Returns the result. An exception is a failure of this case alone, and ends its process."""
    expected_s: float
    """Seconds on an H200, compiling included. The case waits for a second round where less time is left."""
    limit_s: float | None = None
    """Seconds after which its process is ended; None: four times the expected ones, and at least 45."""
    form: str | None = None
    """The kernel form that this case decides about: if it fails, later cases do without that form."""
    process: str = ""
    """Cases that name different processes never share one, as two frameworks that each keep the device's memory."""


@dataclass(frozen=True, kw_only=True)
class Day:
    """The machine and the earlier results, from which a part lists its cases."""

    chip: Chip
    """The first device."""
    broken: frozenset[str] = frozenset()
    """Kernel forms that failed a check earlier in the day."""
    results: Mapping[str, Row] = field(default_factory=dict)
    """Rows of this part's cases that ran in an earlier process."""

    @property
    def is_toy(self) -> bool:
        """True where there is only a CPU, on which all parts run at toy sizes."""
        return self.chip.platform == "cpu"


@dataclass(frozen=True, kw_only=True)
class LeftOut(Exception):
    """Raised by a case, or listed by a part instead of one, that this machine or installation cannot run."""

    name: str
    why: str


def form_of(backend: str, head_size: int, value_size: int | None = None, variant: str = "") -> str:
    """Name of a kernel form, such as `hopper 128`, `hopper 192/128` or `hopper 128 fused`."""
    heads = f"{head_size}" if value_size in (None, head_size) else f"{head_size}/{value_size}"
    return " ".join(filter(None, (backend, heads, variant)))


def is_installed(module: str) -> bool:
    """Returns whether a package can be imported here."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
