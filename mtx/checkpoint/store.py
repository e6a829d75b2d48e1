"""The checkpoints of a run folder: saving while training goes on, finding the newest that verifies, keeping a few."""

import logging
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtx import processes
from mtx.checkpoint import manifest as manifests
from mtx.checkpoint.digest import digests
from mtx.checkpoint.manifest import Array, Manifest, tree_of
from mtx.errors import CheckpointError, NumericsError, Problem, StorageError

log = logging.getLogger("mtx")

WEIGHTS = "params"
DELETING = ".deleting"
SEAL_MS = 4 * 3600 * 1000
"""How long processes wait for the first to hash a checkpoint; if it dies, JAX's heartbeat ends them much earlier."""
TIMEOUT_S = 300
"""A save in which another process does not finish within this has failed."""


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to save, besides the end of the run and a signal; and what to keep."""

    every_steps: int = 0
    """Steps between saves; 0: not by steps."""
    every_minutes: float = 15.0
    """Minutes between saves; 0: not by time."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss to keep; an evaluation that finds a new lowest saves."""
    keep_every_steps: int = 0
    """Milestones: steps that this divides are saved and kept for good; 0: none."""

    def check(self) -> Iterator[Problem]:
        for field in ("every_steps", "every_minutes", "keep_best", "keep_every_steps"):
            if getattr(self, field) < 0:
                yield field, "must be at least 0"
        if self.keep < 1:
            yield "keep", "must be at least 1"


def kept(steps: Mapping[int, float | None], rule: Checkpoints) -> set[int]:
    """Which of some verified steps (step -> validation loss, None where there is none) to keep."""
    newest = sorted(steps)[-rule.keep :]
    known = sorted((loss, step) for step, loss in steps.items() if loss is not None and math.isfinite(loss))
    best = [step for _, step in known[: rule.keep_best]]
    milestones = [step for step in steps if rule.keep_every_steps and step % rule.keep_every_steps == 0]
    return {*newest, *best, *milestones}


def named(state: Any) -> dict[str, jax.Array]:
    """The arrays of a state by name: `params/stacks/main/block/mlp/in_DF`, `moments/0/mu/...`, `step`."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class DigestError(ValueError):
    """What was restored is not what was saved, though the files are."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files verify, and the newer ones that do not."""

    manifest: Manifest
    skipped: Sequence[tuple[int, str]]
    """(step, why)."""

    @property
    def step(self) -> int:
        return self.manifest.step


class Store:
    """A folder of checkpoints, one folder per step. Every process of a run makes one and calls it alike.

    Without a rule it only reads, and a run that writes to the same folder is not disturbed.
    """

    def __init__(self, folder: Path, rule: Checkpoints | None = None):
        self.folder, self.rule = folder.absolute(), rule
        self._agreements = 0
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._failures = 0
        self._in_flight: int | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        """However a run ends, what is being written is written: Python's own end would cut it off."""
        if self._finishing is not None:
            self._finishing.join()

    @property
    def first(self) -> bool:
        return jax.process_index() == 0

    # Saving.

    def save(
        self,
        state: Any,
        step: int,
        about: Mapping[str, Any],
        val_loss: float | None = None,
        beside: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy the state off the devices; write, hash and seal it in the background.

        `beside` writes what else belongs to the step to a folder, at once; `Store.beside` is where it lies then.

        Waits for the save before. Raises: NumericsError, before anything is written, if an array holds what
        is not finite; StorageError after two saves in a row that failed.
        """
        assert self.rule is not None
        self.finish()
        started = time.perf_counter()
        arrays = named(state)
        found, bad = digests(arrays)
        if bad:
            raise NumericsError(f"step {step} is not saved: {', '.join(bad[:3])} holds numbers that are not finite.")
        described = {name: Array(shape=x.shape, dtype=str(x.dtype), digest=found[name]) for name, x in arrays.items()}
        manifest = Manifest(step=step, arrays=described, about=about, val_loss=val_loss)
        self._in_flight = step
        try:
            if beside is not None:
                (there := self.folder / f"{step}{manifests.BESIDE}").mkdir(parents=True, exist_ok=True)
                beside(there)
            if self.first:
                manifests.promise(self.folder, manifest)
            self._manager.save(step, args=self._items(self._args.PyTreeSave, arrays))
        except Exception as error:
            self._failure = error
        self._finishing = threading.Thread(target=self._finish, args=(manifest, started), name="checkpoint")
        self._finishing.start()

    def _finish(self, manifest: Manifest, started: float) -> None:
        """In the background: wait for Orbax on every process, then seal the step and delete old ones."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if self._failure is not None or not self.first:
                return
            manifests.seal(self.folder, manifest)
            log.info("step %d: checkpoint saved and sealed in %.1f s", manifest.step, time.perf_counter() - started)
        except BaseException as error:
            self._failure = self._failure or error
            return
        try:
            self._delete_old()
        except OSError as error:
            log.warning("an old checkpoint could not be deleted: %s", error)

    def finish(self) -> None:
        """Wait for the save in flight, on every process. Raises: StorageError if it and the one before it failed."""
        if self._finishing is None:
            return
        self._finishing.join()
        self._finishing = None
        failure, self._failure = self._failure, None
        said = self._everybody(" ".join(str(failure or "").split())[:400] or ("it failed" if failure else ""))
        self._failures = self._failures + 1 if said else 0
        if said:
            self._drop_manager()
            what = f"the checkpoint of step {self._in_flight} was not saved: {said}"
            if self._failures > 1:
                raise StorageError(f"{what}; nor was the one before it. Make room, or set workdir.")
            log.warning("%s", what)

    def _everybody(self, failure: str) -> str:
        """What failed on any process, on every process; empty if nothing did.

        Through JAX's key-value store and not the devices: process 0 may hash for long, while the others wait here.
        """
        if jax.process_count() == 1:
            return failure
        self._agreements += 1
        client = processes.client()
        prefix = f"mtx/saved/{self._agreements}"
        client.key_value_set(f"{prefix}/{jax.process_index()}", failure or "ok")
        said = [client.blocking_key_value_get(f"{prefix}/{p}", SEAL_MS) for p in range(jax.process_count())]
        return "; ".join(text for text in dict.fromkeys(said) if text != "ok")

    def amend(self, step: int, about: Mapping[str, Any], val_loss: float | None) -> None:
        """Adds to the manifest of a step what became known after its save, such as the validation loss."""
        self.finish()
        if self.first and not self._failures:
            manifests.amend(self.folder / str(step), about, val_loss)

    def close(self) -> None:
        """Wait for the save in flight. Raises: StorageError if the last save failed."""
        self.finish()
        if self._failures:
            raise StorageError(f"the last checkpoint, of step {self._in_flight}, was not saved; see above.")

    def _delete_old(self) -> None:
        assert self.rule is not None
        steps = {}
        for step in self.steps():
            try:
                steps[step] = manifests.read(self.folder / str(step)).val_loss
            except ValueError:
                continue  # what is damaged is evidence, not ours to delete
        for step in set(steps) - kept(steps, self.rule):
            doomed = self.folder / f"{step}{DELETING}"
            (self.folder / str(step)).rename(doomed)  # what is half deleted has no step's name
            shutil.rmtree(doomed)

    # Finding and restoring.

    def beside(self, step: int) -> Path:
        """The folder of what was saved beside a step's arrays; it may be absent."""
        return self.folder / str(step) / manifests.BESIDE[1:]

    def steps(self) -> list[int]:
        """Steps that have a folder, verified or not, newest first."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.is_dir() and re.fullmatch(r"\d+", path.name)]
        return sorted((int(name) for name in names if str(int(name)) == name), reverse=True)

    def newest(self, below: int | None = None, skipped: Sequence[tuple[int, str]] = ()) -> Found | None:
        """The newest checkpoint whose files verify (of those below a step); None if there are no steps at all.

        Every process gets what process 0 finds. Raises: CheckpointError if there are steps and none verifies.
        """
        found, why, older = None, list(skipped), False
        steps = [step for step in self.steps() if below is None or step < below]
        if self.first:
            for step in steps:
                try:
                    if self.rule is not None:
                        manifests.keep_promise(self.folder, step)
                    found = manifests.verify(self.folder / str(step))
                    break
                except ValueError as error:
                    why.append((step, str(error)))
                    older |= isinstance(error, manifests.FormatError)
        chosen = _agreed(found.step if found else -3 if older else -1 if why else -2)
        if chosen == -2:
            return None
        if chosen == -3:
            said = ", ".join(str(step) for step in steps)
            anew = ", or train anew with --fresh, which moves them to earlier/" if self.rule is not None else ""
            raise CheckpointError(
                f"{self.folder} holds checkpoints (steps: {said}) of another format than {manifests.FORMAT}, the one "
                f"that this version reads; use the version of mtx that wrote them{anew}."
            )
        if chosen == -1:
            said = "; ".join(f"step {step}: {reason}" for step, reason in why) or "see process 0"
            anew = ", or train anew with --fresh, which moves them to earlier/ and deletes nothing."
            raise CheckpointError(
                f"{self.folder} holds checkpoints, and none verifies ({said}). Put a good copy back"
                + (anew if self.rule is not None else "")
            )
        found = found or manifests.read(self.folder / str(chosen))
        return Found(found, why)

    def at(self, step: int) -> Found:
        """The checkpoint of one step. Raises: CheckpointError if it is not there or does not verify."""
        try:
            return Found(manifests.verify(self.folder / str(step)), ())
        except ValueError as error:
            have = ", ".join(str(s) for s in sorted(self.steps())) or "none"
            raise CheckpointError(
                f"step {step} of {self.folder} cannot be used: {error}. Steps there: {have}."
            ) from None

    def restore(self, found: Found, target: Any) -> Any:
        """The state, with the target's structure and shardings, whatever mesh it was saved on.

        `target` is a tree of ShapeDtypeStructs with shardings: a state, or some of its trees, such as
        `{"params": ...}`; other trees of the checkpoint are not read. Raises: CheckpointError if a leaf of the
        target's trees is missing, unknown, of another shape or dtype, naming each; DigestError if what was read has
        another digest than what was saved, on every process alike.
        """
        wanted = named(target)
        self._refuse_misfits(found.manifest, wanted)
        read = self._manager.restore(found.step, args=self._items(self._reads, wanted))
        arrays = {name: leaf for group in read.values() for name, leaf in _flat(group).items()}
        got, _ = digests(arrays)
        if wrong := [name for name in wanted if got[name] != found.manifest.arrays[name].digest]:
            raise DigestError(f"{wrong[0]} has digest {got[wrong[0]]}, not {found.manifest.arrays[wrong[0]].digest}")
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])

    def _refuse_misfits(self, manifest: Manifest, wanted: Mapping[str, Any]) -> None:
        trees = {tree_of(name) for name in wanted}
        saved = {name: a for name, a in manifest.arrays.items() if tree_of(name) in trees}
        wrong = [f"{name} is in the checkpoint and not in the model" for name in saved if name not in wanted]
        wrong += [f"{name} is in the model and not in the checkpoint" for name in wanted if name not in saved]
        for name in set(saved) & set(wanted):
            a, b = saved[name], wanted[name]
            if a.shape != tuple(b.shape):
                wrong.append(f"{name} has shape {list(a.shape)} in the checkpoint, {list(b.shape)} in the model")
            elif a.dtype != str(b.dtype):
                wrong.append(f"{name} is {a.dtype} in the checkpoint, {b.dtype} in the model (nothing is cast)")
        if wrong:
            more = f"\nand {len(wrong) - 8} more." if len(wrong) > 8 else ""
            weights_first = sorted(wrong, key=lambda line: (not line.startswith(WEIGHTS), line))
            lines = "\n".join(f"{line}." for line in weights_first[:8])
            raise CheckpointError(f"step {manifest.step} of {self.folder} does not fit the config:\n{lines}{more}")

    def quarantine(self, steps: Sequence[tuple[int, str]]) -> None:
        """Moves folders of steps that do not verify out of the way, so that training can write them anew."""
        if self.first:
            for step, _ in steps:
                if (self.folder / str(step)).is_dir():
                    _move(self.folder / str(step), self.folder / "damaged")
        _agreed(0)
        self._drop_manager()

    # Orbax.

    @property
    def _args(self):
        import orbax.checkpoint as ocp

        return ocp.args

    def _reads(self, target: Any) -> Any:
        """Orbax's arguments to read a part of an item."""
        from orbax.checkpoint import checkpoint_utils

        how = checkpoint_utils.construct_restore_args(target)
        return self._args.PyTreeRestore(target, restore_args=how, partial_restore=True)

    @cached_property
    def _manager(self):
        import orbax.checkpoint as ocp

        writes = self.rule is not None
        if writes and self.first:
            for doomed in self.folder.glob(f"*{DELETING}"):
                shutil.rmtree(doomed)
        options = ocp.CheckpointManagerOptions(
            create=writes,
            cleanup_tmp_directories=writes,
            save_root_metadata=False,
            lightweight_initialize=True,
            # Folders that cannot be made are an error at once; made in the background, one that is waited for.
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT_S, create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _drop_manager(self) -> None:
        """It remembers steps and errors; the next use reads the folder."""
        self.__dict__.pop("_manager", None)

    def _items(self, kind: Callable[[Any], Any], arrays: Mapping[str, Any]):
        """Weights and the rest as two items, so that weights can be read alone."""
        groups: dict[str, dict[str, Any]] = {}
        for name, array in arrays.items():
            groups.setdefault(WEIGHTS if name.startswith(f"{WEIGHTS}/") else "rest", {})[name] = array
        return self._args.Composite(**{group: kind(_nested(leaves)) for group, leaves in groups.items()})


def _move(path: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := into / f"{path.name}-{number}").exists():
        number += 1
    path.rename(target)


def _agreed(value: int) -> int:
    """Process 0's value, on every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int64(value)))


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
