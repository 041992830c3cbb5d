"""Thumbnails for the report page, and contact sheets of generated images."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

FORMS = ((144, 60), (128, 60), (112, 60), (96, 60), (80, 55), (64, 50), (64, 30), (48, 25))
"""Pixels of the long side and WebP quality, the best first."""
EACH = 1500  # bytes per thumbnail if there are many
AT_LEAST = 1_500_000  # bytes that all thumbnails of a split may always take
PILOT = 32

GetImage = Callable[[int], Any]
"""From a sample's number to its image, uint8 [C, H, W]."""

# of a sheet
COLUMNS = 5
PANEL = 2.0  # inches across an image
GAP = 0.08
HEAD, LINE = 0.24, 0.17


def thumbnails(get_image: GetImage, indices: Sequence[int]) -> list[str]:
    """Encode the images of samples as base64 WebP, in the best size and quality for the page.

    Args:
        get_image: returns the image of a sample.
        indices: the samples.

    Returns:
        One text per sample, empty if the image cannot be read.
    """
    if not indices:
        return []
    stride = max(1, len(indices) // PILOT)
    pilot = [_read(get_image, index, FORMS[0][0]) for index in indices[::stride][:PILOT]]
    side, quality = _fitting([image for image in pilot if image is not None], len(indices))

    def encoded(index: int) -> str:
        image = _read(get_image, index, side)
        return "" if image is None else base64.b64encode(webp(image, quality)).decode("ascii")

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(encoded, indices))


def webp(image: Image.Image, quality: int) -> bytes:
    """An image as WebP bytes."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


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
    real_title: str = "real image",
    primed: float,
    report: str,
    caption: str,
) -> None:
    """Draw generated images in rows, with the real image to the left and the report below.

    Args:
        path: the PNG file to write.
        images: the generated images, [C, H, W] in 0..1.
        titles: the title of each.
        real: the real image for comparison, if there is one.
        real_title: its title.
        primed: share of the images, from the top, taken from a real image; a line marks it.
        report: the report.
        caption: origin of the images, in small print.
    """
    columns = min(COLUMNS, len(images))
    rows = -(-len(images) // columns)
    left = PANEL * 1.18 if real is not None else 0.0
    width = max(left + columns * (PANEL + GAP) + 0.2, 5.0)
    text = textwrap.wrap(report, int(width * 13.5)) or [""]
    small = textwrap.wrap(caption, int(width * 17)) or [""]
    below = LINE * (len(text) + len(small)) + 0.2
    height = rows * (PANEL + HEAD) + below + 0.1
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def place(image: Tensor, x: float, y: float, title: str) -> Any:
        """Draw an image at a position in inches from the upper left corner."""
        box = (x / width, 1 - (y + HEAD + PANEL) / height, PANEL / width, PANEL / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(title, fontsize=9, pad=3)
        return axes

    if real is not None:
        place(real, 0.1, 0.05, real_title)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = 0.1 + left + (number % columns) * (PANEL + GAP)
        axes = place(image, x, 0.05 + (number // columns) * (PANEL + HEAD), title)
        if primed:
            axes.axhline(primed * image.shape[-2] - 0.5, color="#E69F00", linewidth=0.8)
    for number, line in enumerate([*text, *small]):
        last = number >= len(text)
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


def _read(get_image: GetImage, index: int, side: int) -> Image.Image | None:
    """The grey image of a sample with its long side at most `side`."""
    try:
        pixels = get_image(index)
    except Exception:
        # the data set has already reported unreadable images
        return None
    image = Image.fromarray(pixels.float().mean(dim=0).byte().numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _fitting(pilot: Sequence[Image.Image], count: int) -> tuple[int, int]:
    """Return the best size and quality in which all images fit, estimated on a sample."""
    budget = max(EACH, AT_LEAST / count)
    for side, quality in FORMS:
        sizes = []
        for image in pilot:
            small = image.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sizes.append(len(webp(small, quality)))
        if not sizes or sum(sizes) / len(sizes) <= budget:
            return side, quality
    return FORMS[-1]
