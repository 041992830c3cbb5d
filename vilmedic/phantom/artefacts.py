"""What is on a radiograph but not in the patient: leads, side marker, collimated border."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from vilmedic.phantom.anatomy import Field, pixel_axes, to_image
from vilmedic.phantom.case import Case, View

_LETTERS = {
    "L": ((0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.6, 1.0)),
    "R": (
        (0.0, 0.0, 0.0, 1.0),
        (0.0, 0.0, 0.6, 0.1),
        (0.6, 0.1, 0.6, 0.4),
        (0.6, 0.4, 0.0, 0.5),
        (0.15, 0.5, 0.65, 1.0),
    ),
}
"""Strokes (x0, y0, x1, y1) in letter heights, so that no font is needed."""


def add_leads(density: Field, case: Case, rng: np.random.Generator) -> Field:
    """Adds electrocardiogram leads: a dot on the skin and a wire to the edge of the image."""
    if not case.view.leads:
        return density
    size = density.shape[0]
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    for _ in range(case.view.leads):
        x, y = rng.uniform(-0.75, 0.75), rng.uniform(-0.5, 0.5)
        bend = rng.uniform(-0.5, 0.5)
        steps = np.linspace(0.0, 1.0, 9)
        wire = [to_image(case.view, x + bend * t * t, y - 1.6 * t) for t in steps]
        points = [((u + 1) * size, (v + 1) * size) for u, v in wire]
        pen.line(points, fill=150, width=max(1, size // 64))
        u, v = points[0]
        radius = size / 40
        pen.ellipse((u - radius, v - radius, u + radius, v + radius), fill=255)
    mask = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255.0
    return density + 0.25 * mask


def add_border_and_marker(shade: Field, view: View) -> Field:
    """Covers what collimation cut off and sets the side marker on it."""
    size = shade.shape[0]
    columns, rows = pixel_axes(size)
    left, top, right, bottom = view.margins
    inside = (columns > left - 1) & (columns < 1 - right) & (rows > top - 1) & (rows < 1 - bottom)
    shade = np.where(inside, shade, view.border)
    if not view.marker:
        return shade
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    height = 0.075 * 2 * size
    x, y = ((view.marker_at[0] + 1) * size, (view.marker_at[1] + 1) * size)
    for x0, y0, x1, y1 in _LETTERS[view.marker]:
        line = (x + height * (x0 - 0.3), y + height * y0, x + height * (x1 - 0.3), y + height * y1)
        pen.line(line, fill=255, width=max(1, size // 40))
    mask = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64) / 255.0
    return np.maximum(shade, mask)
