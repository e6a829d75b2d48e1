"""Text into token shards, which training reads: needed once, and again when the text or the settings change."""

import argparse
import difflib
import shlex
from typing import Any

from data import Prepared, sources_of
from data.corpus import named
from data.sources.blend import shards_of
from mtx.config import Loaded, check, load
from mtx.errors import ConfigError, DataError

TRAINED = {
    "bpe": ["data.tokenizer=Bpe"],
    "wordpiece": ["data.tokenizer=WordPiece"],
    "unigram": ["data.tokenizer=SentencePiece", "data.tokenizer.kind=unigram"],
}
"""What --train-tokenizer stands for."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add = parser.add_argument_group("prepare --config FILE").add_argument
    names = f"{', '.join(list(TRAINED)[:-1])} or {list(TRAINED)[-1]}"
    add("--workers", metavar="N", type=int, help="processes; as many as there are cores without it")
    add("--train-tokenizer", metavar="KIND:SIZE", help=f"learn one from the text: {names}, such as bpe:16384")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py prepare --config FILE`: returns the exit code."""
    if flags.workers is not None and flags.workers < 1:
        raise ConfigError(f"--workers {flags.workers} must be at least 1; without it there are as many as cores.")
    if flags.train_tokenizer is None:
        run(load(flags.config, words), workers=flags.workers)
        return 0
    chosen = tokenizer_words(flags.train_tokenizer)
    if not isinstance((data := load(flags.config, words).config.data), Prepared):
        why = f"data={type(data).__name__} has bytes as tokens"
        raise ConfigError(f"--train-tokenizer is for data=TextFiles; {why}; add data=TextFiles data.paths=...")
    loaded = load(flags.config, words + chosen)
    size, needed = getattr(loaded.config.model, "vocab_size", None), loaded.config.data.vocab_size
    if isinstance(size, int) and size < needed and "model.vocab_size" not in loaded.overrides:
        chosen.append(f"model.vocab_size={needed}")
        loaded = load(flags.config, words + chosen)
    run(loaded, workers=flags.workers)
    again = shlex.join(["python", "main.py", "--config", str(flags.config), *words, *chosen])
    print(f"to train on it, set {' '.join(chosen)} in the config or say: {again}")
    return 0


def tokenizer_words(text: str) -> list[str]:
    """`bpe:16384` as overrides. Raises: ConfigError."""
    kind, _, size = text.replace("=", ":").partition(":")
    near = difflib.get_close_matches(kind.lower(), TRAINED, n=1)
    if kind not in TRAINED or not size.isdecimal() or "=" in text:
        asked = f"--train-tokenizer {text} must be a kind and a number of tokens"
        kinds = f"Kinds: {', '.join(TRAINED)}."
        hint = f"{near[0] if near else 'bpe'}:{size if size.isdecimal() else 16384}"
        raise ConfigError(f"{asked}; {'did you mean' if near else 'such as'} {hint}{'?' if near else '.'} {kinds}")
    return [*TRAINED[kind], f"data.tokenizer.vocab_size={int(size)}"]


def run(loaded: Loaded, *, workers: int | None = None, **_: Any) -> None:
    """Prepares `loaded.config.data`, or checks every byte of shards that are there. Touches no device.

    Raises: ConfigError for a config that could not train either; DataError.
    """
    check(loaded.config)
    for remark in loaded.remarks:
        print(remark)
    for name, data in sources_of(loaded.config.data).items():
        if name:
            print(f"source {name}")
        if not isinstance(data, Prepared):
            print(f"data={type(data).__name__} needs no preparation.")
            continue
        try:
            with named(name):
                data.prepare(lambda line: print(line, flush=True), workers=workers)
            for shards in shards_of(data):
                print(table(shards))
        except ValueError as error:
            raise DataError(str(error)) from error


def table(data: Prepared) -> str:
    """What the shards hold, one line a split."""
    manifest = data.manifest()
    several = any(shard.sequences != shard.documents for shard in manifest.splits.values())
    head = f"{'split':<12}{'documents':>14}" + f"{'sequences':>14}" * several
    lines = [f"{head}{'tokens':>18}{'bytes of text':>18}{'bytes/token':>14}"]
    for name, shard in manifest.splits.items():
        tokens = shard.tokens - shard.documents  # the ends of documents are no text
        ratio = shard.bytes / max(tokens, 1)
        start = f"{name:<12}{shard.documents:>14,}" + f"{shard.sequences:>14,}" * several
        lines.append(f"{start}{shard.tokens:>18,}{shard.bytes:>18,}{ratio:>14.3f}")
    bad = sum(n for source in manifest.sources for n in source.bad.values())
    empty = sum(source.empty for source in manifest.sources)
    lines.append(f"left out: {bad:,} bad records, {empty:,} empty documents, {len(manifest.ignored):,} other files")
    lines.append(f"shards: {data.prepared_folder()}")
    return "\n".join(lines)
