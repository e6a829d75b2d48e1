"""What a train step sends, by both lowerings, as the CPU, CUDA and TPU compilers made it.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.census [backend ...]

Needs the aot extra for all but `cpu`. Backends: cpu, cuda (8 H200), v5e:2x4, v5p:2x2x2, v6e:2x4. Compiled for
devices that are not there: bytes, not speed. The model and the formulas are those of tests/test_census.py.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import test_census as census

from mtx import hlo
from mtx.spmd import Compiled, Manual

CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "data 8, zero 0": ((1, 8, 1), {}),
    "data 8, zero 1": ((1, 8, 1), {"zero": 1}),
    "data 8, zero 2": ((1, 8, 1), {"zero": 2}),
    "data 8, zero 3": ((1, 8, 1), {"zero": 3}),
    "model 8": ((1, 1, 8), {}),
    "model 8, sequence parallel": ((1, 1, 8), {"sequence_parallel": True}),
    "data 2 x model 4, zero 1, sequence parallel": ((1, 2, 4), {"zero": 1, "sequence_parallel": True}),
}
SHORT = {"all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS", "all-to-all": "A2A"}


def summary(rows: list[hlo.Row]) -> str:
    """MB of a step by kind, axes and dtype; what is under 0.01 MB is left out."""
    total: dict[tuple[str, str, str], int] = defaultdict(int)
    for row in rows:
        total[SHORT.get(row.kind, row.kind), "+".join(row.axes), row.dtype] += row.bytes
    parts = [
        f"{kind} {axes} {dtype} {size / 1e6:.2f}" for (kind, axes, dtype), size in sorted(total.items()) if size >= 1e4
    ]
    return "; ".join(parts) or "-"


def main(backends: list[str]) -> None:
    print("| backend | case | lowering | MB per step of 4 microbatches |\n|---|---|---|---|")
    for backend in backends:
        for name, (mesh, layout) in CASES.items():
            for partition in (Manual(), Compiled()):
                p, program = census.compiled(backend, mesh, partition=partition, **layout)
                rows = hlo.census(program.as_text() or "", dict(p.mesh.shape), trips=census.M)
                print(f"| {backend} | {name} | {type(partition).__name__} | {summary(rows)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["cpu", "cuda", "v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
