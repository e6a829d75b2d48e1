"""The manifest of a checkpoint: written last, it names every file with its SHA-256, every array with its digest.

A step without a manifest that agrees with its files is not a checkpoint.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

NAME = "manifest.json"
PROMISES = "promises"
BESIDE = ".data"
"""Behind a step's number: files that processes of the run wrote besides its arrays, until it is sealed."""
FORMAT = 2
"""Version of checkpoints. 2: weights of layers are named by stack and block, `stacks/main/block/...`; 1 had none."""
THREADS = 8
"""Files hashed at a time: one thread hashes about 1.4 GiB/s where the CPU has SHA instructions."""


class FormatError(ValueError):
    """A checkpoint has another format than this version reads."""


@dataclass(frozen=True, kw_only=True)
class Array:
    """One array of the state, as it was on the devices."""

    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is, beside its arrays."""

    step: int
    arrays: Mapping[str, Array]
    """By name, `params/stacks/main/block/mlp/in_DF`."""
    about: Mapping[str, Any]
    """What the trainer adds: config, position, hashes of data and tokenizer, versions."""
    val_loss: float | None = None
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256 of each file, by its path in the step's folder; `write` finds them."""

    @property
    def trees(self) -> set[str]:
        """Names of the trees and single arrays of the state that the checkpoint holds: params, moments, step, ..."""
        return {tree_of(name) for name in self.arrays}


def tree_of(name: str) -> str:
    """The tree of a state that an array belongs to by its name: `params` of `params/stacks/main/block/mlp/in_DF`."""
    return name.partition("/")[0]


def promise(checkpoints: Path, manifest: Manifest) -> None:
    """Before a step is written: what it will be. If a kill comes between Orbax's end and the seal, `keep_promise`
    seals it at the next start, and the digests of what is restored say whether it is what was promised."""
    (checkpoints / PROMISES).mkdir(parents=True, exist_ok=True)
    _write(checkpoints / PROMISES / f"{manifest.step}.json", manifest)


def seal(checkpoints: Path, manifest: Manifest) -> None:
    """After it is written: take in what lies beside it, hash the step's files and write its manifest, last."""
    if (beside := checkpoints / f"{manifest.step}{BESIDE}").is_dir():
        beside.rename(checkpoints / str(manifest.step) / BESIDE[1:])
    write(checkpoints / str(manifest.step), manifest)
    _sync(checkpoints)
    (checkpoints / PROMISES / f"{manifest.step}.json").unlink(missing_ok=True)


def keep_promise(checkpoints: Path, step: int) -> None:
    """Seals a step that was written whole and not sealed; does nothing to others."""
    path = checkpoints / PROMISES / f"{step}.json"
    if path.is_file() and not (checkpoints / str(step) / NAME).exists() and _files(checkpoints / str(step)):
        seal(checkpoints, read_file(path))


def amend(folder: Path, about: Mapping[str, Any], val_loss: float | None) -> None:
    """Writes a step's manifest again with another `about` and validation loss; the files stay as they are."""
    _write(folder / NAME, replace(read(folder), about=about, val_loss=val_loss))


def write(folder: Path, manifest: Manifest) -> None:
    """Hash the step's files and write its manifest: under another name, synced, then renamed."""
    names = [name for name in _files(folder) if not name.startswith(NAME)]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(names, pool.map(lambda name: _hash(folder / name, sync=True), names), strict=True))
    for part in {(folder / name).parent for name in names}:
        _sync(part)
    _write(folder / NAME, replace(manifest, files=hashes))


def _write(path: Path, manifest: Manifest) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(_sealed(asdict(manifest) | {"format": FORMAT}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def read(folder: Path) -> Manifest:
    """A step's manifest. Raises: ValueError that says what is wrong with it."""
    try:
        return read_file(folder / NAME)
    except FileNotFoundError:
        why = f"{NAME} is missing: it is not sealed" if _files(folder) else "the folder is empty"
        raise ValueError(why) from None


def read_file(path: Path) -> Manifest:
    """Raises: FileNotFoundError; ValueError that says what is wrong with the manifest."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read: {error}") from error
    try:
        sealed = json.loads(raw)
        body = sealed["manifest"]
        if raw.decode() != _sealed(body):
            raise ValueError
        if body["format"] != FORMAT:
            raise FormatError(f"{NAME} has format {body['format']}; this version reads {FORMAT}")
        arrays = {name: Array(**a | {"shape": tuple(a["shape"])}) for name, a in body["arrays"].items()}
        files = {name: (size, sha256) for name, (size, sha256) in body["files"].items()}
        rest = {name: body[name] for name in ("step", "about", "val_loss")}
        return Manifest(arrays=arrays, files=files, **rest)
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{NAME} is damaged: it does not agree with its own SHA-256") from None


def verify(folder: Path) -> Manifest:
    """The manifest of a step all of whose files are as they were written.

    Raises: ValueError that names the first file that is not, or says what is wrong with the manifest.
    """
    manifest = read(folder)
    if folder.name != str(manifest.step):
        raise ValueError(f"{NAME} is that of step {manifest.step}")

    def check(item: tuple[str, tuple[int, str]]) -> str | None:
        name, (size, sha256) = item
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            wrong = _hash(folder / name)[1] != sha256
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return f"{name} is damaged: its SHA-256 differs" if wrong else None

    with ThreadPoolExecutor(THREADS) as pool:
        if problem := next(filter(None, pool.map(check, manifest.files.items())), None):
            raise ValueError(problem)
    return manifest


def _sealed(body: Mapping[str, Any]) -> str:
    """One text for one content, so that any other text is damage."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"manifest": body, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _hash(path: Path, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def _sync(folder: Path) -> None:
    """Makes names in a folder durable, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
