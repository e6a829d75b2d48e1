"""Measures tile sizes of attention on this chip and writes the quickest into pallas_kernels/attention/sizes.json.

    python -m benchmarks.tune_attention [--backend hopper] [--heads 64 128] [--times 2048 8192]

Forward and backward together, causal, bfloat16 (float32 on a CPU). The table is part of the program: commit it.
"""

import argparse
import dataclasses
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import Shape, inputs, jitted, seconds
from pallas_kernels.attention import BackendName, Chip, Question, cannot, flash_attention, module
from pallas_kernels.attention.sizes import TABLE
from pallas_kernels.masks import Causal


def main() -> None:
    chip = Chip.of(jax.devices()[0])
    cpu = chip.platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    best = {"gpu": "hopper" if chip.capability == 9.0 else "chunked", "tpu": "tpu", "cpu": "chunked"}[chip.platform]
    parser.add_argument("--backend", choices=("chunked", "hopper", "tpu"), default=best)
    parser.add_argument("--heads", type=int, nargs="+", default=[64] if cpu else [64, 128, 256], help="head sizes")
    parser.add_argument("--times", type=int, nargs="+", default=[1024] if cpu else [2048, 8192], help="lengths")
    parser.add_argument("--seconds", type=float, default=0.3, help="per choice")
    flags = parser.parse_args()
    dtype = jnp.float32 if cpu else jnp.bfloat16
    kernel = module(flags.backend)
    table = json.loads(TABLE.read_text())
    print("| head | T | sizes | forward and backward ms |\n|---|---|---|---|")
    for head in flags.heads:
        for T in flags.times:
            heads = max(1, (256 if cpu else 2048) // head)
            shape = Shape("causal", Causal(), T, heads, heads, head, max(1, (1024 if cpu else 16384) // T))
            asked = _question(chip, shape, str(jnp.dtype(dtype)))
            if reason := cannot(flags.backend, asked):
                raise SystemExit(f"error: {flags.backend} cannot be tuned here: {reason}.")
            arrays = inputs(shape, dtype)
            found = {}
            for sizes in kernel.candidates(asked):
                _, both = jitted(partial(_attend, shape, flags.backend, sizes), arrays)
                try:
                    took = seconds(both, flags.seconds)
                except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:  # too large for the chip
                    print(f"| {head} | {T} | {sizes} | failed: {str(error).splitlines()[0][:60]} |", flush=True)
                    continue
                found[sizes] = took
                print(f"| {head} | {T} | {sizes} | {1e3 * took:.3f} |", flush=True)
            if not found:
                continue
            entry = {
                "backend": flags.backend,
                "dtype": asked.dtype,
                "head_size": head,
                "value_size": head,
                "queries": T,
                "sizes": dataclasses.asdict(min(found, key=found.__getitem__)),
            }
            same = {name: value for name, value in entry.items() if name != "sizes"}
            others = [old for old in table.get(chip.kind, []) if {**old, **same} != old]
            table[chip.kind] = sorted([*others, entry], key=lambda e: (e["backend"], e["head_size"], e["queries"]))
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _attend(shape: Shape, backend: BackendName, sizes: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return flash_attention(q, k, v, shape.bound(), backend=backend, sizes=sizes)


def _question(chip: Chip, shape: Shape, dtype: str) -> Question:
    return Question(
        chip=chip,
        dtype=dtype,
        mask=shape.mask,
        rows=shape.rows,
        queries=shape.time,
        keys=shape.time,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        value_size=shape.head_size,
    )


if __name__ == "__main__":
    main()
