"""`data stats`: documents, bytes, tokens and lengths of each source and split, as a table and as a page with plots."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data import Prepared, sources_of
from data.corpus import named
from data.statistics import Statistics, of_split
from mtx.config import Loaded, load
from mtx.data_tools.page import page
from mtx.errors import DataError

Table = Mapping[str, Mapping[str, Statistics]]
"""Source to split to numbers."""
PREPARED = Path("prepared")
BAR = 40
"""Characters of the longest bar."""


def main(flags: argparse.Namespace, words: list[str]) -> int:
    """`python main.py data stats --config FILE`: returns the exit code."""
    loaded = load(flags.config, words)
    try:
        measured = measure(sources_of(loaded.config.data).items())
    except ValueError as error:
        raise DataError(str(error)) from error
    print("\n".join(table(measured)))
    for source, splits in measured.items():
        print("\n".join(["", *histogram(source, splits)]))
    path = Path(flags.html).expanduser() if flags.html else default_page(loaded)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(f"{loaded.path}: data={type(loaded.config.data).__name__}", measured), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}; name another file: --html FILE.") from error
    print(f"\nplots: {path}")
    return 0


def measure(sources: Iterable[tuple[str, Any]]) -> Table:
    """Of each source (its name and its config), the splits. Raises: ValueError that names the source."""
    found = {}
    for name, data in sources:
        with named(name):
            found[name] = {split: of_split(part) for split, part in data.load().splits.items()}
    return found


def default_page(loaded: Loaded) -> Path:
    """Beside the shards; where there are none of ours, or those of several sources, by the config file's name."""
    data = loaded.config.data
    return (
        data.prepared_folder() / "stats.html" if isinstance(data, Prepared) else PREPARED / f"{loaded.path.stem}.html"
    )


def table(measured: Table) -> Iterator[str]:
    """A line a split."""
    wide = max(len(name) for name in ("source", *measured)) + 2 if any(measured) else 0
    yield (
        f"{'source' if wide else '':<{wide}}{'split':<12}{'documents':>12}{'tokens':>17}{'bytes of text':>17}"
        f"{'bytes/token':>13}{'tokens/document:':>18}{'mean':>9}{'median':>9}{'longest':>11}"
    )
    for source, splits in measured.items():
        for split, found in splits.items():
            text_bytes = "unknown" if found.bytes is None else f"{found.bytes:,}"
            ratio = "unknown" if found.bytes_per_token is None else f"{found.bytes_per_token:.3f}"
            yield (
                f"{source if split == next(iter(splits)) else '':<{wide}}{split:<12}{found.documents:>12,}"
                f"{found.tokens:>17,}{text_bytes:>17}{ratio:>13}{'':>18}{found.mean:>9,.1f}{found.median:>9,.0f}"
                f"{found.longest:>11,}"
            )


def histogram(source: str, splits: Mapping[str, Statistics]) -> Iterator[str]:
    """A line a bucket: how many documents of each split are in it, and a bar for their share of all splits'."""
    counts = {split: {b.shortest: b.documents for b in found.histogram} for split, found in splits.items()}
    shortest = sorted({length for of_split in counts.values() for length in of_split})
    sums = {length: sum(of_split.get(length, 0) for of_split in counts.values()) for length in shortest}
    whole, largest = max(sum(sums.values()), 1), max(sums.values(), default=1)
    yield f"{f'{source}: ' if source else ''}documents by tokens"
    yield f"{'tokens':>19}" + "".join(f"{split:>14}" for split in splits) + f"{'share':>9}"
    for length in shortest:
        cells = "".join(f"{of_split.get(length, 0):>14,}" for of_split in counts.values())
        longest = max(2 * length - 1, 0)
        said = f"{length:,} to {longest:,}" if longest > length else f"{length}"
        bar = "#" * round(BAR * sums[length] / largest)
        yield f"{said:>19}{cells}{100 * sums[length] / whole:>8.1f}%  {bar}".rstrip()
