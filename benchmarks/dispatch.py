"""Host time per step: how long `train_step` takes to return, and how often it compiles.

    JAX_PLATFORMS=cpu python -m benchmarks.dispatch

24 layers of width 16 on one device, so that the device's own work is small beside what the host does.
"""

import statistics
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mtx import config as configs
from mtx.building import build
from mtx.model import Batch

WORDS = [
    *("mesh.data=1", "model.layers=24", "model.width=16", "model.mlp.width=64", "batch.global_size=8"),
    *("batch.sequence_length=8", "loss.chunk_tokens=64", "layout.zero=1"),
]


def main() -> None:
    loaded = configs.load("configs/quickstart.py", WORDS)
    program = build(loaded.config, jax.devices()[:1])
    ones = {name: np.ones((1, 8, 8), np.float32 if name == "weights" else np.int32) for name in Batch._fields[:5]}
    batch = Batch(**jax.device_put(ones, program.sharding(P())))
    state, step = program.init(0), program.compile_train_step()
    seconds = []
    with jax.set_mesh(program.mesh):
        for _ in range(120):
            start = time.perf_counter()
            state, metrics = step(state, batch, np.int32(1))
            seconds.append(time.perf_counter() - start)
            jax.block_until_ready(metrics)
    leaves = len(jax.tree.leaves(state))
    compiled = step._cache_size()  # pyrefly: ignore[missing-attribute]
    print("| layers | arrays in the state | median ms to return | compiled |\n|---|---|---|---|")
    print(f"| 24 | {leaves} | {1e3 * statistics.median(seconds[20:]):.2f} | {compiled} x |")


if __name__ == "__main__":
    main()
