"""What a save costs: how long it keeps the loop, and how much memory it takes on the host.

    JAX_PLATFORMS=cpu python -m benchmarks.checkpoint [SECONDS_BETWEEN_SAVES]

Quickstart trains and saves every so many seconds; then a state of 1.5 GB (GPT-2 124M with Adam's moments) is saved
alone, while a thread watches the process's resident memory.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np

from mtx import config as configs
from mtx.building import build, load_data
from mtx.checkpoint import Checkpoints, Store, named
from mtx.step import Program, TrainState

PAGE = 4096


def program(path: str, *words: str) -> tuple[configs.Config, Program]:
    config = configs.load(path, ["mesh.data=1", *words]).config
    return config, build(config, jax.devices()[:1], 1000)


def state_bytes(state: TrainState) -> int:
    return sum(x.nbytes for x in named(state).values())


def quickstart(seconds: float) -> tuple[int, float, float]:
    """(bytes of the state, worst share of the time between saves that one keeps the loop, seconds of the worst)."""
    config, p = program("configs/quickstart.py")
    loader, step, state = load_data(config), p.compile_train_step(), p.init(0)
    size = config.batch.global_size
    blocked = []
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(p.mesh):
        store, number, last = Store(Path(folder), Checkpoints()), 0, time.perf_counter()
        while len(blocked) < 5:
            rows = loader.train(np.arange(number * size, (number + 1) * size))
            state, metrics = step(state, p.place({k: x[None] for k, x in rows.items()}, p.batch_spec), np.int32(1))
            jax.block_until_ready(metrics)
            number += 1
            if number == 1 or time.perf_counter() - last > seconds:
                last = time.perf_counter()
                store.save(state, number, {})
                blocked.append(time.perf_counter() - last)  # with the wait for the save before, if it still runs
        store.close()
    worst = max(blocked[1:])  # the first compiles the digests
    return state_bytes(state), worst / seconds, worst


def memory() -> tuple[int, float, float, float]:
    """(bytes of the state, peak growth of resident memory over them, seconds kept, seconds to the seal)."""
    _, p = program("configs/gpt2_124m.py")
    state = p.init(0)
    total = state_bytes(state)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), Checkpoints(keep=1, keep_best=0))
        store.save(state, 1, {})
        store.finish()
        before, peak, done = resident(), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.005):
                peak[0] = max(peak[0], resident())

        thread = threading.Thread(target=watch)
        thread.start()
        start = time.perf_counter()
        store.save(state, 2, {})
        kept = time.perf_counter() - start
        store.close()
        sealed = time.perf_counter() - start
        done.set()
        thread.join()
    return total, (peak[0] - before) / total, kept, sealed


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    size, share, worst = quickstart(seconds)
    print("| what | state, MB | measured |\n|---|---|---|")
    print(f"| quickstart saved every {seconds:g} s: the loop is kept | {size / 1e6:.1f} | {worst:.3f} s, {share:.2%} |")
    size, growth, kept, sealed = memory()
    print(f"| GPT-2 124M: peak host memory over the state's | {size / 1e6:.0f} | {growth:.2f} x |")
    print(f"| GPT-2 124M: the loop is kept, until the seal | {size / 1e6:.0f} | {kept:.2f} s, {sealed:.2f} s |")


if __name__ == "__main__":
    main()
