"""What a run was: written to its folder before anything else happens, and read from it."""

import json
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from mtx.config.loading import ROOT, Loaded
from mtx.config.printing import differences, dump, read_dump, text
from mtx.config.root import Config
from mtx.errors import ConfigError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_run_folder(loaded: Loaded, workdir: Path, argv: list[str]) -> None:
    """Writes what is needed to know, and to repeat, a run:

    config.json the resolved config, config.txt the same with each value's origin, config.py the config
    file, overrides.txt what the command line changed in it, run.json command, versions and git commit,
    uncommitted.diff what git has not committed (absent if nothing). An earlier run's are replaced.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    changed = differences(loaded.from_file, loaded.config)
    commit, dirty, diff = _git()
    run = {
        "command": shlex.join([sys.executable, *argv]),
        "argv": list(argv),
        "folder": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "versions": versions(),
        "git_commit": commit,
        "git_uncommitted": dirty,
    }
    files = {
        "config.json": json.dumps(dump(loaded.config), indent=2) + "\n",
        "config.txt": text(loaded),
        "config.py": loaded.source,
        "overrides.txt": "".join(f"{path}: {old} -> {new}\n" for path, old, new in changed),
        "run.json": json.dumps(run, indent=2) + "\n",
    }
    for name, content in files.items():
        (workdir / f"{name}.tmp").write_text(content, encoding="utf-8")
        (workdir / f"{name}.tmp").replace(workdir / name)  # a kill leaves the old one or the new one
    uncommitted = workdir / "uncommitted.diff"
    if diff:
        uncommitted.write_bytes(diff)
    else:
        uncommitted.unlink(missing_ok=True)


def read_config(folder: Path) -> Config:
    """The config that a run folder was last started with. Raises: ConfigError."""
    path = folder / "config.json"
    try:
        return read_dump(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise ConfigError(f"{folder} is no run folder: it has no config.json; such as runs/quickstart.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not of this version: {type(error).__name__}: {error}.") from error


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide results; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, list[str], bytes]:
    """The commit, the files that differ from it, and the difference; nothing where git or a repository is not."""
    commit = _ask_git("rev-parse", "HEAD")
    status = _ask_git("status", "--porcelain") or b""
    diff = (_ask_git("diff", "HEAD", "--binary") if commit else b"") or b""
    return commit.decode().strip() if commit else None, status.decode(errors="replace").splitlines(), diff


def _ask_git(*arguments: str) -> bytes | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=20, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout if answer.returncode == 0 else None
