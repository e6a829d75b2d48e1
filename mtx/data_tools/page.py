"""A page of `data stats`: tables and plots in one file, without scripts; its colours follow the reader's theme."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

from data.statistics import Bucket, Statistics

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #6b7280; --line: #d8dde3; --page: #fff;
  --c0: #3b6fd4; --c1: #d9822b; --c2: #2f9e6e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --faint: #9aa4b2; --line: #3a424d; --page: #14171b;
  --c0: #7aa2f7; --c1: #f0a35e; --c2: #5cc99a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
p { color: var(--faint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th.name, td.name { text-align: left; }
th, td.name { white-space: nowrap; }
.wide { overflow-x: auto; } .plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
svg { max-width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--faint); }
svg .title { font-size: 13px; fill: var(--text); } svg line { stroke: var(--line); }
.s0 { fill: var(--c0); } .s1 { fill: var(--c1); } .s2 { fill: var(--c2); }
"""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 240, 44, 34, 26
"""Of a plot, and its margins, in pixels."""
HEADER = ("documents", "tokens", "bytes of text", "bytes/token", "mean", "median", "longest")


def page(title: str, measured: Mapping[str, Mapping[str, Statistics]]) -> str:
    """The HTML text, of source to split to numbers."""
    parts = [*_tables(measured)]
    for source, splits in measured.items():
        parts.append(f"<h2>{escape(source) or 'lengths of documents'}</h2>")
        documents = plot("documents by their tokens, % of a split", splits, lambda bucket: bucket.documents)
        tokens = plot("tokens by the tokens of their document, % of a split", splits, lambda bucket: bucket.tokens)
        parts.append(f'<div class="plots">{documents}{tokens}</div>')
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _tables(measured: Mapping[str, Mapping[str, Statistics]]) -> Iterator[str]:
    many = any(measured)
    names = ("source", "split") if many else ("split",)
    yield '<div class="wide"><table><tr>' + "".join(f'<th class="name">{name}</th>' for name in names)
    yield "".join(f"<th>{name}</th>" for name in HEADER) + "</tr>"
    for source, splits in measured.items():
        for split, found in splits.items():
            cells = [
                f"{found.documents:,}",
                f"{found.tokens:,}",
                "unknown" if found.bytes is None else f"{found.bytes:,}",
                "unknown" if found.bytes_per_token is None else f"{found.bytes_per_token:.3f}",
                f"{found.mean:,.1f}",
                f"{found.median:,.0f}",
                f"{found.longest:,}",
            ]
            first = source if split == next(iter(splits)) else ""
            named = "".join(f'<td class="name">{escape(name)}</td>' for name in ([first] if many else []) + [split])
            yield f"<tr>{named}" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"
    yield "<p>Mean, median and longest are tokens per document. The token that ends a document is counted, but for "
    yield "bytes/token.</p>"


def plot(title: str, splits: Mapping[str, Statistics], of: Callable[[Bucket], int]) -> str:
    """An SVG of bars: a group a bucket, a bar a split, each a share of its split in percent."""
    shares = {split: _shares(found.histogram, of) for split, found in splits.items()}
    edges = sorted({edge for of_split in shares.values() for edge in of_split})
    if not edges:
        return ""
    top = _round_up(max(share for of_split in shares.values() for share in of_split.values()))
    wide, high = (WIDTH - LEFT) / len(edges), HEIGHT - TOP - BOTTOM
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>',
        *_legend(list(splits)),
    ]
    for step in range(5):
        y = TOP + high * (1 - step / 4)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{top * step / 4:g}</text>')
    for i, edge in enumerate(edges):
        left, bar = LEFT + wide * (i + 0.1), 0.8 * wide / len(shares)
        for number, (split, of_split) in enumerate(shares.items()):
            share = of_split.get(edge, 0.0)
            tall, x = high * share / top, left + bar * number
            said = f"{split}, {edge:,} to {max(2 * edge - 1, edge):,} tokens: {share:.2f} %"
            out.append(
                f'<rect class="s{number % 3}" x="{x:.1f}" y="{TOP + high - tall:.1f}" width="{bar:.1f}" '
                f'height="{tall:.1f}"><title>{escape(said)}</title></rect>'
            )
        out.append(f'<text x="{LEFT + wide * i:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{short(edge)}</text>')
    return "\n".join([*out, "</svg>"])


def _legend(splits: Sequence[str]) -> Iterator[str]:
    x = LEFT
    for number, split in enumerate(splits):
        yield f'<rect class="s{number % 3}" x="{x}" y="20" width="9" height="9"/>'
        yield f'<text x="{x + 13}" y="29">{escape(split)}</text>'
        x += 26 + 7 * len(split)


def _shares(buckets: Sequence[Bucket], of: Callable[[Bucket], int]) -> dict[int, float]:
    whole = max(sum(map(of, buckets)), 1)
    return {bucket.shortest: 100 * of(bucket) / whole for bucket in buckets}


def _round_up(percent: float) -> float:
    """The end of an axis whose quarters are round."""
    return next((end for end in (2, 4, 8, 12, 20, 40, 60, 80) if percent <= end), 100)


def short(number: int) -> str:
    """1024 as 1k, 2**20 as 1M."""
    for power, letter in ((30, "G"), (20, "M"), (10, "k")):
        if number >= 1 << power:
            return f"{number >> power}{letter}"
    return str(number)
