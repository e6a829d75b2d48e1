"""Finished pieces of a preparation, kept until the whole is: who was killed, or ran out of disk, goes on from them.

A piece is a folder that got its name when it was complete. The name holds a hash of all that decides what is in it, so
that what another text or another recipe left behind is never taken for it; in it are the hashes of its files, so that
nobody need wait for the disk while it is written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.shards.format import TEMPORARY, sha256_of
from data.shards.manifest import FORMAT, canonical

NAME = "pieces"
SAID = "piece.json"
FILES = "files"


def name_of(kind: str, *content: Any) -> str:
    """Of the piece that all of this decides (plain data)."""
    return f"{kind}-{hashlib.sha256(canonical([FORMAT, kind, *content])).hexdigest()[:20]}"


class Pieces:
    """The pieces beside the shards of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NAME

    def path(self, name: str) -> Path:
        """Folder of a piece."""
        return self.folder / name

    def find(self, name: str) -> dict[str, Any] | None:
        """What a finished piece says; None: it is not there, or not as it was written."""
        path = self.path(name)
        try:
            said = json.loads((path / SAID).read_bytes())
            whole = all(sha256_of(path / file) == sha256 for file, sha256 in said.pop(FILES).items())
        except (OSError, ValueError, KeyError):
            return None
        return said if whole else None

    def remove(self, name: str) -> None:
        """A piece, if it is there."""
        shutil.rmtree(self.path(name), ignore_errors=True)

    def keep(self, kind: str, names: Collection[str]) -> int:
        """Removes the pieces of a kind that have other names; returns how many."""
        there = {path.name for path in self.folder.glob(f"{kind}-*")}
        for name in there.difference(names):
            shutil.rmtree(self.path(name))
        return len(there.difference(names))

    def remove_temporaries(self) -> None:
        """What was never finished."""
        for path in self.folder.glob(f"*{TEMPORARY}"):
            shutil.rmtree(path, ignore_errors=True)  # somebody may still write there, whom nobody waits for

    def remove_all(self) -> None:
        """Once the shards are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Draft:
    """A piece while it is made, in a folder of this process's own."""

    def __init__(self, pieces: Path, name: str) -> None:
        self._whole = pieces / name
        self.folder = pieces / f"{name}.{os.getpid()}{TEMPORARY}"
        self.folder.mkdir(parents=True)

    def finish(self, said: dict[str, Any]) -> None:
        """Gives it its name."""
        files = {path.name: sha256_of(path) for path in self.folder.iterdir()}
        (self.folder / SAID).write_text(json.dumps(said | {FILES: files}))
        try:
            self.folder.rename(self._whole)
        except OSError:
            if not self._whole.is_dir():  # else a worker made it whose preparation was killed
                raise
