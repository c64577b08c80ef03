"""Draw a flowchart in the language of Mermaid, which GitHub draws itself, as an SVG for the site."""

import re
import textwrap
from html import escape
from statistics import mean

STEP = (138, 84)  # from box to box, in pixels
BOX = (118, 66)
CHARACTERS = 16  # of a line of text
NODE = re.compile(r'(\w+)(?:\["([^"]*)"\])?')
MARKER = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" '
    'markerWidth="8" markerHeight="8" orient="auto">'
    '<path d="M0,0 L8,4 L0,8 z" fill="#666"/></marker></defs>'
)


def read(chart: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Texts of the boxes by name, and the arrows, of a flowchart from left to right."""
    header, *lines = chart.strip().splitlines()
    if header.strip() != "flowchart LR":
        raise ValueError(f"only flowcharts from left to right are drawn, not {header.strip()!r}")
    texts: dict[str, str] = {}
    arrows: list[tuple[str, str]] = []
    for line in lines:
        found = [NODE.fullmatch(part.strip()) for part in line.split("-->")]
        if None in found:
            raise ValueError(f"this line of a flowchart is not understood: {line.strip()}")
        for node in found:
            texts[node[1]] = node[2] or texts.get(node[1], node[1])
        names = [node[1] for node in found]
        arrows += zip(names, names[1:], strict=False)
    return texts, arrows


def places(names: list[str], arrows: list[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Column and row of each box: one column behind the last box that leads to it, beside their middle."""
    before = {name: [a for a, b in arrows if b == name] for name in names}
    column: dict[str, int] = {}
    while len(column) < len(names):
        ready = [n for n in names if n not in column and all(a in column for a in before[n])]
        if not ready:
            raise ValueError("the arrows of a flowchart form a circle")
        column |= {n: 1 + max((column[a] for a in before[n]), default=-1) for n in ready}
    row: dict[str, float] = {}
    for k in range(max(column.values()) + 1):
        level = [n for n in names if column[n] == k]
        wanted = {n: mean([row[a] for a in before[n]] or [0]) for n in level}
        for n in level:
            same = [other for other in level if wanted[other] == wanted[n]]
            row[n] = wanted[n] + same.index(n) - (len(same) - 1) / 2
    return {n: (column[n], row[n]) for n in names}


def draw(chart: str) -> str:
    """The flowchart as SVG."""
    texts, arrows = read(chart)
    place = places(list(texts), arrows)
    top = min(y for _, y in place.values())
    at = {
        n: (x * STEP[0] + BOX[0] / 2 + 2, (y - top) * STEP[1] + BOX[1] / 2 + 2) for n, (x, y) in place.items()
    }
    width = max(x for x, _ in at.values()) + BOX[0] / 2 + 2
    height = max(y for _, y in at.values()) + BOX[1] / 2 + 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="14" text-anchor="middle">',
        MARKER,
    ]
    for a, b in arrows:
        (x1, y1), (x2, y2) = at[a], at[b]
        x1, x2 = x1 + BOX[0] / 2, x2 - BOX[0] / 2 - 2
        line = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
        parts.append(f'<line {line} stroke="#666" stroke-width="1.4" marker-end="url(#tip)"/>')
    for name, (x, y) in at.items():
        corner = f'x="{x - BOX[0] / 2:g}" y="{y - BOX[1] / 2:g}" width="{BOX[0]}" height="{BOX[1]}"'
        parts.append(f'<rect {corner} rx="7" fill="#fff" stroke="#999"/>')
        lines = textwrap.wrap(texts[name], CHARACTERS)
        for k, words in enumerate(lines):
            middle = y + 16 * (k - (len(lines) - 1) / 2) + 4.5
            parts.append(f'<text x="{x:g}" y="{middle:g}" fill="#222">{escape(words)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
