"""What needs seqio, and so TensorFlow: a user's module, its Tasks and Mixtures, and the tokens that they give.

It runs in a process that `prepare` starts for it (data/tensorflow_process.py), or in the training process of a live
reader. A `Recipe` says what is asked for, as plain data.
"""

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data import tensorflow_process
from data.sources.seqio_task import vocabulary
from data.tensorflow_process import Wrong


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Of a `SeqioTask`, what decides its tokens."""

    module: str
    mixture: str
    feature: str
    sequence_length: int | None
    use_cached: bool
    seed: int

    def plain(self) -> dict[str, Any]:
        """To send to another process."""
        return asdict(self)


def provider(module: str, name: str) -> Any:
    """A Task or Mixture that a user's module registers. Raises: Wrong."""
    tensorflow_process.tensorflow()
    try:
        import seqio
    except ImportError as error:
        raise ValueError("data=SeqioTask needs seqio, which is not installed: pip install 'mtx[seqio]'.") from error
    sys.path[:] = tensorflow_process.path()
    _import(module)
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in names:
        return seqio.get_mixture_or_task(name)
    near = difflib.get_close_matches(name, names, n=1)
    known = f"did you mean {near[0]}?" if near else f"registered are {', '.join(sorted(names)[:12]) or 'none'}"
    raise Wrong("mixture", f"is no Task or Mixture once {module} is imported; {known}")


def _import(module: str) -> None:
    importlib.invalidate_caches()
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise Wrong("module", f"cannot be imported: {error}") from error
        parent, _, last = str(error.name).rpartition(".")
        paths = sys.modules[parent].__path__ if parent else None
        near = difflib.get_close_matches(last, [found.name for found in pkgutil.iter_modules(paths)], n=1)
        hint = f"; did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ", where Python looks for it"
        raise Wrong("module", f"is not there: there is no {error.name}{hint}") from error
    except Exception as error:
        raise Wrong("module", f"cannot be imported: {said(error)}") from error


def said(error: Exception) -> str:
    """An error's name and last line: TensorFlow's first lines are about itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".removesuffix(": ")


def tasks(found: Any) -> list[Any]:
    """The Tasks of a Mixture, by name; of a Task, itself."""
    import seqio

    return list(seqio.get_subtasks(found))


def feature(task: Any, recipe: Recipe) -> Any:
    """The output feature that the tokens are taken from. Raises: Wrong."""
    if recipe.feature not in task.output_features:
        raise Wrong("feature", f"is no output feature of {task.name}; it has {', '.join(task.output_features)}")
    found = task.output_features[recipe.feature]
    if found.rank != 1 or not found.dtype.is_integer:
        raise Wrong("feature", f"holds {found.dtype.name} of rank {found.rank} in {task.name}, not integers of rank 1")
    return found


def lengths(found: Any, recipe: Recipe) -> Mapping[str, int] | None:
    """What preprocessors are told. Raises: Wrong if one asks and nothing is said."""
    if recipe.sequence_length is not None:
        return dict.fromkeys(found.output_features, recipe.sequence_length)
    for task in tasks(found):
        for step in task.preprocessors:
            asks = inspect.signature(step).parameters.get("sequence_length")
            if asks is not None and asks.default is inspect.Parameter.empty:
                name = getattr(getattr(step, "func", step), "__name__", type(step).__name__)
                why = f"must be said: the preprocessor {name} of {task.name} asks for it. Nothing else is cut to it"
                raise Wrong("sequence_length", f"{why}; try 512")
    return None


def dataset(found: Any, recipe: Recipe, split: str, **more: Any) -> Any:
    """A Task's or Mixture's tokens of a split as a tf.data.Dataset, untrimmed; in order and once, unless `more` says
    otherwise. Raises: Wrong."""
    return whole_examples(found, recipe, split, **more).map(lambda example: example[recipe.feature])


def whole_examples(found: Any, recipe: Recipe, split: str, **more: Any) -> Any:
    """The same with all that an example holds."""
    settings = {"shuffle": False, "num_epochs": 1, "seed": recipe.seed, "try_in_mem_cache": False} | more
    told = lengths(found, recipe)
    try:
        return found.get_dataset(
            told, split=split, use_cached=recipe.use_cached, trim_output_features=False, **settings
        )
    except Exception as error:
        raise Wrong("mixture", f"cannot be read, split {split} of {found.name}: {said(error)}") from error


def python_inside(found: Any) -> str | None:
    """The name of an operation in a dataset's graphs that calls Python, if there is one."""
    graphs, waiting, seen = [], [found], set()
    while waiting:
        here = waiting.pop()
        if id(here) not in seen:
            seen.add(id(here))
            waiting += here._inputs()
            graphs += [each.function.graph for each in here._functions()]
    for graph in graphs:
        nodes = [*graph.as_graph_def().node]
        nodes += [node for each in graph.as_graph_def().library.function for node in each.node_def]
        for node in nodes:
            if "PyFunc" in node.op:
                return str(node.op)
    return None


def document(tokens: np.ndarray, end: int) -> np.ndarray:
    """Tokens (int32) without the ends behind them, however many a Task appends."""
    inner = np.flatnonzero(tokens != end)
    tokens = tokens[: inner[-1] + 1] if len(inner) else tokens[:0]
    return np.clip(tokens, -1, 2**31 - 1).astype(np.int32)  # what is too large for int32 is outside any vocabulary


_KEPT: list[Any] = []
"""Iterators that TensorFlow may hang in when it takes them apart: they live as long as the process."""


# For another process


def describe(recipe: dict[str, Any], splits: dict[str, str], live: bool) -> Iterator[dict[str, Any]]:
    """The tasks with their rates and which of the splits (field -> seqio's name) they have, the vocabulary, remarks."""
    asked = Recipe(**recipe)
    found = provider(asked.module, asked.mixture)
    parts = tasks(found)
    for field, split in splits.items():
        if not any(split in task.splits for task in parts):
            has = ", ".join(sorted({split for task in parts for split in task.splits}))
            none = f", or data.{field}=None" if field != "split" else ""
            raise Wrong(field, f"is no split of {asked.mixture}; try {has}{none}")
    definition = definition_of(found, asked)
    lengths(found, asked)
    rates = [1 / len(parts)] * len(parts) if live else _rates(found, parts)
    yield {
        "is_mixture": found not in parts,
        "tasks": [
            {
                "name": task.name,
                "rate": rate,
                "splits": [field for field in splits if splits[field] in task.splits],
                "bytes": {split: _size(task, split) for split in splits.values()},
            }
            for task, rate in zip(parts, rates, strict=True)
        ],
        "vocabulary": definition.decode(),
        "remarks": [remark for task in parts for remark in _remarks(task, asked, splits["split"], live)],
    }


def definition_of(found: Any, recipe: Recipe) -> bytes:
    """The definition of the one vocabulary of all tasks. Raises: Wrong."""
    definitions = {}
    for task in tasks(found):
        try:
            definitions[task.name] = vocabulary.describe(feature(task, recipe).vocabulary)
        except Wrong:
            raise
        except ValueError as error:
            raise Wrong("feature", f"of {task.name} {error}") from error
    first, *others = definitions
    for name in others:
        if definitions[name] != definitions[first]:
            raise Wrong("mixture", f"has different vocabularies in {first} and {name}; one set of tokens needs one")
    return definitions[first]


def _size(task: Any, split: str) -> int:
    """Of the files that a split is read from, in bytes."""
    files = task.source.list_shards(split) if split in task.splits else []
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _rates(found: Any, parts: list[Any]) -> list[float]:
    """As seqio evaluates them, of 1. Raises: Wrong."""
    if found in parts:
        return [1.0]
    if getattr(found._sample_fn, "func", found._sample_fn).__name__ != "sample_from_datasets":
        raise Wrong("mixture", "mixes by a sample_fn of its own, which shards cannot follow; try data.reader=Live")
    try:
        rates = [float(found.get_rate(task)) for task in parts]
    except Exception as error:
        raise Wrong("mixture", f"has a rate that cannot be evaluated: {said(error)}") from error
    if not all(rate >= 0 and np.isfinite(rate) for rate in rates) or not sum(rates):
        raise Wrong("mixture", f"has rates {rates}; they must be at least 0, and one above it")
    return [rate / sum(rates) for rate in rates]


def _remarks(task: Any, recipe: Recipe, split: str, live: bool) -> Iterator[str]:
    """What a user should know. Raises: Wrong for Python in the graph of what is read live."""
    others = [name for name in task.output_features if name != recipe.feature]
    if others:
        yield f"{task.name}: only {recipe.feature} is read, not {', '.join(others)}"
    if split in task.splits and (name := python_inside(dataset(task, recipe, split))):
        if live:
            why = f"cannot be Live: {task.name} has Python in its graph ({name}), in which TensorFlow hangs"
            raise Wrong("reader", f"{why}; do that work before, or try data.reader=None")
        yield f"{task.name}: has Python in its graph ({name}), which is slow and may hang"


def documents(recipe: dict[str, Any], split: str) -> Iterator[Any]:
    """Of each document of a Task, in its order: the bytes of its text, then its tokens without ends.

    A document with tokens outside the vocabulary has -1 bytes.
    """
    asked = Recipe(**recipe)
    task = provider(asked.module, asked.mixture)
    tokenizer = vocabulary.read(vocabulary.describe(feature(task, asked).vocabulary))
    found = dataset(task, asked, split)
    yield {"ready": task.name}  # what comes now is no longer the import of TensorFlow
    iterator = found.as_numpy_iterator()
    if python_inside(found):
        _KEPT.append(iterator)
    for tokens in examples(iterator, f"{asked.module}, split {split} of {task.name}"):
        tokens = document(tokens, tokenizer.end_of_document)
        size = tokenizer.text_bytes(tokens) if vocabulary.holds(tokenizer, tokens) else -1
        yield np.concatenate([np.array([size], np.int32), tokens])


def examples(iterator: Iterator[Any], doing: str) -> Iterator[Any]:
    """What an iterator of tf.data's gives. Raises: ValueError for whatever goes wrong in its graphs."""
    while True:
        try:
            example = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{doing}: {said(error)}") from error
        yield example
