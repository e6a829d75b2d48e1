"""The loop: the only place with side effects."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from data import Corpus
from mtx import config as configs
from mtx import decode
from mtx import mesh as meshes
from mtx import metrics as reports
from mtx.attention import choose
from mtx.config import Cluster, Config, Loaded
from mtx.errors import DataError
from mtx.layout import BoundLayout
from mtx.model import Batch, Model, flatten
from mtx.spmd import Manual
from mtx.step import Program, TrainState

log = logging.getLogger("mtx")


def run(
    loaded: Loaded,
    *,
    argv: list[str],
    verbose: bool = False,
    devices: int | None = None,
    cluster: Cluster | None = None,
) -> TrainState:
    """Train `loaded.config` from its first step to its last; returns the final state.

    Raises: ConfigError before any device is touched, DeviceError if the mesh does not fit them, DataError;
    all before the run folder is written, which is the first thing that a run does.
    """
    config = loaded.config
    configs.check(config, devices)
    if cluster is not None:
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)
    first = cluster is None or cluster.process == 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO if first else logging.WARNING)

    configs.check(config, jax.device_count())
    program = build(config, jax.devices())
    corpus = load_data(config)
    workdir = configs.workdir(loaded)
    if first:
        configs.write_run_folder(loaded, workdir, argv)
    log.info("%s", banner(config, program, corpus, verbose))
    writer = reports.Writer(workdir / "metrics.jsonl" if first else None)
    state = loop(config, program, corpus, writer)
    if config.sample_tokens and config.model.causal:
        time = config.batch.sequence_length
        length = min(config.sample_tokens, time)
        tokens = decode.sample(program, state, corpus.encode("\n"), length, time=time, seed=config.seed)
        log.info("sample:\n%s", corpus.decode(tokens.tolist()))
    writer.close()
    log.info("run folder: %s", workdir)
    return state


def build(config: Config, devices) -> Program:
    """The program that a config describes, on these devices (present or not)."""
    mesh = meshes.make(config.mesh, devices)
    layout = BoundLayout.of(config.layout, dict(mesh.shape))
    model = Model(config.model)
    layout.check(flatten(model.weights))
    compute, _ = config.precision.resolve(devices[0])
    mask = model.mask(config.data.isolate_documents)
    choose(
        config.model.attention.backend,
        devices[0].platform,
        compute.name,
        config.model.head_size,
        config.batch.sequence_length,
        mask,
        config.model.attention_dropout,
        isinstance(config.partition, Manual),
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
        steps=config.steps,
    )


def load_data(config: Config) -> Corpus:
    """The corpus, long enough for one sequence. Raises: DataError."""
    try:
        corpus = config.data.load()
        corpus.train(config.seed, 0, 1, config.batch.sequence_length)
        return corpus
    except ValueError as error:
        raise DataError(str(error)) from error


def banner(config: Config, program: Program, corpus: Corpus, verbose: bool) -> str:
    """What is about to run, in the words of the config."""
    sizes = dict(program.mesh.shape)
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one device"
    device = program.mesh.devices.flat[0]
    dtype, why = config.precision.resolve(device)
    weights = flatten(program.model.weights)
    parameters = sum(math.prod(w.shape) for w in weights.values())
    count = configs.microbatches(config, sizes)
    tokens = config.batch.global_size * config.batch.sequence_length
    return "\n".join(
        [
            f"mesh        {mesh} ({program.mesh.size} x {device.device_kind}, "
            f"{type(program.partition).__name__}, zero={config.layout.zero}, "
            f"sequence_parallel={config.layout.sequence_parallel})",
            f"precision   compute {jnp.dtype(dtype).name} ({why}), parameters {config.precision.params}",
            f"model       {parameters:,} parameters, {config.model.layers} layers of width {config.model.width}",
            f"batch       {tokens:,} tokens: {config.batch.global_size} x {config.batch.sequence_length} "
            f"in {count} microbatch{'es' if count > 1 else ''}",
            f"data        {corpus.describe()}",
            program.layout.show(weights, jnp.dtype(program.stored).itemsize, verbose),
        ]
    )


def loop(config: Config, program: Program, corpus: Corpus, writer: reports.Writer) -> TrainState:
    """Steps in order. Metrics are read one step late, so that the device never waits for the host."""
    size, time_T = config.batch.global_size, config.batch.sequence_length
    count = configs.microbatches(config, dict(program.mesh.shape))
    step_fn, eval_fn = program.compile_train_step(), jax.jit(program.eval_sums)
    clock, waiting = reports.Clock(), None
    state = program.init(config.seed)

    def batch_at(step: int) -> Batch:
        arrays = corpus.train(config.seed, step * size, size, time_T)
        arrays = {name: x.reshape(count, -1, time_T) for name, x in arrays.items()}
        return program.place(arrays, program.batch_spec)

    def arrived(step: int, on_device: dict[str, jax.Array]) -> None:
        values = {name: value.item() for name, value in jax.device_get(on_device).items()}
        seconds = clock.lap()
        if step > 1:
            clock.count(seconds)
        samples = step * size
        row = {"step": step, **values, "tokens": samples * time_T, "samples": samples}
        row |= {"tokens_per_s": size * time_T / seconds, "step_s": seconds}
        writer.write(row)
        if step == 1:
            log.info("compiled and ran the first step in %.1f s", seconds)
        if step == 1 or step % config.log_every == 0 or step == config.steps:
            log.info("%s", reports.line(row, config.steps, clock.remaining_s(config.steps - step)))

    batch = batch_at(0)
    with jax.set_mesh(program.mesh):
        for step in range(1, config.steps + 1):
            state, values = step_fn(state, batch, np.int32(count))
            if step < config.steps:
                batch = batch_at(step)
            if waiting is not None:
                arrived(*waiting)
            waiting = (step, values)
            last = step == config.steps
            if last or (config.eval_every and step % config.eval_every == 0):
                arrived(*waiting)
                waiting = None
                evaluate(config, program, corpus, eval_fn, state, step, writer)
                clock.lap()
    return state


def evaluate(
    config: Config, program: Program, corpus: Corpus, eval_fn, state: TrainState, step: int, writer: reports.Writer
) -> None:
    """Loss over the whole validation split, in nats per token and bits per byte."""
    arrays = corpus.validation(config.batch.sequence_length)
    shards = program.layout.size(*program.layout.batch_axes)
    rows = (config.batch.micro_size or config.batch.global_size // shards) * shards
    total = np.zeros(2, np.float64)
    for start in range(0, len(arrays["tokens"]), rows):
        part = {name: x[start : start + rows] for name, x in arrays.items()}
        short = rows - len(part["tokens"])
        part = {name: np.pad(x, ((0, short), (0, 0))) for name, x in part.items()}
        total += np.asarray(eval_fn(state, program.place(part, program.rows_spec)), np.float64)
    loss = total[0] / total[1]
    bits = total[0] / math.log(2) / corpus.validation_bytes
    writer.write({"step": step, "val/loss": loss, "val/bits_per_byte": bits})
    yardstick = f"(gzip -9: {corpus.gzip_bits_per_byte:.4f})"
    log.info("step %d/%d  val loss %.4f  val bits per byte %.4f %s", step, config.steps, loss, bits, yardstick)
