"""The documentation that every Python installation carries: real text without a download.

One document per module of the standard library (its docstring, then signature and docstring of each class and
function) and one per pydoc topic. Source files are parsed, never imported: imports have side effects.
"""

import ast
import contextlib
import gc
import os
import platform
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data.corpus import Corpus
from data.tokenizer import Bytes

UNDOCUMENTED = frozenset({"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"})
"""Packages that are tables, applications or dead: an eighth of the parsing time, little to read."""
TESTS = frozenset({"idle_test", "test", "tests"})
"""Folders of tests, at any depth."""


@dataclass(frozen=True, kw_only=True)
class PythonDocs:
    """The running Python's documentation, bytes as tokens: about 2 MB, different on each Python version."""

    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their names; strictly between 0 and 1."""

    tokenizer: ClassVar[Bytes] = Bytes()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, known without loading."""
        return self.tokenizer.vocab_size

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, what is wrong with its value and what to type) for each wrong field."""
        if not 0 < self.validation_fraction < 1:
            yield "validation_fraction", "must lie strictly between 0 and 1; try 0.05"

    def is_prepared(self) -> bool:
        """Whether `load` will do: always, there is nothing to write first."""
        return True

    def load(self) -> Corpus:
        """Reads the documentation, in 1 to 3 seconds; the same corpus each time on one installation.

        Raises:
          ValueError: this Python has no source files, or `validation_fraction` leaves a split empty.
        """
        stdlib = Path(sysconfig.get_path("stdlib"))
        modules, topics = module_documents(stdlib), topic_documents(stdlib)
        if not modules:
            raise ValueError(
                f"data=PythonDocs finds no Python source under {stdlib}: this Python ships its standard "
                "library zipped or compiled; run a full one, as python.org, pyenv, conda, uv and apt have it."
            )
        return Corpus.from_documents(
            modules | topics,
            source=f"Python {platform.python_version()} docs ({len(modules)} modules, {len(topics)} topics)",
            validation_fraction=self.validation_fraction,
        )


def module_documents(stdlib: Path) -> dict[str, str]:
    """Documents of the modules in a standard library's folder that have docstrings, by dotted name.

    Only names that the running Python lists as its standard library count: not site-packages, sitecustomize
    or strangers' files.
    """
    documents = {}
    with _no_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Other people's escape sequences.
        for path in _source_files(stdlib):
            parts = path.relative_to(stdlib).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            entries = list(_entries(ast.parse(path.read_bytes(), filename=str(path))))
            if entries:
                documents[name] = f"module {name}\n\n" + "\n\n".join(entries) + "\n"
    return documents


def topic_documents(stdlib: Path) -> dict[str, str]:
    """Documents of pydoc's topics (what `help("LAMBDA")` shows), by name; none where not installed."""
    path = stdlib / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    statements = ast.parse(path.read_bytes(), filename=str(path)).body
    values = [node.value for node in statements if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    topics = ast.literal_eval(values[0])
    return {f"topic {name}": f"topic {name}\n\n{topics[name].strip()}\n" for name in sorted(topics)}


def _source_files(stdlib: Path) -> Iterator[Path]:
    """Source files of the standard library, in an order that depends on their names only."""
    for folder, folders, files in os.walk(stdlib):
        top = Path(folder) == stdlib
        keep = sys.stdlib_module_names - UNDOCUMENTED if top else None
        folders[:] = sorted(name for name in folders if name not in TESTS and (keep is None or name in keep))
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix == ".py" and (keep is None or stem in keep):
                yield Path(folder, file)


def _entries(module: ast.Module) -> Iterator[str]:
    """The module's docstring, then signature and docstring of whatever has one, as in the source."""
    doc = ast.get_docstring(module)
    if doc:
        yield doc.rstrip()
    yield from _definitions(module, "")


def _definitions(parent: ast.AST, prefix: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield f"{_signature(node, prefix)}\n{textwrap.indent(doc.rstrip(), '    ')}"
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _definitions(node, prefix)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {prefix}{node.name}({ast.unparse(node.args)}){returns}"


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of objects without cycles; looking for some took 15 to 40 % of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
