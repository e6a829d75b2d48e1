"""What config dataclasses say about themselves: fields, types, help, and which values fit a type."""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Field:
    """One field of a config dataclass."""

    name: str
    annotation: Any
    default: Any
    """MISSING if the field is required."""


@lru_cache
def fields(cls: type) -> Mapping[str, Field]:
    """The fields of a config dataclass by name, in order."""
    hints = get_type_hints(cls)
    return {
        f.name: Field(f.name, hints[f.name], f.default if f.default_factory is MISSING else f.default_factory())
        for f in dataclasses.fields(cls)
    }


def values(config: Any) -> dict[str, Any]:
    """A config's fields and values, not recursive."""
    return {name: getattr(config, name) for name in fields(type(config))}


def is_config(value: Any) -> bool:
    """Whether a value (not a class) is a config dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@lru_cache
def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, flattened; of anything else, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for arg in get_args(annotation) for member in alternatives(arg))
    return (annotation,)


def classes(annotation: Any) -> dict[str, type]:
    """The config dataclasses that an annotation names, by class name."""
    members = alternatives(annotation)
    return {member.__name__: member for member in members if dataclasses.is_dataclass(member)}


@lru_cache
def reachable(root: type) -> dict[str, type]:
    """Every config dataclass that a config of this class can hold, itself included, by class name."""
    found: dict[str, type] = {}

    def visit(annotation: Any) -> None:
        for member in alternatives(annotation):
            if get_origin(member) is tuple:
                for arg in get_args(member):
                    visit(arg)
            elif dataclasses.is_dataclass(member) and member.__name__ not in found:
                found[member.__name__] = member
                for field in fields(member).values():
                    visit(field.annotation)

    visit(root)
    return found


def type_name(annotation: Any) -> str:
    """An annotation in the words of a help text: `AdamW | Lion | Sgd`, `none | selective | full`."""
    names = []
    for member in alternatives(annotation):
        if get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif get_origin(member) is tuple:
            names.append(f"tuple of {type_name(get_args(member)[0])}")
        else:
            names.append("None" if member is type(None) else member.__name__)
    return " | ".join(names)


def expected(annotation: Any) -> str:
    """An annotation in the words of an error: `an int or None`, `one of AdamW, Lion, Sgd`."""
    words = {int: "an int", float: "a number", bool: "true or false", str: "a string", type(None): "None"}
    choices, rest = [], []
    for member in alternatives(annotation):
        if get_origin(member) is Literal:
            choices += [str(choice) for choice in get_args(member)]
        elif dataclasses.is_dataclass(member):
            choices.append(member.__name__)
        elif get_origin(member) is tuple:
            rest.append(f"a tuple of {type_name(get_args(member)[0])}")
        else:
            rest.append(words.get(member, getattr(member, "__name__", str(member))))
    if len(choices) > 1:
        rest.insert(0, f"one of {', '.join(choices)}")
    elif choices:
        rest.insert(0, f"a {choices[0]}")
    return " or ".join(rest)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type; an int is a float, a bool is no int."""
    return any(_fits_one(value, member) for member in alternatives(annotation))


def _fits_one(value: Any, member: Any) -> bool:
    if get_origin(member) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(member))
    if get_origin(member) is tuple:
        args = get_args(member)
        if not isinstance(value, tuple):
            return False
        args = (args[0],) * len(value) if args[-1] is Ellipsis else args
        return len(args) == len(value) and all(fits(v, arg) for v, arg in zip(value, args, strict=True))
    if member is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if member is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, member)


def parse(text: str, annotation: Any) -> Any:
    """The value that a command line's text means for a type; for a config dataclass, the class itself.

    Raises: ValueError if it means none; the message continues "path=text ...".
    """
    members = alternatives(annotation)
    named = classes(annotation)
    choices = {str(c): c for member in members if get_origin(member) is Literal for c in get_args(member)}
    if text in choices:
        return choices[text]
    if text in named:
        return named[text]
    if type(None) in members and text in ("None", "none"):
        return None
    if bool in members and text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    if str in members:
        return text
    value = _literal(text)
    if int in members and isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if float in members and int not in members and type(value) is int:
        value = float(value)
    value = tuple(value) if isinstance(value, list) else value
    if value is not MISSING and not isinstance(value, str) and fits(value, annotation):
        return value
    raise ValueError(f"must be {expected(annotation)}{did_you_mean(text.split('(')[0], [*choices, *named])}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return MISSING


def near(word: str, legal: Iterable[str], least: float = 0.6) -> str | None:
    """The legal word nearest to a wrong one, whatever its case, if one is near (difflib's ratio)."""
    by_lower = {name.lower(): name for name in legal}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=least)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    found = near(word, legal)
    return f"; did you mean {found}?" if found else ""


def show(value: Any, limit: int = 70) -> str:
    """A value as one would type it, or as a short constructor call."""
    text = _show(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _show(value: Any) -> str:
    if is_config(value):
        known = fields(type(value)).values()
        said = [f"{f.name}={_show(v)}" for f in known if (v := getattr(value, f.name)) != f.default]
        return f"{type(value).__name__}({', '.join(said)})"
    if isinstance(value, tuple):
        return f"({', '.join(_show(v) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def help_of(cls: type, name: str) -> str:
    """The string under a field, in one line; without one, what its class or the field's own class says."""
    for owner in cls.__mro__:
        if text := _docstrings(owner.__module__).get((owner.__qualname__, name)):
            return text
    named = list(classes(fields(cls)[name].annotation).values())
    return summary(cls) if not named else summary(named[0]) if len(named) == 1 else ""


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return _one_line((cls.__doc__ or "").split("\n\n")[0])


def _one_line(text: str) -> str:
    return " ".join(text.split())


@lru_cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """The strings under the fields of a module's top-level classes; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return {}
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[node.name, field.target.id] = _one_line(after.value.value)
    return found
