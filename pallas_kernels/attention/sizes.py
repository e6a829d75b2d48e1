"""Tile sizes per chip and shape: a table measured by `python -m benchmarks.tune_attention`, and defaults beside it."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pallas_kernels.attention.question import Question

TABLE = Path(__file__).with_name("sizes.json")
"""{device kind: [{"backend", "dtype", "head_size", "value_size", "queries", "sizes"}]}"""


def sizes_for(kernel: Any, asked: Question) -> Any:
    """The `Sizes` of a kernel's module: the tuned ones of the nearest shorter length for this chip, dtype and head
    sizes, or its `default_sizes`; those too for dropout and soft-cap, which are not tuned for and need more room.

    A pure function of the question and of a file that is part of the program: every process chooses alike.
    """
    backend = kernel.__name__.rpartition(".")[2]
    wanted = (backend, asked.dtype, asked.head_size, asked.value_size)
    near = [
        entry
        for entry in _table().get(asked.chip.kind, [])
        if wanted == (entry["backend"], entry["dtype"], entry["head_size"], entry["value_size"])
        and entry["queries"] <= asked.queries
    ]
    if not near or asked.dropout or asked.softcap:
        return kernel.default_sizes(asked)
    return kernel.Sizes(**max(near, key=lambda entry: entry["queries"])["sizes"])


@lru_cache
def _table() -> dict[str, list[dict]]:
    return json.loads(TABLE.read_text())
