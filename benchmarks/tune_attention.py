"""Measures tile sizes of attention on this chip and writes the quickest into pallas_kernels/attention/sizes.json.

    python -m benchmarks.tune_attention [--backend hopper] [--heads 64 128] [--times 2048 8192]

Forward and backward together, causal, bfloat16 (float32 on a CPU). One field of the sizes after another takes its best
value. The table is part of the program: commit it.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import Shape, inputs, jitted, seconds
from pallas_kernels.attention import BackendName, Chip, Question, cannot, flash_attention, module
from pallas_kernels.attention.sizes import TABLE
from pallas_kernels.masks import Causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One chip, kernel and shape that tile sizes are measured for."""

    backend: BackendName
    chip: Chip
    dtype: str
    head_size: int
    time: int

    @property
    def shape(self) -> Shape:
        """16,384 tokens of 2,048 features; 1,024 of 256 on a CPU."""
        tokens, features = (1024, 256) if self.chip.platform == "cpu" else (16384, 2048)
        heads = max(1, features // self.head_size)
        return Shape("causal", Causal(), self.time, heads, heads, self.head_size, max(1, tokens // self.time))

    @property
    def question(self) -> Question:
        shape = self.shape
        return Question(
            chip=self.chip,
            dtype=self.dtype,
            mask=shape.mask,
            rows=shape.rows,
            queries=shape.time,
            keys=shape.time,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_size=shape.head_size,
            value_size=shape.head_size,
        )

    def seconds(self, sizes: Any, budget_s: float) -> float:
        """Seconds of a forward and a backward pass. Raises what the compiler does if the chip cannot hold the tiles."""
        shape = self.shape

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return flash_attention(q, k, v, shape.bound(), backend=self.backend, sizes=sizes)

        return seconds(jitted(attend, inputs(shape, jnp.dtype(self.dtype)))[1], budget_s)

    def entry(self, sizes: Any) -> dict[str, Any]:
        """An entry of sizes.json."""
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "head_size": self.head_size,
            "value_size": self.head_size,
            "queries": self.time,
            "sizes": dataclasses.asdict(sizes),
        }


def search(target: Target, found: dict[Any, float]) -> Iterator[Any]:
    """Yields the sizes to measure next; the caller puts the seconds of those that run into `found`.

    Starts at the kernel's defaults, and goes through the fields in which its candidates differ.
    """
    kernel = module(target.backend)
    candidates, best = kernel.candidates(target.question), kernel.default_sizes(target.question)
    yield best
    tried = {best}
    for field in dataclasses.fields(best):
        for value in sorted({getattr(sizes, field.name) for sizes in candidates}, key=str):
            sizes = dataclasses.replace(best, **{field.name: value})
            if sizes not in tried and len({getattr(c, field.name) for c in candidates}) > 1:
                tried.add(sizes)
                yield sizes
        best = min(found, key=found.__getitem__, default=best)


def main() -> None:
    chip = Chip.of(jax.devices()[0])
    cpu = chip.platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("chunked", "hopper", "tpu"), default=own_backend(chip))
    parser.add_argument("--heads", type=int, nargs="+", default=[64] if cpu else [64, 128, 256], help="head sizes")
    parser.add_argument("--times", type=int, nargs="+", default=[1024] if cpu else [2048, 8192], help="lengths")
    parser.add_argument("--seconds", type=float, default=0.3, help="per choice")
    flags = parser.parse_args()
    table = json.loads(TABLE.read_text())
    print("| head | T | sizes | forward and backward ms |\n|---|---|---|---|")
    for head in flags.heads:
        for T in flags.times:
            dtype = "float32" if cpu else "bfloat16"
            target = Target(backend=flags.backend, chip=chip, dtype=dtype, head_size=head, time=T)
            if reason := cannot(flags.backend, target.question):
                raise SystemExit(f"error: {flags.backend} cannot be tuned here: {reason}.")
            found: dict[Any, float] = {}
            for sizes in search(target, found):
                try:
                    found[sizes] = target.seconds(sizes, flags.seconds)
                except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:  # too large for the chip
                    print(f"| {head} | {T} | {sizes} | failed: {str(error).splitlines()[0][:60]} |", flush=True)
                    continue
                print(f"| {head} | {T} | {sizes} | {1e3 * found[sizes]:.3f} |", flush=True)
            if not found:
                continue
            entry = target.entry(min(found, key=found.__getitem__))
            same = {name: value for name, value in entry.items() if name != "sizes"}
            others = [old for old in table.get(chip.kind, []) if {**old, **same} != old]
            table[chip.kind] = sorted([*others, entry], key=lambda e: (e["backend"], e["head_size"], e["queries"]))
            TABLE.write_text(json.dumps(table, indent=1) + "\n")


def own_backend(chip: Chip) -> BackendName:
    """Our own kernel for a chip."""
    best: dict[str, BackendName] = {"tpu": "tpu", "gpu": "hopper" if chip.capability == 9.0 else "chunked"}
    return best.get(chip.platform, "chunked")


if __name__ == "__main__":
    main()
