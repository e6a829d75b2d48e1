"""Debian packages as archives of files: downloaded with apt-get, read with dpkg-deb, never installed.

apt-get has its state in a folder of ours, so that no rights are needed, and nothing of the system changes. It
reads the system's list of mirrors and checks their signatures as ever.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")


class Lacking(Exception):
    """A package that cannot be had, or is not what was expected; says why."""


@dataclass(frozen=True)
class Package:
    """One that the mirrors have."""

    name: str
    version: str


@dataclass(frozen=True)
class Apt:
    """apt, with all that it writes in one folder."""

    folder: Path

    def update(self) -> str:
        """Fetches the lists of packages, and returns the last thing that apt complained about, or nothing.

        Raises:
          ValueError: there is no apt here.
        """
        if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
            raise ValueError(
                f"there is no {missing[0]} here, and this recipe takes Debian packages apart; run it on Debian or "
                "Ubuntu, or in a container of one, and copy the folder."
            )
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        complaints = self._run("apt-get", "update").stderr.strip().splitlines()
        return complaints[-1] if complaints else ""

    def find(self, patterns: Iterable[str]) -> dict[str, list[Package]]:
        """Packages whose whole name matches (`linux-doc-*`), of each pattern; first the highest numbers in a name."""
        known = self._run("apt-cache", "pkgnames").stdout.split()
        matches = {pattern: fnmatch.filter(known, pattern) for pattern in patterns}
        names = sorted({name for matching in matches.values() for name in matching})
        said = self._run("apt-cache", "--no-all-versions", "show", *names).stdout if names else ""
        versions = dict(re.findall(r"^Package: (\S+)\n(?:.+\n)*?Version: (\S+)$", said, re.MULTILINE))
        return {
            pattern: [
                Package(name, versions[name])
                for name in sorted(set(matching), key=_numbers, reverse=True)
                if name in versions  # else the mirrors only speak of it
            ]
            for pattern, matching in matches.items()
        }

    def download(self, packages: Collection[Package]) -> dict[Package, Path | Lacking]:
        """The files of packages, in our folder, or why one cannot be had."""
        files: dict[Package, Path | Lacking] = {}
        done = self._run("apt-get", "download", *(f"{package.name}={package.version}" for package in packages))
        for package in packages:
            found = list(self.folder.glob(f"{package.name}_*.deb"))
            said = [line for line in done.stderr.splitlines() if package.name in line] or ["apt-get does not say why"]
            why = Lacking(f"{package.name} {package.version} cannot be downloaded: {said[-1]}")
            files[package] = found[0] if len(found) == 1 else why
        return files

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        options = {
            "Dir::State": self.folder / "state",
            "Dir::State::status": "/var/lib/dpkg/status",
            "Dir::Cache": self.folder / "cache",
            "APT::Sandbox::User": "root",  # else root's apt-get complains of a folder that its own user cannot write to
            "Acquire::Languages": "none",
        }
        settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return subprocess.run(
            [program, *settings, "-q", *arguments],
            cwd=self.folder,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def read(package: Path, wanted: Mapping[str, re.Pattern[str]]) -> dict[str, dict[str, bytes]]:
    """The regular files of a .deb whose whole path (usr/share/...) matches, in one pass.

    For each key of `wanted`, files by what its pattern's first group holds.

    Raises:
      Lacking: the package cannot be unpacked.
    """
    found: dict[str, dict[str, bytes]] = {key: {} for key in wanted}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None and unpacking.stderr is not None
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                for member in archive:
                    _take(archive, member, wanted, found)
            said = ""
        except (tarfile.TarError, EOFError) as error:
            unpacking.kill()
            said = str(error)
        said = unpacking.stderr.read().decode(errors="replace").strip() or said
    if said:
        raise Lacking(f"{package.name} cannot be unpacked: {said.splitlines()[-1]}")
    return found


def _take(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    wanted: Mapping[str, re.Pattern[str]],
    found: dict[str, dict[str, bytes]],
) -> None:
    path = member.name.removeprefix("./")
    matches = {key: match[1] for key, pattern in wanted.items() if (match := pattern.fullmatch(path))}
    if matches and member.isreg() and (file := archive.extractfile(member)) is not None:
        content = file.read()
        for key, name in matches.items():
            found[key][name] = content
