"""Pictures of a table: text for a terminal, SVG for a page. One row per stage."""

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from mtx.pipeline.schedules import Table
from mtx.pipeline.simulate import Costs

FILL = {"F": (70, 130, 200), "B": (60, 160, 90), "W": (225, 145, 50)}
SAID = {"F": "forward", "B": "backward", "W": "weight gradients"}
UNIT, ROW, TOP, LEFT = 24, 30, 44, 64  # pixels: a tick's cost of 1, a stage's height, the title, the stages' names


class Job(NamedTuple):
    """A filled slot."""

    kind: str
    """F, B or W."""
    mb: int
    chunk: int


def jobs(table: Table, tick: int, stage: int) -> Iterator[Job]:
    """What a stage does in a tick, in that order."""
    at = table.columns
    for kind, mb, chunk in (("F", at.f_mb, at.f_chunk), ("B", at.b_mb, at.b_chunk), ("W", at.w_mb, at.w_chunk)):
        if mb[tick, stage] >= 0:
            yield Job(kind, int(mb[tick, stage]), int(chunk[tick, stage]))


def text(table: Table, width: int = 80) -> str:
    """One column per tick, in blocks of at most `width` characters: `F6B0` is microbatch 6 forward, then 0 backward;
    `F6.1` its chunk 1, where there are several."""
    names = [f"stage {stage}" for stage in range(table.stages)]
    columns = [_column(table, tick) for tick in range(table.ticks)]
    margin = max(map(len, names))
    blocks, block, used = [], [], margin
    for column in columns:
        if block and used + 1 + len(column[0]) > width:
            blocks, block, used = [*blocks, block], [], margin
        block.append(column)
        used += 1 + len(column[0])
    blocks.append(block)
    lines = []
    for block in blocks:
        for name, *cells in zip(["tick", *names], *block, strict=True):
            lines.append(" ".join([name.ljust(margin), *cells]).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def _column(table: Table, tick: int) -> list[str]:
    """The tick's number and each stage's cell, of equal width; F, B and W stand below one another."""
    cells = [dict.fromkeys(FILL, "") for _ in range(table.stages)]
    for stage, cell in enumerate(cells):
        for job in jobs(table, tick, stage):
            cell[job.kind] = f"{job.kind}{job.mb}" + (f".{job.chunk}" if table.chunks > 1 else "")
    wide = {kind: max(len(cell[kind]) for cell in cells) for kind in FILL}
    said = ["".join(cell[kind].ljust(wide[kind]) for kind in FILL) if any(cell.values()) else "-" for cell in cells]
    width = max(len(word) for word in [str(tick), *said])
    return [word.ljust(width) for word in [str(tick), *said]]


def svg(table: Table, costs: Costs = Costs(), title: str = "") -> str:
    """An SVG document. A tick is as wide as its slowest stage takes; white is waiting, paler are later chunks."""
    work = costs.of(table)
    scale = UNIT * table.chunks / min(cost for cost in (costs.forward, costs.backward, costs.weight) if cost > 0)
    starts = LEFT + scale * np.concatenate([[0.0], np.cumsum(work.max(axis=1))])
    bottom = TOP + ROW * table.stages
    width, height = max(float(starts[-1]) + 10, 480), bottom + 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="sans-serif" font-size="11" text-anchor="middle">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-size="14" text-anchor="start">{escape(title)}</text>',
    ]
    for start in starts:
        out.append(f'<path d="M{start:.1f} {TOP}V{bottom}" stroke="#ddd"/>')
    each = {"F": costs.forward, "B": costs.backward + costs.weight * (not table.has_weight_jobs), "W": costs.weight}
    for stage in range(table.stages):
        y = TOP + ROW * stage
        out.append(f'<text x="10" y="{y + 19}" text-anchor="start">stage {stage}</text>')
        for tick in range(table.ticks):
            x = float(starts[tick])
            for job in jobs(table, tick, stage):
                w = scale * each[job.kind] / table.chunks
                said = f"{SAID[job.kind]} of microbatch {job.mb}, chunk {job.chunk}, tick {tick}"
                out.append(_box(x, y + 2, w, ROW - 4, _shade(job, table.chunks), str(job.mb), said))
                x += w
    out += _legend(bottom + 14, list(FILL) if table.has_weight_jobs else ["F", "B"])
    return "\n".join([*out, "</svg>"]) + "\n"


def _shade(job: Job, chunks: int) -> str:
    pale = 0.6 * job.chunk / chunks
    return "#" + "".join(f"{round(part + (255 - part) * pale):02x}" for part in FILL[job.kind])


def _box(x: float, y: float, w: float, h: float, fill: str, word: str, said: str) -> str:
    return (
        f'<g><title>{escape(said)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" '
        f'stroke="white"/><text x="{x + w / 2:.1f}" y="{y + h / 2 + 4:.1f}">{escape(word)}</text></g>'
    )


def _legend(y: float, kinds: Sequence[str]) -> Iterator[str]:
    for i, kind in enumerate(kinds):
        x = LEFT + 130 * i
        yield _box(x, y, 18, 16, _shade(Job(kind, 0, 0), 1), kind, SAID[kind])
        yield f'<text x="{x + 26}" y="{y + 12}" text-anchor="start">{SAID[kind]}</text>'
