"""`data get`: a real corpus, from a recipe. Imports no JAX."""

import argparse
import difflib
from pathlib import Path

from data import get as recipes
from mtx.errors import ConfigError, DataError


def main(flags: argparse.Namespace, words: list[str]) -> int:
    """`python main.py data get debian --out DIR`: returns the exit code."""
    known = ", ".join(recipes.RECIPES)
    if flags.config is not None:
        raise ConfigError("data get takes a recipe, not --config; such as python main.py data get austen --out austen.")
    if len(words) != 1:
        said = f"got {', '.join(words)}" if words else "none is given"
        raise ConfigError(f"data get takes one recipe ({said}): {known}; such as python main.py data get austen.")
    (recipe,) = words
    if recipe not in recipes.RECIPES:
        near = difflib.get_close_matches(recipe.lower(), recipes.RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"there is no recipe {recipe!r}{hint} Recipes: {known}.")
    if not flags.out:
        raise ConfigError(f"data get needs a folder for the corpus; add --out {recipe}.")
    folder = Path(flags.out).expanduser()
    try:
        corpus = recipes.run(recipe, folder, lambda line: print(line, flush=True))
    except ValueError as error:
        raise DataError(str(error)) from error
    print(table(corpus))
    print(f"to train on it: python main.py --config FILE data=TextFiles data.paths={folder}")
    return 0


def table(corpus: recipes.Corpus) -> str:
    """What the folder holds, a line a source, and what it lacks."""
    lines = [f"{'priority':>8}  {'source':<18}{'documents':>11}{'MB of text':>12}  {'package':<42}licence"]
    for source in corpus.written:
        package = f"{source.package} {source.version}"
        lines.append(
            f"{source.priority:>8}  {source.name:<18}{source.documents:>11,}{source.bytes / 1e6:>12.1f}  {package:<42}"
            f"{source.licence}"
        )
    documents, text_bytes = sum(s.documents for s in corpus.written), sum(s.bytes for s in corpus.written)
    lines.append(f"{'':>8}  {'all':<18}{documents:>11,}{text_bytes / 1e6:>12.1f}")
    lines += [f"lacking: {name}: {why}" for name, why in corpus.lacking.items()]
    return "\n".join(lines)
