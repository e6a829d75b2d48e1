"""Opens run folders for reading: config, data and weights."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from data import Loader
from mtx import config as configs
from mtx.building.compile_cache import keep_compiled
from mtx.building.data import load_data
from mtx.building.program import build
from mtx.checkpoint import DigestError, Found, Store
from mtx.config import Config
from mtx.errors import CheckpointError, DataError, DeviceError
from mtx.mesh import MeshConfig
from mtx.step import Program

log = logging.getLogger("mtx")

CHECKPOINTS = "checkpoints"
"""The folder of a run folder that holds them."""


@dataclass(frozen=True)
class Opened:
    """A finished or running run, for reading: its config, data, and newest weights."""

    config: Config
    program: Program
    loader: Loader
    params: Any
    step: int


def open_run(folder: Path, words: Sequence[str], step: int | None) -> Opened:
    """The weights of a run's newest checkpoint that verifies (or of one step), on this machine's devices.

    The mesh is the run's where it fits the devices, else one device; `words` override fields.
    Raises: ConfigError, DeviceError, DataError, CheckpointError.
    """
    config = configs.override(configs.read_config(folder), words)
    keep_compiled()
    count = jax.device_count()
    named = any(word.lstrip("-").startswith("mesh") for word in words)
    if not named and not _fits(config, count):
        config = dataclasses.replace(config, mesh=MeshConfig())
        count = 1
    configs.check(config, count)
    loader = load_data(dataclasses.replace(config, curriculum=None))  # which rows come first is for who trains
    corpus = loader.corpus
    program = build(config, jax.devices()[:count])
    found, params = open_weights(folder, program, step, evaluated=True)
    for part in program.more_parts:
        if said := part.describe():
            log.info("%-12s%s", part.name, said)
    if found.manifest.about["tokenizer"] != corpus.tokenizer.digest:
        raise DataError(
            f"the tokenizer of {corpus.source} is not the one that {folder} was trained with, so that its tokens "
            "mean other text; give the run its data back."
        )
    if found.manifest.about["data"] != corpus.digest:
        log.warning("the text is not what the run was trained on: now %s", corpus.source)
    return Opened(config, program, loader, params, found.step)


def _fits(config: Config, devices: int) -> bool:
    try:
        configs.check(config, devices)
    except DeviceError:
        return False
    return True


def open_weights(
    path: Path, program: Program, step: int | None = None, *, evaluated: bool = False
) -> tuple[Found, Any]:
    """(which checkpoint, its weights alone) of a run folder's newest that verifies, of one step, or of a step's folder:
    those that are trained, or `evaluated` those that evaluation reads, such as their average.

    Raises: CheckpointError.
    """
    if path.name.isdigit() and path.parent.name == CHECKPOINTS:
        step, path = int(path.name), path.parent.parent
    store = Store(path / CHECKPOINTS)
    found = store.newest() if step is None else store.at(step)
    if found is None:
        raise CheckpointError(f"{path} holds no checkpoints; name a run folder such as runs/quickstart.")
    for skipped, why in found.skipped:
        log.warning("step %d is skipped: %s", skipped, why)
    part, target = program.evaluated_part if evaluated else None, program.abstract_ordered()
    trees = {"params": target.params} | ({part.name: target.parts[part.name]} if part is not None else {})
    if part in program.more_parts and part.name not in found.manifest.trees:
        raise CheckpointError(
            f"step {found.step} of {path} holds no {part.name}; {part.name}=None reads the weights that were trained."
        )
    try:
        trees = program.placed(store.restore(found, trees))
    except DigestError as error:
        raise CheckpointError(f"step {found.step} of {path} cannot be used: {error}.") from error
    return found, program.evaluated(trees["params"], trees) if part is not None else trees["params"]
