"""Overrides: `a.b=value` words of a command line, applied to a config whatever their order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from mtx.config import schema
from mtx.config.schema import is_config, join
from mtx.errors import ConfigError

COMMAND_LINE = "command line"
FLAGS = ("config", "devices", "verbose", "fresh", "accept-changes", "coordinator", "processes", "process", "help")
"""Of main.py, for near misses."""
T = TypeVar("T")


def parse_words(words: Sequence[str]) -> dict[str, str]:
    """`a.b=1`, `--a.b=1` and `--a.b 1` as {"a.b": "1"}.

    Raises: ConfigError for a word that is none of them, and for one path with two values.
    """
    found: dict[str, str] = {}
    problems, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        path, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                problems.append(f"{word!r} is not an override; write path=value without spaces, such as steps=100.")
                continue
            if not rest or rest[0].startswith("--"):
                flag = schema.near(path, FLAGS, 0.75)  # mesh is no --fresh
                hint = f"there is no flag {word}; did you mean --{flag}?" if flag else ""
                problems.append(hint or f"{word} needs a value; write {path}=value.")
                continue
            text = rest.pop(0)
        if found.setdefault(path, text) != text:
            problems.append(f"{path} is given twice, as {found[path]} and as {text}; keep one.")
    raise_all(problems)
    return found


def override(config: T, words: Sequence[str]) -> T:
    """A config with `path=value` words applied. Raises: ConfigError."""
    return apply(config, parse_words(words), {}).config


def raise_all(problems: Sequence[str]) -> None:
    """Raises: ConfigError with one line for each problem, and first how many there are if several."""
    if problems:
        head = [f"{len(problems)} problems in the configuration:"] if len(problems) > 1 else []
        raise ConfigError("\n".join([*head, *problems]))


class Applied(NamedTuple, Generic[T]):
    """A config with overrides."""

    config: T
    origins: dict[str, str]
    """Where each value that is not a class's default came from, by dotted path."""
    remarks: tuple[str, ...]
    """For each class that replaced another, what it kept of its values and what it did not, where that may surprise."""


def apply(config: T, overrides: dict[str, str], origins: dict[str, str]) -> Applied[T]:
    """The config with overrides ({path: text}); `origins` are those of its own values.

    Classes are chosen before their fields are set, outermost first. A class that replaces another keeps the values of
    optional fields that a base of both declares, and that were not at the old class's default: a field that each
    declares for itself has its own meaning and default (`b2` of AdamW and of Lion). A required field must be given,
    since its meaning may differ (`count` of Steps and of Tokens).
    Raises: ConfigError naming every wrong override.
    """
    root = _Node()
    for path, text in overrides.items():
        node = root
        for name in path.split("."):
            node = node.children.setdefault(name, _Node())
        node.text = text
    applier = _Applier(config, dict(origins))
    result = applier.build("", type(config), config, root)
    raise_all(applier.problems)
    return Applied(result, applier.origins, tuple(applier.remarks))


@dataclass
class _Node:
    text: str | None = None
    children: dict[str, "_Node"] = field(default_factory=dict)

    def paths(self, prefix: str) -> list[str]:
        """The dotted paths that are set below this node."""
        found = []
        for name, child in self.children.items():
            found += ([join(prefix, name)] if child.text is not None else []) + child.paths(join(prefix, name))
        return found


@dataclass
class _Applier:
    root: Any
    origins: dict[str, str]
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def build(self, path: str, annotation: Any, old: Any, node: _Node) -> Any:
        """The new value at a path. With problems, the old one: nobody will see it."""
        before = len(self.problems)
        value = old if node.text is None else self._parsed(path, annotation, old, node)
        if len(self.problems) > before:
            return old
        if isinstance(value, type):
            fields = _carried(old, value)
            self._remark(
                path, old, value, set(fields), {n for n, child in node.children.items() if child.text is not None}
            )
        elif is_config(value):
            fields, value = schema.values(value), type(value)
        else:
            self._no_fields(path, annotation, value, node)
            return value
        for name, child in node.children.items():
            known = schema.fields(value).get(name)
            if known is None:
                self.problems.append(self._unknown(path, annotation, value, name, child))
            else:
                was = fields.get(name, known.default)
                fields[name] = self.build(join(path, name), known.annotation, was, child)
        if len(self.problems) > before:
            return old
        return self._made(path, value, fields, old)

    def _remark(self, path: str, old: Any, cls: type, kept: set[str], given: set[str]) -> None:
        """Says what a class that replaces another keeps, and which values of the same name it does not."""
        if not is_config(old) or type(old) is cls:
            return
        new, was, kept = schema.fields(cls), type(old).__name__, kept - given
        left = [
            f"{name}={schema.show(new[name].default)}, not {schema.show(getattr(old, name))}"
            for name, known in schema.fields(type(old)).items()
            if name in new and name not in kept | given and new[name].default is not MISSING
            if getattr(old, name) not in (known.default, new[name].default)
        ]
        if kept or left:
            parts = [f"keeps {', '.join(name for name in new if name in kept)} of {was}"] if kept else []
            parts += [f"has its own {' and '.join(left)} as {was} had"] if left else []
            self.remarks.append(f"{path}={cls.__name__} {'; it '.join(parts)}.")

    def _parsed(self, path: str, annotation: Any, old: Any, node: _Node) -> Any:
        assert node.text is not None
        try:
            value = schema.parse(node.text, annotation)
        except ValueError as error:
            hint = ""
            named = schema.classes(annotation)
            if len(named) == 1:
                (cls,) = named.values()
                names = ", ".join(join(path, name) for name in schema.fields(cls))
                hint = f"; set its fields: {names}" if names else ""
            self.problems.append(sentence(f"{path}={node.text} {error}{hint}"))
            return old
        self.origins[path] = COMMAND_LINE
        if value is type(old):
            return old
        kept = _carried(old, value) if isinstance(value, type) else {}
        below = f"{path}."
        for known in [p for p in self.origins if p.startswith(below)]:
            if known.removeprefix(below).partition(".")[0] not in kept:
                del self.origins[known]
        return value

    def _made(self, path: str, cls: type, fields: dict[str, Any], old: Any) -> Any:
        missing = [
            name for name, known in schema.fields(cls).items() if known.default is MISSING and name not in fields
        ]
        if missing:
            needed = " ".join(f"{join(path, name)}=..." for name in missing)
            had = [f"{name}={schema.show(getattr(old, name))}" for name in missing if hasattr(old, name)]
            aside = f" ({type(old).__name__} had {', '.join(had)})" if had else ""
            self.problems.append(f"{path}={cls.__name__} needs {needed} too{aside}.")
            return old
        return cls(**fields)

    def _no_fields(self, path: str, annotation: Any, value: Any, node: _Node) -> None:
        for name, child in node.children.items():
            inner = join(path, name)
            if named := schema.classes(annotation):
                state = "None" if value is None else "not chosen"
                classes = " or ".join(f"{path}={cls}" for cls in named)
                self.problems.append(f"{inner} cannot be set: {path} is {state}; choose its class too: {classes}.")
            else:
                text = child.text if child.text is not None else "..."
                self.problems.append(
                    f"{inner} cannot be set: {path} is a single value ({schema.type_name(annotation)}); "
                    f"write {path}={text}."
                )

    def _unknown(self, path: str, annotation: Any, cls: type, name: str, child: _Node) -> str:
        inner = join(path, name)
        wrong = ([inner] if child.text is not None else []) + child.paths(inner)
        subject = f"{wrong[0]}: {cls.__name__} has no field {name!r}"
        having = [n for n, other in schema.classes(annotation).items() if name in schema.fields(other)]
        if having:
            have = f"{', '.join(having)} {'have' if len(having) > 1 else 'has'} it"
            return f"{subject}; {have}: add {path}={having[0]}."
        names = list(schema.fields(cls))
        found = self._suggestion(path, names, name, wrong[0])
        hint = f"; did you mean {found}?" if found else "."
        return f"{subject}{hint} Its fields: {', '.join(names)}." if names else f"{subject}; it has none."

    def _suggestion(self, path: str, names: list[str], name: str, wrong: str) -> str | None:
        """A field of that name deeper down, a sibling of a like name, a flag, or a like field anywhere."""
        everywhere = _paths(self.root)
        leaf = wrong.rpartition(".")[2]

        def shortest(holds: Callable[[str], bool]) -> str | None:
            return min((p for p in everywhere if holds(p.rpartition(".")[2])), key=len, default=None)

        if deeper := [p for p in everywhere if p.startswith(path) and p.rpartition(".")[2] == name]:
            return min(deeper, key=len)
        if not path and (flag := name.replace("_", "-")) in FLAGS:
            return f"--{flag}"
        sibling = _near(name, names) or next((n for n in names if name in n.split("_")), None)
        if sibling:
            whole = join(path, sibling) + wrong[len(join(path, name)) :]
            return whole if whole in everywhere else join(path, sibling)
        if not path and (flag := schema.near(name, FLAGS)):
            return f"--{flag}"
        like = _near(leaf, {p.rpartition(".")[2] for p in everywhere})
        said = leaf.replace("_", " ").lower()
        by_help = [p for p, help in everywhere.items() if help.lower().startswith(said)]
        return shortest(lambda field: leaf == field or leaf in field.split("_")) or (
            max(by_help, key=len) if by_help else shortest(lambda field: field == like)
        )


def _near(name: str, names: Iterable[str]) -> str | None:
    """The nearest name, unless it shares letters with a word that means something else: save_every, eval_every."""
    found = schema.near(name, names)
    return found if found and all(schema.near(word, found.split("_")) for word in name.split("_")) else None


def _carried(old: Any, cls: type) -> dict[str, Any]:
    """What a new class takes over from the object that it replaces. See `apply`."""
    bases = [base for base in cls.__mro__ if base in type(old).__mro__]
    shared = {name for base in bases for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    carried = {}
    for name, known in schema.fields(type(old)).items() if is_config(old) else ():
        new, value = schema.fields(cls).get(name), getattr(old, name)
        if new is None or name not in shared or known.default is MISSING or new.default is MISSING:
            continue
        if value != known.default and schema.fits(value, new.annotation):
            carried[name] = value
    return carried


def _paths(config: Any, prefix: str = "") -> dict[str, str]:
    """The help of every field, by dotted path."""
    found = {}
    for name, value in schema.values(config).items():
        found[join(prefix, name)] = schema.help_of(type(config), name)
        if is_config(value):
            found |= _paths(value, join(prefix, name))
    return found


def sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."
