"""The verb `doctor`: what is wrong with this machine and its environment, and what to type.

It runs where JAX cannot: JAX is only ever started in child processes with a time limit.
"""

import argparse

from mtx.doctor import cluster, devices, flags, machine, versions
from mtx.doctor.finding import Finding, Request
from mtx.errors import ConfigError

__all__ = ["add_flags", "main"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("doctor").add_argument
    add("--folder", default="runs", help="the run folder to try out (default: %(default)s)")
    add("--need-gb", type=float, default=10.0, help="free disk that a run needs (default: %(default)s)")
    add("--dev", default="/dev", help="where device files are (default: %(default)s)")


def main(flags: argparse.Namespace, words: list[str], argv: list[str]) -> int:
    """`python main.py doctor [FOLDER]`: prints a line per check; 1 if one failed, else 0: warnings do not fail.

    Raises: ConfigError for words that it does not know.
    """
    if len(words) == 1 and "=" not in words[0] and not words[0].startswith("-"):
        flags.folder = words.pop()
    if words:
        raise ConfigError(f"doctor takes no {' '.join(words)}; python main.py doctor --help shows what it takes.")
    request = Request(folder=flags.folder, need_gb=flags.need_gb, dev=flags.dev, coordinator=flags.coordinator)
    found = diagnose(request)
    width = max(len(finding.name) for finding in found)
    for finding in found:
        fix = f"  ->  {finding.fix}" if finding.fix else ""
        print(f"{finding.state:<4}  {finding.name:<{width}}  {finding.found}{fix}")
    count = {state: sum(finding.state == state for finding in found) for state in ("FAIL", "WARN")}
    said = ", ".join(f"{n} {state}" for state, n in count.items() if n)
    print(f"doctor: {said or 'nothing wrong'}")
    return 1 if count["FAIL"] else 0


def diagnose(request: Request) -> list[Finding]:
    """Every check, in the order in which a run would meet them."""
    seen = devices.look(request)
    return [
        *versions.check(request),
        *flags.check(request, seen.started),
        *devices.check(request, seen),
        *machine.check(request),
        *cluster.check(request),
    ]
