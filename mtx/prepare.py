"""Text into token shards, which training reads: needed once, and again when the text or the settings change."""

import argparse
from typing import Any

from data import TextFiles
from mtx.config import Loaded, check, load
from mtx.errors import DataError


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py prepare --config FILE`: returns the exit code."""
    run(load(flags.config, words))
    return 0


def run(loaded: Loaded, *, argv: list[str] | None = None, verbose: bool = False, **_: Any) -> None:
    """Prepares `loaded.config.data`, or checks every byte of shards that are there. Touches no device.

    Raises: ConfigError for a config that could not train either; DataError.
    """
    check(loaded.config)
    data = loaded.config.data
    if not isinstance(data, TextFiles):
        print(f"data={type(data).__name__} needs no preparation.")
        return
    try:
        data.prepare(lambda line: print(line, flush=True))
        print(table(data))
    except ValueError as error:
        raise DataError(str(error)) from error


def table(data: TextFiles) -> str:
    """What the shards hold, one line a split."""
    manifest = data.manifest()
    lines = [f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes of text':>18}{'bytes/token':>14}"]
    for name, shard in manifest.splits.items():
        tokens = shard.tokens - shard.documents  # the ends of documents are no text
        ratio = shard.bytes / max(tokens, 1)
        lines.append(f"{name:<12}{shard.documents:>14,}{shard.tokens:>18,}{shard.bytes:>18,}{ratio:>14.3f}")
    bad = sum(n for source in manifest.sources for n in source.bad.values())
    empty = sum(source.empty for source in manifest.sources)
    lines.append(f"left out: {bad:,} bad records, {empty:,} empty documents, {len(manifest.ignored):,} other files")
    lines.append(f"shards: {data.prepared_folder()}")
    return "\n".join(lines)
