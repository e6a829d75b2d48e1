"""A config as JSON, as lines, as differences, and as a help text."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar, get_args, get_origin

from mtx.config import schema
from mtx.config.loading import Loaded, load
from mtx.config.root import Config
from mtx.config.schema import is_config, join

T = TypeVar("T")
CLASS = "class"
ABSENT = "(absent)"


def dump(config: Any) -> dict[str, Any]:
    """A config as JSON's types; each dataclass is an object whose `class` is its name."""
    return {CLASS: type(config).__name__} | {name: _json(value) for name, value in schema.values(config).items()}


def _json(value: Any) -> Any:
    if is_config(value):
        return dump(value)
    return [_json(item) for item in value] if isinstance(value, tuple) else value


def read_dump(dumped: Mapping[str, Any], cls: type[T] = Config) -> T:
    """The config that `dump` wrote: `read_dump(dump(config)) == config`.

    Raises: KeyError or TypeError if this version has other classes or fields; compare with `differences`.
    """
    known = schema.fields(cls)
    given = {name: value for name, value in dumped.items() if name != CLASS}
    return cls(**{name: _read(value, known[name].annotation) for name, value in given.items()})


def _read(value: Any, annotation: Any) -> Any:
    if isinstance(value, Mapping):
        return read_dump(value, schema.classes(annotation)[value[CLASS]])
    if isinstance(value, list):
        (inner,) = [get_args(m)[0] for m in schema.alternatives(annotation) if get_origin(m) is tuple]
        return tuple(_read(item, inner) for item in value)
    return value


def flat(dumped: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dump as {"optimizer": "AdamW", "optimizer.b1": 0.9, ...}: classes and values by dotted path."""
    found = {prefix: dumped[CLASS]} if prefix else {}
    for name, value in dumped.items():
        if name != CLASS:
            found |= _flat(value, join(prefix, name))
    return found


def _flat(value: Any, here: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return flat(value, here)
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {path: x for i, item in enumerate(value) for path, x in flat(item, f"{here}[{i}]").items()}
    return {here: value}


def differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted path, old value, new value) wherever two configs, or dumps of configs, differ.

    A field that is younger than a dump is taken to have had its default there.
    """
    a, b = (flat(_completed(c) if isinstance(c, Mapping) else dump(c)) for c in (old, new))
    shown = [(path, _text(a, path), _text(b, path)) for path in a | b]
    return [(path, x, y) for path, x, y in shown if x != y]


def _completed(dumped: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the fields that are younger than it, unless this version cannot read it."""
    try:
        return dump(read_dump(dumped))
    except (KeyError, TypeError):
        return dumped


def _text(values: Mapping[str, Any], path: str) -> str:
    return schema.show(values[path], limit=10_000) if path in values else ABSENT


def text(loaded: Loaded) -> str:
    """Every value and its origin, one a line: `optimizer.b1 = 0.9  # default`."""
    rows = [(f"{path} = {schema.show(value)}", loaded.origin(path)) for path, value in _lines(loaded.config, "")]
    width = min(60, max(len(left) for left, _ in rows))
    return "".join(f"{left:<{width}}  # {origin}\n" for left, origin in rows)


def _lines(config: Any, prefix: str) -> list[tuple[str, Any]]:
    """Values by dotted path; the class of a part only where there is a choice."""
    found: list[tuple[str, Any]] = []
    for name, field in schema.fields(type(config)).items():
        here, value = join(prefix, name), getattr(config, name)
        if not is_config(value):
            found.append((here, value))
            continue
        if len(schema.alternatives(field.annotation)) > 1:
            found.append((here, type(value).__name__))
        found += _lines(value, here)
    return found


WIDTH = 100


def print_help(path: str, words: Sequence[str]) -> int:
    """Prints every field of a config file with overrides; returns the exit code. Raises: ConfigError."""
    print(f"\n{help_text(load(path, words))}", end="")
    return 0


def help_text(loaded: Loaded) -> str:
    """Every field: path, type, value, origin, help; and what the other classes of a union have."""
    head = f"{loaded.path}: every field, its type, value and origin. Set one with path=value on the command line."
    lines = [*textwrap.wrap(head, WIDTH), *_help(loaded, loaded.config, "")]
    return "\n".join(lines) + "\n"


def _help(loaded: Loaded, config: Any, prefix: str) -> list[str]:
    lines: list[str] = []
    for name, field in schema.fields(type(config)).items():
        here, value = join(prefix, name), getattr(config, name)
        if not prefix:
            lines.append("")
        value_text = type(value).__name__ if is_config(value) else schema.show(value)
        single = is_config(value) and len(schema.alternatives(field.annotation)) == 1
        left = here if single else f"{here}: {schema.type_name(field.annotation)} = {value_text}"
        origin = "" if single else loaded.origin(here)
        gap = WIDTH - len(left) - len(origin)
        wide = [*textwrap.wrap(left, WIDTH, subsequent_indent="        "), origin.rjust(WIDTH)]
        lines += [f"{left}{' ' * gap}{origin}"] if gap > 1 else wide
        lines += _indented(schema.help_of(type(config), name), 4)
        for other in schema.classes(field.annotation).values():
            if not single:
                lines += _indented(_alternative(other, type(value)), 6)
        if is_config(value):
            lines += _help(loaded, value, here)
    return [line.rstrip() for line in lines]


def _alternative(cls: type, present: type) -> str:
    fields = schema.fields(cls).values()
    needs = ", ".join(f.name if f.default is MISSING else f"{f.name}={schema.show(f.default)}" for f in fields)
    own = "" if cls is present else f" Fields: {needs or 'none'}."
    return f"{cls.__name__}: {schema.summary(cls)}{own}"


def _indented(text: str, by: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * by, subsequent_indent=" " * (by + 2 * (by > 4)))
