"""What a run says of itself before its first step."""

import math
from pathlib import Path

from data import Loader
from mtx import config as configs
from mtx.config import BatchConfig, Config, schema
from mtx.metrics import peak_flops
from mtx.model import flatten
from mtx.pipeline import Costs, simulate
from mtx.step import Program


def mesh_text(program: Program) -> str:
    """Its axes that split something."""
    return " x ".join(f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"


def banner(
    config: Config, program: Program, loader: Loader, workdir: Path, steps: int, samples: int, verbose: bool
) -> str:
    """What is about to run, in the words of the config. `samples`: of the whole run, what is done of it included."""
    device = program.mesh.devices.flat[0]
    dtype, why = program.compute.name, config.precision.resolve(device)[1]
    weights = flatten(program.model.weights)
    parameters = sum(math.prod(w.shape) for w in flatten(program.model.ordered_weights).values())
    count = configs.microbatches(config, dict(program.mesh.shape))
    tokens = config.batch.global_size * config.batch.sequence_length
    peak = peak_flops(device.device_kind, dtype)
    return "\n".join(
        [
            f"mesh        {mesh_text(program)} ({program.mesh.size} x {device.device_kind}, "
            f"{type(program.partition).__name__}, zero={config.layout.zero_stage}, "
            f"sequence_parallel={bool(config.layout.sequence_axes)})",
            f"precision   compute {dtype} ({why}), parameters {config.precision.params}",
            f"model       {parameters:,} parameters, {config.model.layers} layers of width {config.model.width}"
            + _stacks(config),
            *(f"{part.name:<12}{part.describe()}" for part in program.more_parts if part.describe()),
            f"batch       {tokens:,} tokens: {config.batch.global_size} x {config.batch.sequence_length} "
            f"in {count} microbatch{'es' if count > 1 else ''}",
            *([f"pipeline    {pipeline_text(program, config.batch, count)}"] if program.stages > 1 else []),
            f"data        {loader.corpus.describe()}",
            *_rows(config, loader),
            *_length(config, loader, steps, samples),
            f"run folder  {workdir} ({_saves(config)})",
            "MFU         "
            + (f"of {peak / 1e12:.0f} TFLOP/s" if peak else f"n/a: no peak is known for {device.device_kind}, {dtype}"),
            program.layout.show(weights, program.stored.itemsize, verbose),
        ]
    )


def _stacks(config: Config) -> str:
    """The stacks of a model that names them: `: main 13 x (local, full)`."""
    named = config.model.stacks or ()
    each = [f"{stack.name} {stack.count} x ({', '.join(block.name for block in stack.pattern)})" for stack in named]
    return f": {', '.join(each)}" if each else ""


def _rows(config: Config, loader: Loader) -> list[str]:
    """How rows are made; nothing, if as usual."""
    parts = [config.objective, config.packing, config.curriculum]
    usual = [type(config).__dataclass_fields__[name].default for name in ("objective", "packing", "curriculum")]
    said = [
        schema.show(part, 200).removesuffix("()") for part, default in zip(parts, usual, strict=True) if part != default
    ]
    lines = [f"rows        {', '.join(said)}"] if said else []
    for name, (left_out, whole) in loader.left_out.items():
        source = f" of {name}" if name else ""
        lines.append(f"left out    {left_out:,} of {whole:,} pairs{source} are longer than a row")
    return lines


def _length(config: Config, loader: Loader, steps: int, samples: int) -> list[str]:
    tokens, dropped = samples * config.batch.sequence_length, 0
    if config.length_warmup is not None:
        tokens, dropped = config.length_warmup.tokens(steps, config.batch.global_size)
    epochs = loader.epochs(samples)
    text = f"length      {steps:,} steps, {tokens:,} tokens"
    text += f" ({dropped:,} more dropped by length_warmup)" if dropped else ""
    if len(epochs) == 1:
        (epoch,) = epochs.values()
        return [text if math.isnan(epoch) else f"{text}, {epoch:.2f} epochs"]
    counts = loader.blend.counts(samples)
    shares = [
        f"              {name}: {count:,} samples ({count / max(samples, 1):.2%}), {epochs[name]:.2f} epochs"
        for name, count in zip(epochs, counts.tolist(), strict=True)
    ]
    return [text, *shares]


def pipeline_text(program: Program, batch: BatchConfig, microbatches: int) -> str:
    """The schedule and what it costs, if gradients of inputs, and of weights, take as long as forward."""
    place, remat = program.model.placement, program.model.config.remat
    table = program.schedule.table(place.stages, microbatches, keeps=remat != "stage")
    again = {"full": 1.0, "stage": 2.0}.get(remat, 0.0)  # how often B goes forward
    found = simulate(table, Costs(backward=1.0 + again, layers=place.counts))
    layers = " or ".join(str(n) for n in sorted(set(place.counts)))
    layers = (f"{place.chunks} x " if place.chunks > 1 else "") + layers + (" layer" if layers == "1" else " layers")
    padding = "" if place.is_even else f" (padded to {place.rows})"
    held, what = (max(found.kept), "activations") if table.keeps else (max(found.stash), "inputs")
    each = ", each of one chunk" if place.chunks > 1 else ""
    text = (
        str(program.schedule).removesuffix("()")
        + f", {place.stages} stages of {layers}{padding}, {found.ticks} ticks, idle {found.bubble:.0%} of the time; "
        f"{what} of {held} microbatch{'es' if held != 1 else ''} held{each}"
    )
    if microbatches >= 2 * place.stages:
        return text
    rows = program.layout.size(*program.layout.batch_axes) * microbatches
    more = "larger batch.global_size" if batch.global_size == rows else "smaller batch.micro_size"
    return f"{text}; a {more} makes more microbatches"


def _saves(config: Config) -> str:
    if (rule := config.checkpoints) is None:
        return "checkpoints=None: nothing is saved"
    when = [f"every {rule.every_steps} steps"] * bool(rule.every_steps)
    when += [f"every {rule.every_minutes:g} minutes"] * bool(rule.every_minutes)
    return f"checkpoints {', '.join([*when, 'at the end and on SIGTERM or Ctrl-C'])}"
