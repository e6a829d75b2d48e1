"""A corpus from its recipe: downloads each package, writes a .jsonl per source, and keeps a manifest.

The manifest is written again after each source, so that a recipe that was interrupted goes on where it stopped, and a
complete one does nothing. The same packages give the same bytes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from data.get import apt
from data.get.apt import Apt, Lacking, Package
from data.get.formats import CORRUPT
from data.get.sources import DEBIAN, RECIPES, Source

FORMAT = "mtx corpus 1"
"""Changed when the same packages would give other bytes."""
MANIFEST = "manifest.json"
LEAST_BYTES = 200
"""A document with less text, such as the gloss of a rare word, is left out."""
DOWNLOADS = ".packages"
"""Folder in the corpus's while it is made; hidden, so that nobody reads it as text."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """A source as it was written, and what it was made of."""

    name: str
    """The source; its file is NAME.jsonl."""
    priority: int
    """Of two like documents, the one with the lower number is kept."""
    package: str
    version: str
    package_sha256: str
    """Of the .deb."""
    licence: str
    documents: int
    bytes: int
    """Of their text, in UTF-8."""
    short: int
    """Documents left out: less than 200 bytes."""
    file_bytes: int
    file_sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Whether its file is still as it was written."""
        path = folder / f"{self.name}.jsonl"
        try:
            with open(path, "rb") as file:
                return os.fstat(file.fileno()).st_size == self.file_bytes and (
                    hashlib.file_digest(file, "sha256").hexdigest() == self.file_sha256
                )
        except OSError:
            return False


@dataclass(frozen=True)
class Corpus:
    """What is in the folder now."""

    written: list[Written]
    """In the order of priorities."""
    lacking: dict[str, str]
    """Sources of the recipe that could not be had, and why."""


def run(recipe: str, folder: Path, progress: Progress) -> Corpus:
    """Makes what is not there yet of a recipe, `austen` or `debian`.

    Raises:
      ValueError: no source could be had, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = {source.name: source for source in read_manifest(folder) if source.is_whole(folder)}
        todo = [source for source in RECIPES[recipe] if source.name not in done]
        if not todo:
            progress(f"{folder} is complete: every file is as it was written")
            return Corpus(list(done.values()), {})
        shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)  # of a run that was killed
        try:
            lacking = _make(todo, done, folder, progress)
        finally:
            shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be written: {error.strerror or error}.") from error
    return Corpus(_sorted(done.values()), lacking)


def read_manifest(folder: Path) -> list[Written]:
    """What the manifest lists; nothing if there is none, or it is another program's or version's."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return [Written(**source) for source in content["sources"]] if content["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _make(todo: list[Source], done: dict[str, Written], folder: Path, progress: Progress) -> dict[str, str]:
    """Writes sources into `folder` and `done`; returns those that are lacking."""
    lacking: dict[str, str] = {}
    downloads = Apt((folder / DOWNLOADS).absolute())
    progress("fetches the lists of packages")
    complaint = downloads.update()
    packages = _by_package(downloads, todo, lacking)
    if packages:
        progress(f"downloads {len(packages)} packages" if len(packages) > 1 else "downloads a package")
    for package, path in downloads.download(packages).items():
        try:
            if isinstance(path, Lacking):
                raise path
            sha256 = _sha256(path)
            progress(f"unpacks   {path.name}, SHA-256 {sha256}")
            files = apt.read(path, {source.name: source.files for source in packages[package]})
            path.unlink()
        except Lacking as error:
            lacking |= {source.name: str(error) for source in packages[package]}
            continue
        for source in packages[package]:
            try:
                done[source.name] = written = _write(source, package, sha256, files.pop(source.name), folder)
            except Lacking as error:
                lacking[source.name] = str(error)
                continue
            _write_manifest(folder, done.values())
            progress(f"wrote     {source.name}: {written.documents:,} documents, {written.bytes / 1e6:.1f} MB of text")
    if not done:
        said = f" apt-get says: {complaint}" if complaint else ""
        raise ValueError(f"no package of the recipe can be had from this machine's mirrors: {_reasons(lacking)}.{said}")
    return lacking


def _reasons(lacking: dict[str, str]) -> str:
    reasons = list(dict.fromkeys(lacking.values()))
    return reasons[0] + f" (and {len(reasons) - 1} more)" * (len(reasons) > 1)


def _by_package(downloads: Apt, todo: list[Source], lacking: dict[str, str]) -> dict[Package, list[Source]]:
    matching = downloads.find({source.package for source in todo})
    found: dict[Package, list[Source]] = {}
    for source in todo:
        packages = matching[source.package]
        if source.newest < len(packages):
            found.setdefault(packages[source.newest], []).append(source)
        else:
            number = "second " * bool(source.newest)
            lacking[source.name] = f"they have no {number}package {source.package}"
    return found


def _write(source: Source, package: Package, sha256: str, files: dict[str, bytes], folder: Path) -> Written:
    path, priority = folder / f"{source.name}.jsonl", DEBIAN.index(source) + 1
    documents, text_bytes, short, file_bytes, digest = 0, 0, 0, 0, hashlib.sha256()
    temporary = folder / DOWNLOADS / path.name
    with open(temporary, "wb") as file:
        try:
            for name, text in source.format(files):
                content = _trim(text).encode()
                if len(content) <= LEAST_BYTES:
                    short += 1
                    continue
                record = {"text": content.decode(), "source": source.name, "name": name, "priority": priority}
                line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
                file.write(line)
                digest.update(line)
                documents, text_bytes, file_bytes = documents + 1, text_bytes + len(content), file_bytes + len(line)
        except CORRUPT as error:
            raise Lacking(f"{package.name} {package.version} is not laid out as expected: {error!r}") from error
        file.flush()
        os.fsync(file.fileno())
    if not documents:
        raise Lacking(f"{package.name} {package.version} is not laid out as expected: no documents are found in it")
    temporary.rename(path)
    return Written(
        name=source.name,
        priority=priority,
        package=package.name,
        version=package.version,
        package_sha256=sha256,
        licence=source.licence,
        documents=documents,
        bytes=text_bytes,
        short=short,
        file_bytes=file_bytes,
        file_sha256=digest.hexdigest(),
    )


def _trim(text: str) -> str:
    """Without empty lines at either end, or NUL characters, which `prepare` takes for a damaged file."""
    return re.sub(r"\A\s*\n", "", text.replace("\0", "")).rstrip() + "\n"


def _write_manifest(folder: Path, written: Iterable[Written]) -> None:
    content = {"format": FORMAT, "sources": [asdict(source) for source in _sorted(written)]}
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(folder / MANIFEST)


def _sorted(written: Iterable[Written]) -> list[Written]:
    return sorted(written, key=lambda source: source.priority)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
