"""Where a run begins: resumed from its folder, anew in it, or with the weights of another."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from data import Loader, Text
from mtx import config as configs
from mtx.building import CHECKPOINTS, open_weights
from mtx.checkpoint import DigestError, Found, Store
from mtx.config import Config, Loaded
from mtx.errors import ConfigError
from mtx.step import Program, TrainState
from mtx.train.banner import mesh_text

log = logging.getLogger("mtx")

EARLIER = "earlier"
FREE = (
    *("model.remat", "model.unroll", "model.attention.backend", "data.folder", "data.paths"),
    *("data.train", "data.validation", "data.test", "data.tokenizer.path", "data.tokenizer.folder"),
    *("data.data_dir", "data.download", "data.silence_s", "curriculum.metric.path"),
)
"""Fields below `MEANING` that change how things are computed or where they lie, not what they are."""
PHASES = "data.phases"
MEANING = ("model", "data", "objective", "packing", "curriculum", "batch.sequence_length", "seed", "precision.params")
"""What a model and its data are. What they hold is compared by digests besides."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    state: TrainState
    step: int = 0
    evaluated: bool = True
    """Whether the evaluation that is due at this step was done before the run stopped."""
    best_val_loss: float | None = None
    """The lowest so far."""


@contextlib.contextmanager
def claimed(workdir: Path, first: bool, mark: str) -> Iterator[None]:
    """The folder, made if need be, for this run alone: the lock falls with the process, however it ends."""
    if not first:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / "lock").open("a")
    except OSError as error:
        raise ConfigError(f"workdir={workdir} cannot be written to: {error.strerror}.") from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (workdir / "lock").read_text().strip() or "another run"
            raise ConfigError(f"workdir={workdir} is in use by {holder}; give this one its own workdir.") from None
        except OSError:
            log.warning("workdir=%s: this file system has no locks; start no second run in it.", workdir)
        file.truncate(0)
        file.write(f"{mark}\n")
        file.flush()
        yield


def this_process() -> str:
    """For the lock: which process holds it."""
    return f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def start(loaded: Loaded, program: Program, loader: Loader, store: Store, accept_changes: bool) -> Start:
    """The newest checkpoint that verifies; a new state where there is none.

    Raises: CheckpointError if there are checkpoints and none can be used, or one does not fit the config;
    ConfigError if the config now means another model or other data, or a stream cannot go on.
    """
    config, corpus = loaded.config, loader.corpus
    loader.open(*program.share_of_rows())
    below, skipped = None, ()
    while (found := store.newest(below, skipped)) is not None:
        refuse_changes(found, config, loader, accept_changes)
        try:
            state = program.placed(store.restore(found, program.abstract_ordered()))
        except DigestError as error:  # on every process alike; anything else is no damage, and ends this process
            below, skipped = found.step, [*found.skipped, (found.step, str(error))]
            continue
        for step, why in found.skipped:
            log.warning("step %d is skipped: %s (kept in %s/damaged)", step, why, store.folder)
        if found.skipped and store.rule is not None:
            store.quarantine(found.skipped)
        about = found.manifest.about
        try:
            loader.restore(store.beside(found.step), about["samples"])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        saved_on = about["mesh"] if about["mesh"] != mesh_text(program) else "the same mesh"
        log.info("resumed     step %d, %s tokens (saved on %s)", found.step, f"{about['tokens']:,}", saved_on)
        return Start(state, found.step, about["evaluated"], about["best_val_loss"])
    state = program.init(config.seed)
    if config.init_from is not None:
        params, found = warm_start(Path(config.init_from), program, corpus, accept_changes)
        state = dataclasses.replace(state, params=params)
        log.info("weights     of step %d of %s", found.step, config.init_from)
    return Start(state)


def set_aside(workdir: Path, first: bool) -> None:
    """Moves what an earlier run left in the folder to earlier/1, earlier/2 ...; deletes nothing."""
    if not first:
        return
    left = [path for path in workdir.iterdir() if path.name not in ("lock", EARLIER)]
    metrics = workdir / "metrics.jsonl"
    if not (workdir / CHECKPOINTS).is_dir() and not (metrics.is_file() and metrics.stat().st_size):
        return
    number = 1
    while (into := workdir / EARLIER / str(number)).exists():
        number += 1
    into.mkdir(parents=True)
    for path in left:
        shutil.move(path, into / path.name)
    log.info("an earlier run of this folder is now in %s", into)


def refuse_changes(found: Found, config: Config, loader: Loader, accept_changes: bool) -> None:
    """Says what changed since the checkpoint. Raises: ConfigError if that changes the meaning of model or data."""
    about, corpus = found.manifest.about, loader.corpus
    changed = configs.differences(about["config"], config)
    for path, old, new in changed:
        log.info("changed     %s: %s -> %s", path, old, new)
    for path, old, new in changed:
        if path == "optimizer":
            raise ConfigError(
                f"the optimizer changed ({old} -> {new}), and the state of one means nothing to the other; start a new "
                "run from the weights: init_from= this folder, and another workdir=."
            )
    later = _only_later_phases(about, config)
    wrong = [f"{path}: {old} -> {new}" for path, old, new in changed if _means(path) and not (later and PHASES in path)]
    if (then := about.get("metric")) != loader.metric_digest:
        wrong.append(f"the digest of curriculum.metric: {then} -> {loader.metric_digest}")
    if config.curriculum is not None:  # which samples are easy enough goes by steps of so many samples
        wrong += [f"{path}: {old} -> {new}" for path, old, new in changed if path == "batch.global_size"]
    weights = any(path.startswith("data.sources[") and path.endswith(".weight") for path, _, _ in changed)
    for name, now in (("data", corpus.digest), ("tokenizer", corpus.tokenizer.digest)):
        if about[name] != now:
            old_source = f" ({about['source']} -> {corpus.source})" if about["source"] != corpus.source else ""
            wrong.append(f"the {name}'s digest: {about[name][:16]} -> {now[:16]}{old_source}")
    if wrong and accept_changes:
        log.warning("accepted: %s", "; ".join(wrong))
    elif wrong:
        raise ConfigError(
            f"the run in this folder (step {found.step}) has another model or other data; {'; '.join(wrong)}. "
            "Undo the change, or set another workdir, or say --accept-changes to go on all the same, or --fresh to "
            "start anew (the old run moves to earlier/)."
            + f" Other weights from here on are a phase: Phase(start_sample={about['samples']}, weights=(...))."
            * weights
        )


def _only_later_phases(about: Mapping[str, Any], config: Config) -> bool:
    """Whether all phases of a blend that have begun are what they were."""
    then, now = (dumped["data"].get("phases", []) for dumped in (about["config"], configs.dump(config)))
    then, now = ([p for p in phases if p["start_sample"] < about["samples"]] for phases in (then, now))
    return then == now


def _means(path: str) -> bool:
    path = re.sub(r"^data\.sources\[\d+\]\.data\.", "data.", path)

    def under(names: tuple[str, ...]) -> bool:
        return any(path == name or path.startswith(f"{name}.") for name in names)

    return under(MEANING) and not under(FREE)


def warm_start(path: Path, program: Program, corpus: Text, accept_changes: bool) -> tuple[Any, Found]:
    """Weights of the newest checkpoint of a run folder, or of one step's folder; nothing else of it."""
    found, params = open_weights(path, program)
    if found.manifest.about["tokenizer"] != corpus.tokenizer.digest and not accept_changes:
        raise ConfigError(
            f"init_from={path} was trained with another tokenizer; its tokens mean other text. "
            "Use its tokenizer, or say --accept-changes."
        )
    return params, found


def about(
    config: Config,
    program: Program,
    loader: Loader,
    *,
    samples: int,
    tokens: int,
    evaluated: bool,
    best_val_loss: float | None,
) -> Mapping[str, Any]:
    """What a checkpoint says about itself besides its arrays."""
    corpus = loader.corpus
    return {
        "config": configs.dump(config),
        "samples": samples,
        "tokens": tokens,
        "data": corpus.digest,
        "metric": loader.metric_digest,
        "source": corpus.source,
        "tokenizer": corpus.tokenizer.digest,
        "mesh": mesh_text(program),
        "processes": jax.process_count(),
        "versions": configs.versions(),
        "evaluated": evaluated,
        "best_val_loss": best_val_loss,
    }
