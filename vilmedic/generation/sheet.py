"""Generated images on one sheet, beside the real one and over the report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = 5
PANEL = 2.0  # inches across an image
GAP = 0.08
HEAD, LINE = 0.24, 0.17


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """An image in 0..1, [C, H, W], as 8-bit values: [H, W] when grey, else [H, W, 3]."""
    values = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)


@rc_context({"text.parse_math": False})  # a report may hold dollar signs
def draw_image_sheet(
    path: Path,
    images: Sequence[Tensor],
    titles: Sequence[str],
    *,
    real: Tensor | None,
    primed: float,
    report: str,
    caption: str,
) -> None:
    """Draw generated images in rows, the real one to their left, the report underneath.

    Args:
        path: the PNG file to write.
        images: the generated images, [C, H, W] in 0..1.
        titles: what stands over each.
        real: the image that the report was written for, if there is one.
        primed: share of the images, from the top, that is that of a real image; a line marks it.
        report: the report.
        caption: where the images come from, in small print.
    """
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    left = PANEL * 1.18 if real is not None else 0.0
    width = max(left + columns * (PANEL + GAP) + 0.2, 5.0)
    text = textwrap.wrap(report, int(width * 13.5)) or [""]
    below = LINE * (len(text) + 1) + 0.2
    height = rows * (PANEL + HEAD) + below + 0.1
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def place(image: Tensor, x: float, y: float, title: str) -> Any:
        """Draw an image by inches from the upper left corner."""
        box = (x / width, 1 - (y + HEAD + PANEL) / height, PANEL / width, PANEL / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9, pad=3)
        return axes

    if real is not None:
        place(real, 0.1, 0.05, "real image")
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = 0.1 + left + (number % columns) * (PANEL + GAP)
        axes = place(image, x, 0.05 + (number // columns) * (PANEL + HEAD), title)
        if primed:
            axes.axhline(primed * image.shape[-2] - 0.5, color="#E69F00", linewidth=0.8)
    for number, line in enumerate([*text, caption]):
        last = number == len(text)
        y = height - below + 0.12 + LINE * (number + 0.5)
        figure.text(
            0.1 / width,
            1 - y / height,
            line,
            fontsize=7.5 if last else 9.5,
            color="#666666" if last else "black",
            va="center",
        )
    figure.savefig(path, dpi=150)
