"""Training: the loop, and the only place with side effects. `main` is the verb."""

import argparse

from mtx.config import Cluster, load
from mtx.train.run import run

__all__ = ["main", "run"]


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py --config FILE`: returns the exit code."""
    cluster = Cluster.of(flags.coordinator, flags.processes, flags.process)
    run(
        load(flags.config, words),
        argv=argv,
        verbose=flags.verbose,
        devices=flags.devices and flags.devices * (cluster.processes if cluster else 1),
        cluster=cluster,
        fresh=flags.fresh,
        accept_changes=flags.accept_changes,
    )
    return 0
