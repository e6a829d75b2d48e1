"""The verb `eval`: a run's loss, perplexity and bits per byte, from its newest checkpoint that verifies."""

import argparse
import json

import jax

from mtx.command import run_folder
from mtx.train import keep_compiled, open_run, talk, validate


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("eval RUN").add_argument
    add("--split", default="validation", choices=("train", "validation", "test"), help="which part of the data")
    add("--step", metavar="N", type=int, help="this checkpoint instead of the newest")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py eval RUN`: prints one JSON object. `eval_sequences=0` measures all of the split."""
    folder, overrides = run_folder(flags, words, "eval")
    talk()
    keep_compiled()
    run = open_run(folder, overrides, flags.step)
    eval_fn = jax.jit(run.program.eval_sums)
    with jax.set_mesh(run.program.mesh):
        values = validate(run.config, run.program, run.loader, eval_fn, run.params, split=flags.split)
    found = {name.removeprefix("val/"): value for name, value in values.items()}
    print(json.dumps({"run": str(folder), "step": run.step, "split": flags.split, **found}))
    return 0
