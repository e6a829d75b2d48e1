"""Digests of losses and weights after three train steps of 16 small programs: what a refactor must leave bit for bit.

    python -m benchmarks.digests --write FILE.json           # before: digests, and the values in FILE.npz beside it
    python -m benchmarks.digests --compare FILE.json         # after: exit code 1 if something differs by more than 1e-6
    python -m benchmarks.digests --compare FILE.json --cost  # also what the compiled train steps cost, then and now

Run on eight simulated CPU devices. Every program is built from a `Config` as a run's is; its batches are random rows.

A tensor is known by its place and shape, "layer 2 float32[64,4,16]" or "ends float32[320,64]", not by its path: weights
are taken with the layers in their own order, whatever stages, chunks or stacks hold them, one layer at a time. Several
tensors of one place and shape are a set: equal digests are paired first, each of the rest with the nearest.
So names, paths, stacking and placement may change, and values may not. Differences are ||a - b|| over
max(||b||, 1e-4 ||all weights b||), as a weight that only rounding has moved from zero has no digits of its own.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

# JAX reads these when it is first imported. The quickest way through LLVM: what is partitioned, fused and allocated
# is decided before it.
from mtx.command import simulate

simulate(8)
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from data import MaskedLm, PrefixLm, PythonDocs, SentencePairs  # noqa: E402
from mtx import config as configs  # noqa: E402
from mtx import hlo  # noqa: E402
from mtx.attention import AttentionConfig  # noqa: E402
from mtx.building import build  # noqa: E402
from mtx.config import BatchConfig, Config  # noqa: E402
from mtx.layers import Gelu, Learned, RMSNorm, Rotary, SwiGLU  # noqa: E402
from mtx.losses import CrossEntropy  # noqa: E402
from mtx.mesh import MeshConfig  # noqa: E402
from mtx.model import Transformer, flatten  # noqa: E402
from mtx.optim import AdamW, Constant, Lion, Sgd, Steps  # noqa: E402
from mtx.step import Program  # noqa: E402

BOUND = 1e-6
STEPS = 3
RATE = Constant(peak_lr=1e-2, warmup=Steps(count=2))
# A large epsilon: with Adam's own, gradients that are zero but for rounding would decide the weights.
ADAM = AdamW(epsilon=1e-3, clip_norm=1.0, schedule=RATE)
GPT = Config(
    model=Transformer(
        vocab_size=300,
        vocab_multiple=64,
        layers=4,
        width=32,
        attention=AttentionConfig(heads=8),
        mlp=Gelu(width=64),
        positions=Learned(length=32),
    ),
    data=PythonDocs(),
    batch=BatchConfig(global_size=16, sequence_length=16),
    optimizer=ADAM,
    loss=CrossEntropy(chunk_tokens=32, z_loss=1e-3),
    mesh=MeshConfig(data=1),
    steps=10,
)
LLAMA = dataclasses.replace(
    GPT,
    model=Transformer(
        vocab_size=300,
        vocab_multiple=64,
        layers=4,
        width=64,
        attention=AttentionConfig(heads=8, kv_heads=4),
        mlp=SwiGLU(width=96),
        norm=RMSNorm(),
        positions=Rotary(),
        bias=False,
        tied_head=False,
        init_scale_residual=False,
    ),
)
BERT = dataclasses.replace(GPT, model=dataclasses.replace(GPT.model, causal=False), objective=MaskedLm())
PAIRS = dataclasses.replace(BERT, model=dataclasses.replace(BERT.model, pairs=True), objective=SentencePairs())
PREFIX = dataclasses.replace(LLAMA, objective=PrefixLm())
LION = dataclasses.replace(LLAMA, optimizer=Lion(schedule=dataclasses.replace(RATE, peak_lr=1e-3)))
SGD = dataclasses.replace(GPT, optimizer=Sgd(momentum=0.9, clip_norm=None, schedule=RATE))

DROPOUT = "model.dropout=0.1 model.attention_dropout=0.1"
MICRO = "batch.micro_size=1"
TIME = "layout.sequence_parallel=true"
PROGRAMS: dict[str, tuple[Config, str]] = {
    "one device": (GPT, f"{DROPOUT} model.remat=selective"),
    "one device, Lion, accumulation": (LION, "batch.micro_size=4"),
    "data, ZeRO 0": (LLAMA, "mesh.data=8"),
    "data, ZeRO 1, Sgd, accumulation": (SGD, f"mesh.data=8 layout.zero=1 {MICRO}"),
    "replica x data, ZeRO 2, accumulation": (LLAMA, f"mesh.replica=2 mesh.data=4 layout.zero=2 {MICRO}"),
    "replica x data, ZeRO 3, full remat": (GPT, f"mesh.replica=2 mesh.data=4 layout.zero=3 model.remat=full {DROPOUT}"),
    "model, sequence parallel": (GPT, f"mesh.model=8 {TIME} {DROPOUT}"),
    "data x model, sequence parallel, ZeRO 3, prefix": (
        PREFIX,
        f"mesh.data=2 mesh.model=4 layout.zero=3 {TIME} model.remat=full batch.micro_size=2",
    ),
    "data x model, ZeRO 1, Compiled, accumulation": (
        LLAMA,
        "mesh.data=4 mesh.model=2 layout.zero=1 partition=Compiled batch.micro_size=2",
    ),
    "replica x data x model, ZeRO 3, Compiled": (
        GPT,
        f"mesh.replica=2 mesh.data=2 mesh.model=2 layout.zero=3 {TIME} partition=Compiled {DROPOUT}",
    ),
    "replica x data x model, ZeRO 2, pairs": (
        PAIRS,
        f"mesh.replica=2 mesh.data=2 mesh.model=2 layout.zero=2 {DROPOUT} batch.micro_size=2",
    ),
    "GPipe, masked": (BERT, f"mesh.pipeline=4 mesh.data=2 pipeline=GPipe {MICRO}"),
    "1F1B x data x model, sequence parallel, ZeRO 1": (
        LLAMA,
        f"mesh.pipeline=2 mesh.data=2 mesh.model=2 layout.zero=1 {TIME} model.remat=full {MICRO}",
    ),
    "1F1B x model, uneven, stage remat, window": (
        LLAMA,
        "mesh.pipeline=4 mesh.model=2 model.layers=6 model.remat=stage model.attention.window=7 "
        "model.attention.softcap=5 model.attention.sinks=true batch.micro_size=2",
    ),
    "Interleaved x data, ZeRO 3": (
        GPT,
        f"mesh.pipeline=2 mesh.data=4 layout.zero=3 pipeline=Interleaved pipeline.chunks=2 {DROPOUT} {MICRO}",
    ),
    "ZeroBubble x data, ZeRO 2": (LLAMA, f"mesh.pipeline=4 mesh.data=2 layout.zero=2 pipeline=ZeroBubble {MICRO}"),
}


class Result(NamedTuple):
    """Results of three steps of a program."""

    scalars: dict[str, list[float]]
    """Losses and gradient norms of the steps; (cross entropy, label weight) of evaluation after them."""
    tensors: dict[str, list[np.ndarray]]
    """The weights after the steps, by place and shape."""
    cost: dict[str, float]


def run(config: Config, words: str, cost: bool) -> Result:
    config = configs.override(config, words.split())
    sizes = [size for axis in dataclasses.fields(config.mesh) if (size := getattr(config.mesh, axis.name)) > 1]
    devices = jax.devices()[: math.prod(sizes)]
    configs.check(config, len(devices))
    program = build(config, devices)
    count = configs.microbatches(config, dict(program.mesh.shape))
    shape = (count, config.batch.global_size // count, config.batch.sequence_length)
    batches = [program.place(rows(config, shape, seed), program.batch_spec) for seed in range(STEPS)]
    state, scalars = program.init(1), defaultdict(list)
    with jax.set_mesh(program.mesh):
        lowered = program.compile_train_step().lower(state, batches[0], np.int32(count))
        started = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
        for batch in batches:
            state, metrics = compiled(state, batch, np.int32(count))
            for name in ("train/loss", "train/grad_norm"):
                scalars[name].append(float(metrics[name]))
                assert math.isfinite(scalars[name][-1]), f"{name} is {scalars[name][-1]}"
        sums = jax.device_get(jax.jit(program.eval_sums)(state.params, batches[0]))
        scalars["evaluation"] = [float(sums["cross_entropy"]), float(sums["labels"])]
    costs = measured(compiled, program, count, seconds) if cost else {}
    return Result(dict(scalars), tensors_of(program, program.ordered(state).params), costs)


def rows(config: Config, shape: tuple[int, int, int], seed: int) -> dict[str, np.ndarray]:
    """Arrays_MBT of packed documents as the config's objective makes them, with ignored targets."""
    random = np.random.default_rng(seed)
    segments = np.sort(random.integers(1, 4, shape), axis=-1).astype(np.int32)
    positions = np.zeros_like(segments)
    for t in range(1, shape[-1]):
        positions[..., t] = np.where(segments[..., t] == segments[..., t - 1], positions[..., t - 1] + 1, 0)
    tokens, targets = random.integers(0, config.model.vocab_size, (2, *shape), np.int32)
    weights = (random.random(shape) > 0.2).astype(np.float32)
    weights[:, 0, 2:] = 0.0  # so that a mean of means over rows or shards is another number
    arrays = {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }
    if config.objective.attention == "prefix":
        arrays["prefix"] = (np.arange(shape[-1]) - positions + random.integers(0, 4, shape)).astype(np.int32)
    if config.model.pairs:
        label = random.integers(0, 2, (*shape[:-1], 1), np.int32)
        arrays |= {"types": segments % 2, "label": np.broadcast_to(label, shape)}
    return arrays


def tensors_of(program: Program, params: Any) -> dict[str, list[np.ndarray]]:
    """Weights in the model's own order, one layer at a time, by place and shape."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    declared = flatten(program.model.ordered_weights)
    for name, x in flatten(params).items():
        array = np.asarray(x)
        parts = {f"layer {i}": x for i, x in enumerate(array)} if declared[name].layers else {"ends": array}
        for place, part in parts.items():
            found[f"{place} {part.dtype}[{','.join(map(str, part.shape))}]"].append(part)
    return {key: sorted(found[key], key=digest) for key in sorted(found)}


def measured(compiled: Any, program: Program, count: int, seconds: float) -> dict[str, float]:
    """Returns the costs of the compiled train step on one device."""
    text = compiled.as_text()
    found = {
        "compile s": round(seconds, 2),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "dot FLOPs": hlo.dot_flops(text, trips=count),
        "instructions": text.count(" = "),
    }
    sent: Counter[str] = Counter()
    for row in hlo.census(text, dict(program.mesh.shape), trips=count):
        sent[row.kind] += row.count * row.times
        sent[f"{row.kind} bytes"] += row.bytes
    return found | dict(sorted(sent.items()))


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def record(result: Result) -> dict[str, Any]:
    """A result as JSON holds it."""
    weights = {key: [digest(x) for x in tensors] for key, tensors in result.tensors.items()}
    return {"scalars": result.scalars, "weights": weights, "cost": result.cost}


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64).ravel()))


def worst(found: list[np.ndarray], wanted: list[np.ndarray], least: float) -> float:
    """The largest relative difference of two sets of tensors, each tensor paired with the nearest that is left."""
    left, value = list(wanted), 0.0
    for x in found:
        differences = [norm(x.astype(np.float64) - y) / max(norm(y), least) for y in left]
        nearest = int(np.argmin(differences))
        value = max(value, differences[nearest])
        del left[nearest]
    return value


def differences(found: Result, wanted: Result) -> tuple[int, float]:
    """(how many numbers and tensors are not the same bits, the largest relative difference)."""
    if found.scalars.keys() != wanted.scalars.keys():
        return len(found.scalars.keys() ^ wanted.scalars.keys()), math.inf
    if {k: len(v) for k, v in found.tensors.items()} != {k: len(v) for k, v in wanted.tensors.items()}:
        return len(found.tensors.keys() ^ wanted.tensors.keys()), math.inf
    count, value = 0, 0.0
    for name, numbers in wanted.scalars.items():
        for a, b in zip(found.scalars[name], numbers, strict=True):
            count += a != b
            value = max(value, abs(a - b) / max(abs(b), 1e-30))
    least = 1e-4 * math.sqrt(sum(norm(x) ** 2 for tensors in wanted.tensors.values() for x in tensors))
    for key, tensors in wanted.tensors.items():
        kept = [set(map(digest, side)) for side in (found.tensors[key], tensors)]
        new = [x for x in found.tensors[key] if digest(x) not in kept[1]]
        old = [x for x in tensors if digest(x) not in kept[0]]
        if len(new) != len(old):  # tensors alike among themselves: pair them all
            new, old = found.tensors[key], tensors
        count += len(new)
        value = max(value, worst(new, old, least) if new else 0.0)
    return count, value


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.digests", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--write", type=Path, metavar="FILE", help="write digests here, and values beside it as .npz")
    target.add_argument("--compare", type=Path, metavar="FILE", help="compare with what --write wrote")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=PROGRAMS, help="programs, by name", default=[*PROGRAMS]
    )
    parser.add_argument("--cost", action="store_true", help="also compile time, temporaries, FLOPs and collectives")
    flags = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are to be true
    before = read(flags.compare) if flags.compare else {}
    results, wrong = {}, 0
    for name in flags.only:
        results[name] = result = run(*PROGRAMS[name], flags.cost)
        said = f"{name}: loss {result.scalars['train/loss'][-1]:.6f}"
        if flags.compare:
            count, value = differences(result, before[name]) if name in before else (0, math.inf)
            said += f", {count} differ, the worst by {value:.1e}" if value else ", the same bits"
            said += " ***" if value > BOUND else ""
            wrong += value > BOUND
        print(said, flush=True)
        then = before[name].cost if name in before else {}
        for what in sorted({*then, *result.cost}) if flags.cost else ():
            print(f"    {what:>24}  {then.get(what, '-'):>12}  {result.cost.get(what, '-'):>12}")
    if flags.write:
        write(flags.write, results)
    return int(wrong > 0)


def write(path: Path, results: dict[str, Result]) -> None:
    versions = configs.versions()
    path.write_text(
        json.dumps({"versions": versions, "programs": {n: record(r) for n, r in results.items()}}, indent=1)
    )
    arrays: dict[str, Any] = {
        f"{name}|{key}|{i}": x
        for name, result in results.items()
        for key, tensors in result.tensors.items()
        for i, x in enumerate(tensors)
    }
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def read(path: Path) -> dict[str, Result]:
    """Raises: SystemExit if the values are not those of the digests."""
    found = json.loads(path.read_text())["programs"]
    tensors: dict[str, dict[str, list[np.ndarray]]] = {name: defaultdict(list) for name in found}
    with np.load(path.with_suffix(".npz")) as arrays:
        for full in arrays.files:
            name, key, _ = full.split("|")
            tensors[name][key].append(arrays[full])
    results = {name: Result(old["scalars"], tensors[name], old["cost"]) for name, old in found.items()}
    if any(record(result)["weights"] != found[name]["weights"] for name, result in results.items()):
        raise SystemExit(f"{path.with_suffix('.npz')} does not hold the values whose digests {path} has.")
    return results


if __name__ == "__main__":
    sys.exit(main())
