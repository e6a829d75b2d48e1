"""Which files hold the text: paths, folders and globs become a sorted list of files of known kinds."""

import difflib
import glob
import os
from dataclasses import dataclass, field
from pathlib import Path

KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
    ".json.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.zst": "jsonl",
    ".txt": "text",
    ".txt.gz": "text",
    ".txt.zst": "text",
    ".md": "text",
    ".parquet": "parquet",
}
"""What a file's name ends with, whatever the case, and how it is read."""
PREPARED = "prepare.lock"
"""A folder with this file holds shards: no text, though their manifest ends in .json."""

LIST = "manifest.json"
"""A file of this name in a folder lists what lies beside it, and is no text."""


@dataclass
class Sources:
    """What was found. Each list is sorted, and holds a file once, however often it was named."""

    files: list[str] = field(default_factory=list)
    """To read."""
    ignored: list[str] = field(default_factory=list)
    """In the folders, but of no known kind, hidden, or a manifest."""


def kind(path: str) -> str | None:
    """jsonl, text or parquet; None for a name of no known kind."""
    name = os.path.basename(path).lower()
    endings = [suffix for suffix in KINDS if name.endswith(suffix)]
    return KINDS[max(endings, key=len)] if endings else None


def find(paths: str) -> Sources:
    """The files that `paths` (separated by commas) names.

    Raises:
      ValueError: a path that is not there, is of no known kind, or holds no text.
    """
    found, folders = Sources(), set()
    for path in filter(None, (part.strip() for part in paths.split(","))):
        path = os.path.expanduser(path)
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise ValueError(f"data.paths: {path} matches no file{_nearest(path)}")
        before, again = len(found.files), any(os.path.realpath(match) in folders for match in matches)
        for match in matches:
            if os.path.isdir(match):
                _walk(match, found, folders)
            elif kind(match) is not None:
                found.files.append(match)
            elif match != path:
                found.ignored.append(match)
            else:
                raise ValueError(f"data.paths: {path} is of no kind that is read here; these are: {', '.join(KINDS)}.")
        if len(found.files) == before and not again:
            raise ValueError(f"data.paths: {path} holds no text: no file ends in {', '.join(KINDS)}.")
    return Sources(_once(found.files), _once(found.ignored))


def _walk(folder: str, found: Sources, seen: set[str]) -> None:
    """Follows links to folders, each once, so that a circle of them ends."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"data.paths: folder {error.filename} cannot be read: {error.strerror}.") from error

    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(here) in seen or PREPARED in files:
            folders[:] = []
            continue
        seen.add(os.path.realpath(here))
        for name in files:
            path = os.path.join(here, name)
            read = kind(name) is not None and name != LIST and not name.startswith(".")
            (found.files if read else found.ignored).append(path)
        found.ignored += [os.path.join(here, name, "") for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _once(paths: list[str]) -> list[str]:
    """Sorted, and of several names of one file the first."""
    by_file: dict[str, str] = {}
    for path in sorted(os.path.normpath(path) for path in paths):
        by_file.setdefault(os.path.realpath(path), path)
    return sorted(by_file.values())


def _nearest(path: str) -> str:
    """A hint with the name nearest to the first part of the path that is not there."""
    here, parts = Path(Path(path).anchor or "."), Path(path).parts[bool(Path(path).anchor) :]
    for part in parts:
        if not (here / part).exists():
            break
        here = here / part
    else:
        return "."
    try:
        names = sorted(os.listdir(here))
    except OSError:
        return "."
    near = difflib.get_close_matches(part, names, n=1)
    return f"; did you mean {here / near[0]}?" if near else f" (there is no {part} in {here.resolve()})."
