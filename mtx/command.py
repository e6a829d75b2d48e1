"""The command line: verbs, flags, and what is wrong with one. Imports no JAX, so that help and errors are quick."""

import argparse
import difflib
import logging
import os
import re
from pathlib import Path

from mtx.errors import ConfigError

USAGE = "python main.py [verb] [RUN | --config FILE] [flags] [path=value ...]"
VERBS = {  # the module of mtx that holds it, and what it does
    "train": ("train", "train a model (what happens without a verb); the same command goes on where it stopped"),
    "eval": ("evaluate", "measure a run's newest checkpoint: loss, perplexity, bits per byte"),
    "generate": ("generate", "continue prompts with a run's newest checkpoint"),
    "prepare": ("prepare", "turn text into token shards before training"),
    "data": ("data_tools", "get a corpus, measure one, or show a sample of a run: data get, stats, show"),
    "doctor": ("doctor", "look for what is wrong with this machine, and say how to mend it"),
}
OF_PREPARE = {"--train-tokenizer": "which says what to type for", "--workers": "which may be run before"}
VALUES = """\
path=value (or --path=value, --path value) sets a field of the config:
  optimizer.schedule.peak_lr=1e-3   mesh.data=4 mesh.model=2   optimizer=Lion optimizer.b1=0.95
`python main.py --config FILE --help` prints every field, its type, value and origin.
"""


def parser() -> argparse.ArgumentParser:
    no = False  # --help waits for --config; errors are ours
    verbs = "verbs:\n" + "".join(f"  {verb:<12}{what}\n" for verb, (_, what) in VERBS.items())
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser("main.py", USAGE, verbs, VALUES, formatter_class=raw, add_help=no)
    p.allow_abbrev, p.exit_on_error = no, no
    p.add_argument("--config", metavar="FILE", help="Python file whose get_config() returns a Config")
    p.add_argument("--devices", metavar="N", type=int, help="simulate N CPU devices (in each process)")
    p.add_argument("-v", "--verbose", action="store_true", help="say more: the whole sharding table")
    p.add_argument("--fresh", action="store_true", help="train: start anew in a folder that holds checkpoints")
    p.add_argument("--accept-changes", action="store_true", help="train: go on though model or data changed")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of a run of several processes")
    p.add_argument("--processes", metavar="N", type=int, help="how many processes")
    p.add_argument("--process", metavar="I", type=int, help="which one this is, from 0")
    p.add_argument("-h", "--help", action="store_true", help="this text; with --config every field, with a verb its")
    return p


def bare(words: list[str]) -> list[int]:
    """Where words stand that are neither a flag, nor path=value, nor the value of `--path value`."""
    flag_before = [False, *(word.startswith("--") and "=" not in word for word in words)]
    return [i for i, word in enumerate(words) if not word.startswith("-") and "=" not in word and not flag_before[i]]


def take_verb(words: list[str]) -> str:
    """Removes the first bare word, which is the verb, from the words that are not flags."""
    verb = words.pop(found[0]) if (found := bare(words)) else "train"
    if verb not in VERBS:
        near = difflib.get_close_matches(verb.lower(), (*VERBS, "--help"), n=1)
        near = [f"--config {verb}"] if verb.endswith(".py") else near
        near = near or [f"{verb}=VALUE, without spaces"] * ("." in verb)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"there is no verb {verb!r}{hint} Verbs: {', '.join(VERBS)}.")
    for flag, hint in OF_PREPARE.items() if verb != "prepare" else ():
        if any(word.startswith(flag) for word in words):
            raise ConfigError(f"{flag} is for prepare alone, {hint} {verb}.")
    return verb


def refuse_strangers(verb: str, flags: argparse.Namespace) -> None:
    """Raises: ConfigError for a flag of train given to another verb: it would do nothing."""
    of_train = ["fresh", "accept_changes"] + ["coordinator", "processes", "process"] * (verb != "doctor")
    for name in of_train if verb != "train" else []:
        if getattr(flags, name) not in (None, False):
            raise ConfigError(f"--{name.replace('_', '-')} is for train alone; leave it out of {verb}.")


def simulate(devices: int) -> None:
    """Devices on the CPU, for the JAX that is not imported yet."""
    others = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={max(devices, 1)}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA's threads, else as many as cores or devices, whichever is more: a device may block several of them in
    # collectives that do not depend on one another, and none is left for those that they wait for.
    os.environ.setdefault("NPROC", str(max(32, 4 * devices)))


def log_to_stderr(first: bool = True) -> None:
    """Logging to standard error; processes other than the first only warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    logging.getLogger("mtx").setLevel(logging.INFO if first else logging.WARNING)


def run_folder(flags: argparse.Namespace, words: list[str], verb: str) -> tuple[Path, list[str]]:
    """The run folder of a verb that takes one, and what is left of the words. Raises: ConfigError."""
    found = bare(words)
    if flags.config is not None:
        raise ConfigError(f"{verb} takes a run folder, not --config; such as python main.py {verb} runs/quickstart.")
    if len(found) != 1:
        said = f"got {', '.join(words[i] for i in found)}" if found else "none is given"
        raise ConfigError(f"{verb} takes one run folder ({said}); such as python main.py {verb} runs/quickstart.")
    (at,) = found
    return Path(words[at]), [*words[:at], *words[at + 1 :]]
