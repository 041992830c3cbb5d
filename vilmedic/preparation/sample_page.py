"""A page of sample images with their reports, to be looked at before training."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vilmedic.preparation.check_facts import Findings
from vilmedic.preparation.check_page import plain_text
from vilmedic.preparation.image_facts import Sample

COLUMNS = 6
_WIDTH, _LINES = 38, 9  # letters and lines of a report that are shown
_NAME = 34


@plain_text()
def draw_samples(findings: Findings, path: Path, title: str) -> bool:
    """Write a page of the samples of all splits as PNG, each over the report of its line.

    Returns:
        Whether there were any; without, no file is written.
    """
    cells = [
        (split, sample, facts.texts)
        for split, facts in findings.splits.items()
        for sample in (facts.images.samples if facts.images else ())
    ]
    if not cells:
        return False
    rows = -(-len(cells) // COLUMNS)
    figure = Figure(figsize=(15, 0.6 + 4.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_shown(title))
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (split, sample, texts) in zip(axes, cells, strict=False):
        report = texts[sample.line] if sample.line < len(texts) else ""
        _draw(axis, split, sample, report)
    figure.savefig(path, dpi=90)
    return True


def _draw(axis: Axes, split: str, sample: Sample, report: str) -> None:
    axis.imshow(sample.pixels, cmap="gray", vmin=0, vmax=255, aspect="equal")
    name = _shown(os.path.basename(sample.place))
    name = name if len(name) <= _NAME else f"...{name[-_NAME + 3 :]}"
    axis.set_title(f"{split}, line {sample.line + 1}\n{name}", fontsize=8)
    text = textwrap.fill(_shown(report), _WIDTH, max_lines=_LINES, placeholder=" ...")
    axis.text(0, -0.02, text, va="top", fontsize=7, transform=axis.transAxes, clip_on=False)


def _shown(text: str) -> str:
    """A text without letters that cannot be drawn."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
