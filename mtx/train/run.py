"""The verb `train`: everything in its order, from the config to the last step."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import jax

from mtx import config as configs
from mtx import processes
from mtx.building import CHECKPOINTS, build, keep_compiled, load_data, prepare_data, refuse_too_long
from mtx.checkpoint import Store
from mtx.command import log_to_stderr
from mtx.config import Cluster, Loaded
from mtx.errors import ConfigError, NumericsError, Stopped, UserError
from mtx.metrics import Console, Metrics
from mtx.step import TrainState
from mtx.train import saved
from mtx.train.banner import banner
from mtx.train.loop import Loop
from mtx.train.stopping import SAVE, Stopping, each, leave

log = logging.getLogger("mtx")

HEARTBEAT_S = 30
"""A process that is gone is noticed, and ends the others, after this long."""


def run(
    loaded: Loaded,
    *,
    argv: list[str],
    verbose: bool = False,
    devices: int | None = None,
    cluster: Cluster | None = None,
    fresh: bool = False,
    accept_changes: bool = False,
) -> TrainState:
    """Train `loaded.config` from where its run folder stands to its last step; returns the final state.

    `fresh` starts anew in a folder that holds steps; `accept_changes` resumes although model or data changed.
    Raises: ConfigError before any device is touched, DeviceError if the mesh does not fit them, DataError,
    CheckpointError, NumericsError, StorageError; Stopped after a signal, when all is saved.
    """
    try:
        return _run(loaded, argv, verbose, devices, cluster, fresh, accept_changes)
    except (Stopped, NumericsError):
        raise  # every process comes to it at the same step
    except Exception as error:
        if cluster is None:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        # The others wait in a collective: without the barrier of an orderly end they notice within HEARTBEAT_S.
        os._exit(getattr(error, "exit_code", 1))


def _run(
    loaded: Loaded,
    argv: list[str],
    verbose: bool,
    devices: int | None,
    cluster: Cluster | None,
    fresh: bool,
    accept_changes: bool,
) -> TrainState:
    config, workdir = loaded.config, configs.workdir(loaded)
    configs.check(config, devices)
    if config.init_from is not None and not Path(config.init_from).is_dir():
        raise ConfigError(f"init_from={config.init_from} is no folder; name a run folder such as runs/quickstart.")
    first = cluster is None or cluster.process == 0
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        children: list[subprocess.Popen] = []
        stopping = Stopping(functools.partial(_nothing_to_save, workdir, children), alone=cluster is None)
        if cluster is None:
            enter(stopping)
        # What needs no device comes first: its mistakes cost nothing, and several processes end one by one.
        log_to_stderr(first)
        for remark in loaded.remarks:
            log.info(remark)
        prepare_data(loaded, children, alone=cluster is None)
        loader = load_data(config)
        connect(cluster)
        if cluster is not None:
            enter(stopping)
        enter(each(config.stop_after_minutes, lambda: stopping.ask("stop_after_minutes")))
        configs.check(config, jax.device_count())
        samples = sum(loader.epoch_samples.values())
        program = build(config, jax.devices(), configs.total_steps(config, lambda: samples))

        mark = saved.this_process()
        enter(saved.claimed(workdir, first, mark))
        if cluster is not None:
            alike(cluster, loaded, f"{loader.corpus.digest} {loader.metric_digest or ''}".strip(), workdir, mark)
        store = enter(Store(workdir / CHECKPOINTS, config.checkpoints))
        resumes = bool(store.steps()) and not fresh
        if not resumes:
            saved.set_aside(workdir, first)
        console = enter(Console(workdir / "log.txt", total_steps=program.steps, append=resumes, first=first))
        begin = saved.start(loaded, program, loader, store, accept_changes)
        # Another batch size than before needs another number of steps for the rest.
        done = int(begin.state.samples)
        steps = configs.total_steps(config, lambda: samples, begin.step, done, int(begin.state.tokens))
        whole = done + (steps - begin.step) * config.batch.global_size
        refuse_too_long(loader, whole)
        program = dataclasses.replace(program, steps=steps)
        if first:
            configs.write_run_folder(loaded, workdir, argv)
        console.say(banner(config, program, loader, workdir, steps, whole, verbose))
        metrics = enter(Metrics(workdir if first else None, begin.step, config.reporting, configs.dump(config)))
        rule = config.checkpoints
        enter(each(rule.every_minutes if rule and first else 0, lambda: stopping.ask(SAVE)))
        enter(jax.set_mesh(program.mesh))
        state = Loop(config, program, loader, store, stopping, console, metrics, begin).train()
        store.close()
        console.say(f"run folder: {workdir}")
        return state


def connect(cluster: Cluster | None) -> None:
    """Joins the processes of a run; from here on JAX may be asked for devices."""
    if cluster is not None:
        if cluster.processes > 1:
            log.warning(
                "process %d of %d meets the others at %s", cluster.process, cluster.processes, cluster.coordinator
            )
        jax.config.update("jax_enable_preemption_service", False)  # signals are ours: see stopping.py
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    keep_compiled()


def alike(cluster: Cluster, loaded: Loaded, data: str, workdir: Path, mark: str) -> None:
    """Raises: ConfigError if this process has another config, other data or another run folder than the first."""
    client = processes.client()
    mine = json.dumps({"config": configs.dump(loaded.config), "data": data})
    if cluster.process == 0:
        client.key_value_set("mtx/alike", mine)
        client.key_value_set("mtx/lock", mark)
    wanted = json.loads(client.blocking_key_value_get("mtx/alike", 600_000))
    here = f"process {cluster.process} has"
    for path, theirs, ours in configs.differences(wanted["config"], loaded.config):
        raise ConfigError(f"{here} {path}={ours}, process 0 has {theirs}; start all with the same command.")
    if wanted["data"] != data:
        raise ConfigError(f"{here} other data than process 0 ({data}, {wanted['data']}); prepare them once for all.")
    lock, wanted_mark = workdir / "lock", client.blocking_key_value_get("mtx/lock", 600_000)
    if not lock.is_file() or lock.read_text().strip() != wanted_mark:
        raise ConfigError(f"{here} another folder {workdir} than process 0; workdir must be on a shared file system.")


def _nothing_to_save(workdir: Path, children: list[subprocess.Popen], why: str) -> None:
    """Ends the process at once: no step was made since the last checkpoint. Asks no device."""
    for child in children:
        child.terminate()
        child.wait()
    steps = Store(workdir / CHECKPOINTS).steps()
    newest = f"the newest checkpoint is that of step {steps[0]}" if steps else "there is no checkpoint"
    log.warning("stopped by %s before the first step: nothing is new, %s; the same command goes on.", why, newest)
    leave(Stopped.exit_code)
