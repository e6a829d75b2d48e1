"""Are the installed packages those that mtx was tested with, and do they fit one another?"""

import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from mtx.doctor.finding import Finding, Request

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")


def check(request: Request) -> Iterator[Finding]:
    ranges, python = _wanted()
    yield _python(python)
    for package in PACKAGES:
        yield _package(package, ranges.get(package, ""))
    yield from _pair()
    yield from _plugins()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def within(version: str, ranges: str) -> bool:
    """Whether a release is in ranges like `>=0.10.2,<0.13`; of others (~=, !=) nothing is said."""
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
        "==": lambda a, b: a == b,
    }
    found = re.findall(r"(>=|<=|==|<|>)\s*([\d.]+)", ranges)
    return all(compare[sign](*_padded(version, bound)) for sign, bound in found)


def _padded(*versions: str) -> list[tuple[int, ...]]:
    numbers = [[int(n) for n in re.findall(r"^[\d.]*\d|", version)[0].split(".") if n] for version in versions]
    width = max(map(len, numbers))
    return [tuple(n + [0] * (width - len(n))) for n in numbers]


def _wanted() -> tuple[dict[str, str], str]:
    """Package to range, and Python's, as pyproject.toml has them; of an installed mtx, as its metadata has them."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
        lines, python = project["dependencies"], project["requires-python"]
    else:
        lines, python = metadata.requires("mtx") or [], metadata.metadata("mtx")["Requires-Python"]
    pairs = (re.match(r"([\w.-]+)\s*([^;]*)", line) for line in lines if "extra ==" not in line)
    return {pair[1]: pair[2].strip() for pair in pairs if pair}, python


def _python(wanted: str) -> Finding:
    version = platform.python_version()
    if within(version, wanted):
        return Finding("python", version)
    return Finding("python", f"{version}, mtx needs {wanted}", "FAIL", "make a new environment: uv venv --python 3.12")


def _package(name: str, wanted: str) -> Finding:
    version, fix = installed(name), f"pip install -U '{name}{wanted}'"
    if version is None:
        return Finding(name, "not installed", "FAIL", fix)
    if within(version, wanted):
        return Finding(name, version)
    return Finding(name, f"{version}, mtx needs {wanted}", "FAIL", fix)


def _pair() -> Iterator[Finding]:
    """jax says which jaxlib it takes; pip lets one upgrade either alone."""
    jax, jaxlib = installed("jax"), installed("jaxlib")
    if jax is None or jaxlib is None:
        return
    lines = [line for line in metadata.requires("jax") or [] if re.match(r"jaxlib\b(?!.*extra)", line)]
    if all(within(jaxlib, line) for line in lines):
        yield Finding("jax and jaxlib", f"{jax} with {jaxlib}")
        return
    fix = f"pip install -U 'jax=={jax}' 'jaxlib=={jax}'"
    yield Finding("jax and jaxlib", f"jax {jax} needs {lines[0]}, found jaxlib {jaxlib}", "FAIL", fix)


def _plugins() -> Iterator[Finding]:
    found = {name: version for name in PLUGINS if (version := installed(name))}
    jaxlib, kinds = installed("jaxlib"), {name.split("-")[1] for name in found}
    kind = max(kinds, default="")
    if len(kinds) > 1:
        fix = "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt (or both of cuda13)"
        yield Finding("gpu plugin", "both cuda12 and cuda13 are installed", "WARN", fix)
    elif wrong := [f"{name} {version}" for name, version in found.items() if version != jaxlib]:
        found_text = f"{' and '.join(wrong)} with jaxlib {jaxlib}: JAX will not use it"
        yield Finding("gpu plugin", found_text, "FAIL", f"pip install -U 'jax[{kind}]=={installed('jax')}'")
    elif kind:
        yield Finding("gpu plugin", f"{kind} {jaxlib}")
