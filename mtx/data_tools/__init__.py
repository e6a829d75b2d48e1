"""The verb `data`, which has subcommands; each is a module with `main(flags, words) -> int`, and knows its flags."""

import argparse
import difflib

from mtx.command import bare
from mtx.errors import ConfigError

SUBCOMMANDS = {  # how it is called, and what it does
    "get": ("data get debian|austen --out DIR", "a real corpus out of Debian packages, none of which is installed"),
    "show": ("data show RUN --sample N", "where a sample of a run comes from, and its text"),
    "stats": ("data stats --config FILE [--html FILE]", "how much there is of what was prepared, and how long it is"),
}
FLAGS = {"out": "get", "sample": "show", "html": "stats"}
"""Which subcommand has which flag."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all subcommands."""
    said = "".join(f"\n  {usage}\n      {what}" for usage, what in SUBCOMMANDS.values())
    add = parser.add_argument_group("data", f"subcommands:{said}").add_argument
    add("--out", metavar="DIR", help="get: the folder for the corpus")
    add("--sample", metavar="N", type=int, help="show: the sample's number, from 0; samples count sequences, not steps")
    add("--html", metavar="FILE", help="stats: where the page with plots goes; else beside the shards")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py data SUBCOMMAND ...`: returns the exit code."""
    subcommand = take_subcommand(words)
    for flag, owner in FLAGS.items():
        if getattr(flags, flag) is not None and owner != subcommand:
            raise ConfigError(f"--{flag} is for data {owner}; leave it out of data {subcommand}.")
    if subcommand == "get":
        from mtx.data_tools import get

        return get.main(flags, words)
    if subcommand == "show":
        from mtx.data_tools import show

        return show.main(flags, words)
    from mtx.data_tools import stats

    return stats.main(flags, words)


def take_subcommand(words: list[str]) -> str:
    """Removes the first bare word, which is the subcommand. Raises: ConfigError."""
    usages = ", ".join(f"python main.py {usage}" for usage, _ in SUBCOMMANDS.values())
    if not (found := bare(words)):
        raise ConfigError(f"data needs a subcommand: {usages}.")
    name = words.pop(found[0])
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name.lower(), SUBCOMMANDS, n=1)
        hint = f"; did you mean data {near[0]}?" if near else "."
        raise ConfigError(f"there is no data {name}{hint} Type: {usages}.")
    return name
