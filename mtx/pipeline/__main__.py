"""python -m mtx.pipeline --stages P --microbatches M --schedule NAME: a schedule's picture and its figures."""

import argparse
import difflib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mtx.errors import ConfigError, StorageError, UserError
from mtx.pipeline import draw
from mtx.pipeline.schedules import AnySchedule, Interleaved, Schedule, Table
from mtx.pipeline.simulate import Costs, Figures, simulate

KINDS = {kind.__name__: kind for kind in get_args(AnySchedule)}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m mtx.pipeline", allow_abbrev=False, exit_on_error=False, description=__doc__)
    p.add_argument("--stages", metavar="P", type=int, default=4, help="pipeline stages (default: %(default)s)")
    p.add_argument("--microbatches", metavar="M", type=int, default=8, help="of one step (default: %(default)s)")
    p.add_argument("--schedule", metavar="NAME", default="OneFOneB", help=f"{', '.join(KINDS)} (default: %(default)s)")
    p.add_argument("--chunks", metavar="V", type=int, help="Interleaved: virtual stages on each stage")
    three = ("FORWARD", "BACKWARD", "WEIGHT")
    said = "times of a microbatch on a stage (default: 1 3 1; with --keep 1 1 1, right for model.remat=none)"
    p.add_argument("--costs", metavar=three, type=float, nargs=3, help=said)
    said = "forward keeps what backward needs (every model.remat but stage), instead of the stage's input alone"
    p.add_argument("--keep", action="store_true", help=said)
    p.add_argument("--draw", metavar="FILE.svg", type=Path, help="write the picture as SVG")
    return p


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises: ConfigError for a flag that there is not, or a value that it cannot have."""
    p = parser()
    try:
        flags, rest = p.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}.") from None
    if rest:
        known = [word for action in p._actions for word in action.option_strings]
        near = difflib.get_close_matches(rest[0].partition("=")[0].lower(), known, n=1)
        raise ConfigError(f"there is no flag {rest[0]}" + (f"; did you mean {near[0]}?" if near else "."))
    for name in ("stages", "microbatches"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} {getattr(flags, name)} must be at least 1.")
    if flags.draw is not None and flags.draw.suffix != ".svg":
        raise ConfigError(f"--draw {flags.draw} must end in .svg, the only format drawn.")
    flags.costs = flags.costs or [1.0, 1.0 if flags.keep else 3.0, 1.0]
    if min(flags.costs) <= 0:
        raise ConfigError("--costs must be three positive numbers, such as --costs 1 2 1.")
    return flags


def chosen(name: str, chunks: int | None) -> Schedule:
    """Raises: ConfigError for a schedule that there is not, or for one that has no chunks."""
    if name not in KINDS:
        by_lower = {kind.lower(): kind for kind in KINDS}
        near = difflib.get_close_matches(name.lower(), by_lower, n=1)
        near = near or [lower for lower in by_lower if lower.startswith(name.lower())][:1]
        hint = f"did you mean {by_lower[near[0]]}? " if near else ""
        raise ConfigError(f"there is no schedule {name!r}; {hint}Schedules: {', '.join(KINDS)}.")
    kind = KINDS[name]
    if chunks is not None and kind is not Interleaved:
        raise ConfigError(f"{name} has no chunks; leave --chunks out, or take --schedule Interleaved.")
    schedule = kind() if chunks is None else Interleaved(chunks=chunks)
    for field, problem in schedule.check():
        raise ConfigError(f"--{field} {getattr(schedule, field)} {problem}.")
    return schedule


def figures(table: Table, found: Figures, costs: Costs) -> str:
    """The figures, a line each."""

    def per_stage(counts: Sequence[int]) -> str:
        return f"{max(counts)}  (per stage: {' '.join(map(str, counts))})"

    lines = [
        f"ticks             {found.ticks}",
        f"bubble            {found.bubble:.1%} of the time",
        f"time              {found.time:g}, {found.time / found.ideal:.3f} of the ideal {found.ideal:g}  "
        f"(forward {costs.forward:g}, backward {costs.backward:g}, weight {costs.weight:g})",
        f"stashed inputs    {per_stage(found.stash)}",
        f"held gradients    {per_stage(found.gradients)}",
    ]
    if table.keeps:
        lines.append(f"kept operands     {per_stage(found.kept)}")
    if table.has_weight_jobs:
        lines.append(f"waiting weights   {per_stage(found.weights)}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    try:
        flags = parse(argv)
        schedule = chosen(flags.schedule, flags.chunks)
        forward, backward, weight = flags.costs
        costs = Costs(forward=forward, backward=backward, weight=weight)
        table = schedule.table(flags.stages, flags.microbatches, keeps=flags.keep)
        found = simulate(table, costs)
        title = f"{str(schedule).removesuffix('()')}, {flags.stages} stage{'s' if flags.stages > 1 else ''}, "
        title += f"{flags.microbatches} microbatch{'es' if flags.microbatches > 1 else ''}"
        print(title, draw.text(table, shutil.get_terminal_size().columns), figures(table, found, costs), sep="\n\n")
        if flags.draw is not None:
            said = f"{title}: {found.ticks} ticks, bubble {found.bubble:.1%}"
            try:
                flags.draw.write_text(draw.svg(table, costs, said), "utf-8")
            except OSError as error:
                raise StorageError(f"{flags.draw} cannot be written: {error.strerror}.") from None
            print(f"\ndrawn in {flags.draw}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
