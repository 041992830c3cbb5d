"""A sheet of 25 phantoms with their findings underneath, to look at."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from vilmedic.phantom.case import Case, draw_case
from vilmedic.phantom.render import render

COLUMNS = ROWS = 5
TILE, CAPTION, GAP = 160, 40, 6


def write_sheet(path: Path, seed: int) -> None:
    """Draws the first 25 training cases of a seed.

    Args:
        path: PNG file to write; its folder is made.
        seed: seed of the data set.
    """
    cell = (TILE + GAP, TILE + CAPTION + GAP)
    sheet = Image.new("L", (COLUMNS * cell[0] + GAP, ROWS * cell[1] + GAP), 255)
    pen = ImageDraw.Draw(sheet)
    for index in range(COLUMNS * ROWS):
        case = draw_case(seed, "train", index)
        left = GAP + index % COLUMNS * cell[0]
        top = GAP + index // COLUMNS * cell[1]
        sheet.paste(Image.fromarray(render(case, TILE).pixels), (left, top))
        pen.multiline_text((left, top + TILE + 2), caption(case), fill=0, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def caption(case: Case) -> str:
    """The findings of a case, one a line."""
    lines = [
        " ".join(word for word in (finding.severity, finding.side, finding.name.lower()) if word)
        for finding in case.findings
    ]
    return "\n".join(lines) or "no finding"
