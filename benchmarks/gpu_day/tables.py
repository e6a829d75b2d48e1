"""The day's results as Markdown."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

TITLES = {
    "where": "The machine",
    "kernels_right": "Attention kernels against plain attention in float32",
    "step_right": "The train step against the CPU's losses",
    "kernels_fast": "Attention kernels, speed",
    "step_fast": "The train step, speed",
    "meshes": "Several chips",
    "tuning": "Tile sizes",
}
NO_COLUMNS = ("part", "run", "notes", "failed", "seconds")


def markdown(records: Sequence[dict[str, Any]], date: str) -> str:
    """One table per part, then its notes, failures and what was left out."""
    machine = next((record for record in records if record["part"] == "where" and "device" in record), {})
    lines = [f"### A day with {machine.get('device', 'an accelerator')}, {date}, jax {machine.get('jax', '?')}", ""]
    for part in dict.fromkeys(record["part"] for record in records):
        lines += [f"#### {TITLES[part]}", "", *_part([record for record in records if record["part"] == part])]
    return "\n".join(lines) + "\n"


def _part(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [record for record in records if "seconds" in record]
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in NO_COLUMNS))
    if rows:
        yield f"| {' | '.join(columns)} | seconds |"
        yield "|---" * (len(columns) + 1) + "|"
        for row in rows:
            yield f"| {' | '.join(cell(row.get(name, '')) for name in columns)} | {row['seconds']} |"
        yield ""
    for record in records:
        if "failed" in record:
            yield f"* **failed** {record['case']}: {record['failed']}"
        elif "left_out" in record:
            yield f"* left out {record['case']}: {record['left_out']}"
        for note in record.get("notes", ()):
            yield f"* {record['case']}: {note}"
    yield ""


def cell(value: Any) -> str:
    """Text of one value, without the character that ends a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return (json.dumps(value) if isinstance(value, list | dict) else str(value)).replace("|", "\\|")
