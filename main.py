"""python main.py [verb] --config FILE [flags] [path=value ...]: parse, load, run a verb. No logic."""

import argparse
import difflib
import importlib
import os
import re
import sys

from mtx.errors import ConfigError, UserError

VERBS = {"train": "train a model (what happens without a verb)"}
VALUES = """\
path=value (or --path=value, --path value) sets a field of the config:
  optimizer.schedule.peak_lr=1e-3   mesh.data=4 mesh.model=2   optimizer=Lion optimizer.b1=0.95
`python main.py --config FILE --help` prints every field, its type, value and origin.
"""


def parser() -> argparse.ArgumentParser:
    usage, verbs = __doc__.partition(":")[0], "".join(f"  {verb:<12}{what}\n" for verb, what in VERBS.items())
    raw, no = argparse.RawDescriptionHelpFormatter, False  # --help waits for --config; errors are ours
    p = argparse.ArgumentParser("main.py", usage, f"verbs:\n{verbs}", VALUES, formatter_class=raw, add_help=no)
    p.allow_abbrev, p.exit_on_error = no, no
    p.add_argument("--config", metavar="FILE", help="Python file whose get_config() returns a Config")
    p.add_argument("--devices", metavar="N", type=int, help="simulate N CPU devices (in each process)")
    p.add_argument("-v", "--verbose", action="store_true", help="say more: the whole sharding table")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of a run of several processes")
    p.add_argument("--processes", metavar="N", type=int, help="how many processes")
    p.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")
    p.add_argument("-h", "--help", action="store_true", help="this text; with --config, every field too")
    return p


def take_verb(words: list[str]) -> str:
    """Removes the first bare word, which is the verb, from the words that are not flags."""
    flag_before = [False, *(word.startswith("--") and "=" not in word for word in words)]
    bare = [i for i, word in enumerate(words) if not word.startswith("-") and "=" not in word and not flag_before[i]]
    verb = words.pop(bare[0]) if bare else "train"
    if verb not in VERBS:
        near = [f"--config {verb}"] if verb.endswith(".py") else difflib.get_close_matches(verb, VERBS, n=1)
        near = near or [f"{verb}=VALUE, without spaces"] * ("." in verb)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"there is no verb {verb!r}{hint} Verbs: {', '.join(VERBS)}.")
    return verb


def simulate(devices: int) -> None:
    """Devices on the CPU, for the JAX that is not imported yet."""
    others = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={max(devices, 1)}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


def main(argv: list[str]) -> int:
    try:
        flags, words = parser().parse_known_args(argv[1:])
        verb = take_verb(words)
        if flags.help and flags.config is None:
            print(parser().format_help(), end="")
            return 0
        if flags.devices is not None:
            simulate(flags.devices)
        config = importlib.import_module("mtx.config")
        cluster = config.Cluster.of(flags.coordinator, flags.processes, flags.process)
        loaded = config.load(flags.config, words)
        if flags.help:
            print(parser().format_help(), config.help_text(loaded), sep="\n", end="")
            return 0
        devices = flags.devices and flags.devices * (cluster.processes if cluster else 1)
        run = importlib.import_module(f"mtx.{verb}").run
        run(loaded, argv=argv, verbose=flags.verbose, devices=devices, cluster=cluster)
    except (UserError, argparse.ArgumentError) as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return getattr(error, "exit_code", ConfigError.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
