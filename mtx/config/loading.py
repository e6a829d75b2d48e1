"""A config file and overrides, as a config that knows where each value came from."""

import ast
import contextlib
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtx.config import overrides, schema
from mtx.config.root import Config
from mtx.config.schema import is_config, join
from mtx.errors import ConfigError

DEFAULT = "default"
ROOT = Path(__file__).resolve().parents[2]
"""Of the repository: config files may import one another as `configs.x`."""


@dataclass(frozen=True)
class Loaded:
    """A config, and how it came about."""

    config: Config
    path: Path
    """The config file."""
    source: str
    """Its text."""
    from_file: Config
    """What it returned, before overrides."""
    overrides: Mapping[str, str]
    """Texts of the command line's values, by dotted path."""
    origins: Mapping[str, str]
    """Where values that are not a class's default came from, by dotted path."""
    remarks: tuple[str, ...] = ()
    """What classes of the command line kept of those that they replaced."""

    def origin(self, path: str) -> str:
        """`default`, `configs/x.py:12`, `command line`, or what it was derived from."""
        return self.origins.get(path, DEFAULT)


def load(path: str | Path | None, words: Sequence[str] = ()) -> Loaded:
    """Run `get_config()` of the file at `path` and apply the overrides in `words`. Touches no device.

    Raises: ConfigError if either is wrong, in one line for each problem.
    """
    if path is None:
        raise ConfigError("--config FILE is missing; such as --config configs/quickstart.py.")
    given = overrides.parse_words(words)
    path = Path(path)
    source = _read(path)
    from_file = _run(path, source)
    config, origins, remarks = overrides.apply(from_file, given, _origins(from_file, ast.parse(source), path))
    if config.workdir is None:
        origins["workdir"] = "the config file's name"
    return Loaded(_named_folder(config, path), path, source, _named_folder(from_file, path), given, origins, remarks)


def workdir(loaded: Loaded) -> Path:
    """The run folder."""
    assert loaded.config.workdir is not None
    return Path(loaded.config.workdir)


def _named_folder(config: Config, path: Path) -> Config:
    return replace(config, workdir=f"runs/{path.stem}") if config.workdir is None else config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"there is no config file {path}{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}.") from None


def _nearest_file(path: Path) -> str:
    ours = ROOT / "configs"
    for folder in (path.parent, ours):
        files = {file.stem: file for file in sorted(folder.glob("*.py"))}
        if found := schema.near(path.stem, files):
            return f"; did you mean {_from_here(files[found])}?"
    return f"; {_from_here(ours)} holds {', '.join(file.name for file in sorted(ours.glob('[!_]*.py')))}."


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _run(path: Path, source: str) -> Config:
    name = f"mtx config file {path}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    with _importing(name, module, path.resolve().parent):
        try:
            exec(compile(source, str(path), "exec"), module.__dict__)
        except Exception as error:
            raise ConfigError(_blame(path, error)) from error
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"{path} has no get_config(); define `def get_config() -> Config:` in it.")
        try:
            config = get_config()
        except Exception as error:
            raise ConfigError(_blame(path, error)) from error
    if not isinstance(config, Config):
        raise ConfigError(f"get_config() in {path} returned {_kind(config)}; it must return an mtx.config.Config.")
    return config


def _kind(value: Any) -> str:
    if value is None:
        return "None (is `return` missing?)"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


@contextlib.contextmanager
def _importing(name: str, module: types.ModuleType, folder: Path) -> Iterator[None]:
    """sys.path and sys.modules for a config file's run; neither it nor its neighbours stay behind."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(ROOT))
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.path[:] = path
        for other in set(sys.modules) - before:
            file = getattr(sys.modules[other], "__file__", None)
            if other in (name, "configs") or (file and Path(file).resolve().parent in (folder, ROOT / "configs")):
                del sys.modules[other]


def _blame(path: Path, error: Exception) -> str:
    """An exception of a config file in one line, with the file's line and, for misspelt fields, a hint."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}: {error.msg}."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    text = " ".join(str(error).split())
    if found := re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        owner, wrong = found.groups()
        if cls := schema.reachable(Config).get(owner):
            names = list(schema.fields(cls))
            hint = schema.did_you_mean(wrong, names) or "."
            return f"{where}: {owner} has no field {wrong!r}{hint} Its fields: {', '.join(names) or 'none'}."
    if found := re.match(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)", text):
        return f"{where}: {found[1]} needs {found[2]}."
    hint = ""
    if isinstance(error, NameError | ImportError) and (found := re.search(r"'(\w+)'", text)):
        hint = schema.did_you_mean(found[1], schema.reachable(Config))
    return f"{where}: {type(error).__name__}: {text}{hint}"


# Where a value came from: the config file's syntax tree is walked along with the config that it returned.


def _origins(config: Config, tree: ast.Module, path: Path) -> dict[str, str]:
    """`file:line` of each value that the file sets, `file` where the line is not plain to see."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value
    found: dict[str, str] = {}

    def resolve(node: ast.expr | None, depth: int = 8) -> ast.Call | None:
        """The constructor or replace() call behind an expression."""
        if isinstance(node, ast.Name) and depth:
            return resolve(names.get(node.id), depth - 1)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions and depth:
            inner = functions[node.func.id]
            returned = [n.value for n in ast.walk(inner) if isinstance(n, ast.Return)]
            return resolve(returned[-1], depth - 1) if returned else None
        return node if isinstance(node, ast.Call) else None

    def visit(value: Any, call: ast.Call | None, prefix: str) -> None:
        given: dict[str, ast.expr] = {}
        seen: list[ast.Call] = []
        while call is not None and call not in seen and _name(call.func) == "replace" and call.args:
            given = {k.arg: k.value for k in call.keywords if k.arg} | given
            seen.append(call)
            call = resolve(call.args[0])
        if call is not None and _name(call.func) == type(value).__name__:
            given = {k.arg: k.value for k in call.keywords if k.arg} | given
        for name, field in schema.fields(type(value)).items():
            here, inner, node = join(prefix, name), getattr(value, name), given.get(name)
            if node is not None:
                found[here] = f"{path}:{node.lineno}"
            elif inner != field.default:
                found[here] = str(path)
            if is_config(inner) and (node is not None or inner != field.default):
                visit(inner, resolve(node), here)

    start = functions.get("get_config")
    returned = [n.value for n in ast.walk(start) if isinstance(n, ast.Return)] if start else []
    visit(config, resolve(returned[-1]) if returned else None, "")
    return found


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
