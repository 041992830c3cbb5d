"""Diagrams of the documentation as SVG, drawn from text: python -m docs.generate.diagrams

A source, `docs/diagrams/<name>.txt`, has one statement a line:

    title ConVIRT: what it compares
    row image data X-ray | report data Report
    row cnn model Image encoder / model.cnn | ...
    arrow image -> cnn: a label

A row is a line of boxes, each with a name, a kind (data, model, vector, loss or file) and one or
two lines of text; a box alone in its row is as wide as the diagram, and a place may be empty.
Arrows lead down, or to the right within a row. The picture is narrow enough to be read on a phone,
and brings its own background, light or dark as the reader's system is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "diagrams"
PICTURES = Path(__file__).parents[1] / "images"
WIDTH, MARGIN, BETWEEN, BOX, GAP = 480, 16, 14, 50, 34
KINDS = ("data", "model", "vector", "loss", "file")
STYLE = """
svg { font: 13px system-ui, "DejaVu Sans", sans-serif; }
.card { fill: #ffffff; stroke: #d0d4dc; }
text { fill: #1b1f28; text-anchor: middle; }
.second { font-size: 11px; fill: #4a5060; }
.label { font-size: 11px; fill: #4a5060; text-anchor: start; }
.box { stroke-width: 1.5; }
.data { fill: #eef0f4; stroke: #7a8294; }
.model { fill: #e3edfb; stroke: #3b6fb6; }
.vector { fill: #e5f4ea; stroke: #3f8f5a; }
.loss { fill: #fcebdc; stroke: #c06a1f; }
.file { fill: #f2e9f8; stroke: #8253a8; }
.line { fill: none; stroke: #6b7282; stroke-width: 1.5; }
.head { fill: #6b7282; }
@media (prefers-color-scheme: dark) {
.card { fill: #1e2129; stroke: #3a3f4c; }
text { fill: #eceef3; }
.second, .label { fill: #b4bac8; }
.data { fill: #2c303a; stroke: #8a92a4; }
.model { fill: #1d3350; stroke: #6ea3ea; }
.vector { fill: #1d3b28; stroke: #6bbf88; }
.loss { fill: #4a2d14; stroke: #e0914a; }
.file { fill: #382646; stroke: #b389d8; }
.line { stroke: #9aa2b4; }
.head { fill: #9aa2b4; }
}
"""


@dataclass
class Box:
    """A box of a diagram.

    Args:
        kind: what its colour says it is.
        lines: one or two lines of text.
        row: the number of its row.
        x: its left side.
        width: how wide it is.
    """

    kind: str
    lines: list[str]
    row: int
    x: float = 0
    width: float = 0

    @property
    def top(self) -> float:
        """Its upper side."""
        return MARGIN + self.row * (BOX + GAP)

    @property
    def middle(self) -> float:
        """Its centre, from the left."""
        return self.x + self.width / 2


@dataclass
class Diagram:
    """A diagram that was read.

    Args:
        title: what it shows.
        boxes: the boxes by name.
        arrows: from, to, and a label.
    """

    title: str = ""
    boxes: dict[str, Box] = field(default_factory=dict)
    arrows: list[tuple[str, str, str]] = field(default_factory=list)


def read(text: str) -> Diagram:
    """The diagram that a source describes.

    Raises:
        ValueError: a line that is no statement, or an arrow between boxes that are not there.
    """
    found, rows = Diagram(), 0
    for number, line in enumerate(text.splitlines(), start=1):
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        if word == "title":
            found.title = rest
        elif word == "row":
            _read_row(found, rest, rows, number)
            rows += 1
        elif word == "arrow":
            match = re.fullmatch(r"(\w+) -> (\w+)(?:: (.+))?", rest)
            if match is None or not {match[1], match[2]} <= found.boxes.keys():
                raise ValueError(f"line {number}: no arrow between boxes above it: {line}")
            found.arrows.append((match[1], match[2], match[3] or ""))
        else:
            raise ValueError(f"line {number}: title, row or arrow, not: {line}")
    return found


def _read_row(diagram: Diagram, text: str, row: int, number: int) -> None:
    cells = [cell.strip() for cell in text.split("|")]
    width = (WIDTH - 2 * MARGIN - BETWEEN * (len(cells) - 1)) / len(cells)
    for column, cell in enumerate(cells):
        if not cell:
            continue  # an empty place
        name, kind, words = (*cell.split(" ", 2), "", "")[:3]
        if kind not in KINDS or not words or name in diagram.boxes:
            raise ValueError(f"line {number}: a new name, a kind ({', '.join(KINDS)}) and a text")
        lines = [part.strip() for part in words.split(" / ")]
        widest = max(len(line) * (6.0 if place else 7.0) for place, line in enumerate(lines))
        if len(lines) > 2 or widest > width:
            raise ValueError(f"line {number}: more text than the box of {name} holds")
        x = MARGIN + column * (width + BETWEEN)
        diagram.boxes[name] = Box(kind, lines, row, x, width)


def draw(diagram: Diagram) -> str:
    """The diagram as SVG."""
    height = max(box.top for box in diagram.boxes.values()) + BOX + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" role="img">',
        f"<title>{escape(diagram.title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8"/>',
    ]
    for start, end, label in diagram.arrows:
        parts += _arrow(diagram.boxes[start], diagram.boxes[end], label)
    for box in diagram.boxes.values():
        parts += _box(box)
    return "\n".join([*parts, "</svg>", ""])


def _box(box: Box) -> list[str]:
    made = [
        f'<rect class="box {box.kind}" x="{box.x:g}" y="{box.top:g}" width="{box.width:g}" '
        f'height="{BOX}" rx="6"/>'
    ]
    first = box.top + (30 if len(box.lines) == 1 else 21)
    for number, line in enumerate(box.lines):
        style = ' class="second"' if number else ""
        y = first + 18 * number
        made.append(f'<text{style} x="{box.middle:g}" y="{y:g}">{escape(line)}</text>')
    return made


def _arrow(start: Box, end: Box, label: str) -> list[str]:
    if start.row == end.row:
        y = start.top + BOX / 2
        left, right = start.x + start.width, end.x
        return [
            f'<path class="line" d="M{left:g} {y:g} H{right - 6:g}"/>',
            f'<path class="head" d="M{right:g} {y:g} l-7 -4 v8 z"/>',
        ]
    # straight down where the boxes overlap, with a bend in the gap above the lower one otherwise
    low, high = max(start.x, end.x) + 8, min(start.x + start.width, end.x + end.width) - 8
    at = start.middle if low <= start.middle <= high else end.middle
    x = at if low <= at <= high else start.middle
    into = x if end.x < x < end.x + end.width else end.middle
    top, bottom = start.top + BOX, end.top
    bend = "" if x == into else f" V{bottom - GAP / 2:g} H{into:g}"
    made = [
        f'<path class="line" d="M{x:g} {top:g}{bend} V{bottom - 6:g}"/>',
        f'<path class="head" d="M{into:g} {bottom:g} l-4 -7 h8 z"/>',
    ]
    if label:
        y = top + GAP / 2 + 3
        made.append(f'<text class="label" x="{x + 8:g}" y="{y:g}">{escape(label)}</text>')
    return made


def pictures() -> dict[Path, str]:
    """The SVG of each source, by the file where it belongs."""
    return {
        PICTURES / f"{path.stem}-diagram.svg": draw(read(path.read_text(encoding="utf-8")))
        for path in sorted(SOURCES.glob("*.txt"))
    }


if __name__ == "__main__":
    for file, svg in pictures().items():
        file.write_text(svg, encoding="utf-8")
        print(file)
