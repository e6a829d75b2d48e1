"""From a config to what runs: the program, the data, and the words for both."""

import dataclasses
import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from data import Loader
from mtx import config as configs
from mtx import mesh as meshes
from mtx.attention import choose_backend
from mtx.config import BatchConfig, Config, Loaded, schema
from mtx.errors import DataError
from mtx.layout import BoundLayout, Placement
from mtx.metrics import peak_flops
from mtx.model import Model, flatten
from mtx.pipeline import Costs, simulate
from mtx.step import Program
from pallas_kernels.attention import Chip

log = logging.getLogger("mtx")
ROOT = Path(__file__).resolve().parents[2]


def build(config: Config, devices: Sequence[jax.Device], steps: int | None = None) -> Program:
    """The program that a config describes, on these devices (present or not); `steps` is the run's length."""
    mesh = meshes.make(config.mesh, devices)
    layout = BoundLayout.of(config.layout, dict(mesh.shape))
    stages = mesh.shape["pipeline"]
    chunks = config.pipeline.per_stage() if stages > 1 else 1
    model = Model(config.model, Placement.even(config.model.layers, stages, chunks))
    layout.check(flatten(model.weights))
    compute, _ = config.precision.resolve(devices[0])
    mask = configs.mask_of(config)
    attention = config.model.attention
    heads, kv_heads = (
        count // layout.size(*layout.axes(name, "activations"))
        for name, count in (("heads", attention.heads), ("kv_heads", attention.kv_heads or attention.heads))
    )
    choose_backend(
        dataclasses.replace(attention, heads=heads, kv_heads=kv_heads),
        Chip.of(devices[0]),
        compute.name,
        config.model.head_size,
        mask,
        rows=1,
        time=config.batch.sequence_length,
        dropout=config.model.attention_dropout,
    )
    return Program(
        model=model,
        mesh=mesh,
        layout=layout,
        optimizer=config.optimizer,
        loss=config.loss,
        partition=config.partition,
        compute=compute,
        stored=jnp.dtype(config.precision.params),
        mask=mask,
        steps=steps or config.steps or 1,
        schedule=config.pipeline,
    )


def prepare_data(loaded: Loaded, children: list[subprocess.Popen], *, alone: bool) -> None:
    """Shards that are missing are made by the verb `prepare`, in a process of its own, which joins the children.

    Raises: DataError if they cannot be made, or several processes would have to.
    """
    if loaded.config.data.is_prepared():
        return
    command = [sys.executable, str(ROOT / "main.py"), "prepare", "--config", str(loaded.path)]
    command += [f"{path}={value}" for path, value in loaded.overrides.items()]
    if not alone:
        raise DataError(
            "the data are not prepared, and several processes do not do it together; run "
            f"`python main.py prepare {' '.join(command[3:])}` once, on a file system that all of them see."
        )
    log.info("data: preparing (once; `python main.py prepare` does it beforehand)")
    children.append(child := subprocess.Popen(command))
    if code := child.wait():
        raise DataError(f"the data could not be prepared: `prepare` ended with exit code {code}, see above.")


def load_data(config: Config) -> Loader:
    """The rows to train on. Raises: DataError."""
    try:
        return configs.loader(config, config.data.load())
    except ValueError as error:
        raise DataError(str(error)) from error


def refuse_too_long(loader: Loader, samples: int) -> None:
    """Raises: DataError if the sources of a blend have no more to give before the end of a run of so many samples."""
    if (end := loader.blend.end) is not None and end < samples:
        raise DataError(
            f"every source of the blend has reached its max_epochs after {end:,} samples, and the run is {samples:,} "
            "samples long; make it shorter, or raise a max_epochs of data.sources."
        )


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
            f"model       {parameters:,} parameters, {config.model.layers} layers of width {config.model.width}",
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
