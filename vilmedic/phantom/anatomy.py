"""Healthy anatomy of a phantom as pixel fields: lungs, heart, mediastinum, bones, soft tissue.

All fields are arrays of one value a pixel between 0 and 1. Edges are ramps about as wide as a
pixel, so that no supersampling is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vilmedic.phantom.case import Body, View

Field = NDArray[np.float64]


def ramp(distance: Field, width: float) -> Field:
    """1 where `distance` is positive, 0 where negative, linear over `width` around the edge."""
    return np.clip(distance / width + 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Grid:
    """Body coordinates of every pixel.

    Attributes:
        x: to the right of the image, in body units.
        y: downwards.
        s: distance from the midline.
        left: whether the pixel is on the patient's left, which is the right of the image.
        edge: width of an anti-aliased edge.
    """

    x: Field
    y: Field
    s: Field
    left: NDArray[np.bool_]
    edge: float

    def on(self, side: str) -> NDArray[np.bool_]:
        """The pixels on the patient's "right" or "left"."""
        return self.left if side == "left" else ~self.left


def pixel_axes(size: int) -> tuple[Field, Field]:
    """The (x, y) coordinates of pixel centres, from -1 to 1 across the image."""
    axis = (np.arange(size) + 0.5) * (2.0 / size) - 1.0
    return np.meshgrid(axis, axis)


def make_grid(view: View, size: int) -> Grid:
    """Body coordinates of the pixels of a `size` by `size` image taken as `view` says."""
    columns, rows = pixel_axes(size)
    columns, rows = columns - view.shift[0], rows - view.shift[1]
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    x = (cos * columns + sin * rows) / view.scale[0]
    y = (cos * rows - sin * columns) / view.scale[1]
    return Grid(x, y, np.abs(x), x > 0, 3.0 / size / min(view.scale))


def to_image(view: View, x: float, y: float) -> tuple[float, float]:
    """Position of a point in the image, from -1 to 1, given in body units."""
    u, v = x * view.scale[0], y * view.scale[1]
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    return float(cos * u - sin * v + view.shift[0]), float(sin * u + cos * v + view.shift[1])


@dataclass(frozen=True)
class Lungs:
    """Both lungs.

    Attributes:
        mask: 1 inside either lung.
        across: 0 at the mediastinum to 1 at the chest wall.
        along: 0 at the apex to 1 at the costophrenic angle.
        lateral: distance of the chest wall from the midline on this row.
        medial: distance of the mediastinum from the midline on this row.
        floor: y of the diaphragm in this column.
        base: y of the costophrenic angle, for (right, left).
    """

    mask: Field
    across: Field
    along: Field
    lateral: Field
    medial: Field
    floor: Field
    base: tuple[float, float]


def lungs(body: Body, grid: Grid) -> Lungs:
    """The lungs between chest wall, mediastinum and diaphragm."""
    base = (body.domes[0] + body.dome_height, body.domes[1] + body.dome_height)
    dome = body.domes[0] + (body.domes[1] - body.domes[0]) * ramp(grid.x, 0.16)
    along = (grid.y - body.apex) / (dome + body.dome_height - body.apex)
    rise = np.clip(along, 0.0, 1.0)
    width = body.half_width
    bow = np.sqrt(1.0 - (1.0 - np.minimum(rise / 0.62, 1.0)) ** 2.0)
    lateral = 0.40 * width + (0.60 * width) * bow - 0.03 * np.clip(rise - 0.8, 0.0, 1.0)
    inner = np.sqrt(1.0 - (1.0 - np.minimum(rise / 0.22, 1.0)) ** 2.0)
    medial = 0.40 * width - (0.40 * width - 0.115) * inner
    from_top = (grid.s - 0.52 * width) / (0.55 * width)
    floor = dome + body.dome_height * np.clip(np.abs(from_top), 0.0, 1.1) ** 2.4
    floor = floor - 0.35 * body.dome_height * ramp(0.1 - grid.s, 0.2)
    across = (grid.s - medial) / np.maximum(lateral - medial, 0.05)
    mask = (
        ramp(lateral - grid.s, grid.edge)
        * ramp(grid.s - medial, grid.edge)
        * ramp(floor - grid.y, grid.edge)
        * ramp(grid.y - body.apex, grid.edge)
    )
    return Lungs(mask, across, along, lateral, medial, floor, base)


def heart(body: Body, grid: Grid) -> Field:
    """The heart: two thirds on the patient's left, its long axis pointing down to the apex."""
    width = 2.0 * body.half_width * body.heart_ratio
    bottom = max(body.domes) + 0.5 * body.dome_height
    middle_x = 0.16 * width
    long, short = 0.56 * width, 0.42 * width
    middle_y = bottom - 0.80 * short + body.heart_y
    cos, sin = np.cos(body.heart_tilt), np.sin(body.heart_tilt)
    # The half width of a tilted ellipse is scaled so that the ratio holds exactly.
    reach = np.sqrt((long * cos) ** 2 + (short * sin) ** 2)
    long, short = long * 0.5 * width / reach, short * 0.5 * width / reach
    dx, dy = grid.x - middle_x, grid.y - middle_y
    u = (cos * dx + sin * dy) / long
    v = (cos * dy - sin * dx) / short
    radius = (np.abs(u) ** 2.2 + np.abs(v) ** 2.2) ** (1 / 2.2)
    return ramp((1.0 - radius) * short, 1.5 * grid.edge)


def mediastinum(body: Body, grid: Grid) -> Field:
    """Great vessels and hila between the lungs, with the aortic knob on the patient's left."""
    widen = np.clip((grid.y + 0.55) / 0.7, 0.0, 1.0)
    centre = ramp(0.115 + 0.06 * widen - grid.s, 2.0 * grid.edge)
    knob_y = body.apex + 0.46
    knob = np.sqrt((grid.x - 0.11) ** 2 + (grid.y - knob_y) ** 2)
    centre = np.maximum(centre, ramp(body.aorta + 0.03 - knob, 1.5 * grid.edge))
    hilum_y = knob_y + np.where(grid.left, 0.20, 0.25)
    hilum = np.exp(-(((grid.s - 0.19) / 0.07) ** 2) - ((grid.y - hilum_y) / 0.10) ** 2)
    return np.maximum(centre * ramp(grid.y + 1.1, 0.1), 0.62 * hilum)


def airways(body: Body, grid: Grid) -> Field:
    """Trachea and main bronchi, which are dark."""
    carina = body.apex + 0.56
    trachea = ramp(0.042 - grid.s, 2.0 * grid.edge) * ramp(carina - grid.y, 0.05)
    fall = grid.y - carina - 0.9 * grid.s
    bronchi = ramp(0.026 - np.abs(fall), 2.0 * grid.edge) * ramp(0.17 - grid.s, 0.06)
    return np.maximum(trachea, 0.7 * bronchi)


def bones(body: Body, grid: Grid, chest: Lungs) -> Field:
    """Ribs, clavicles, spine and shoulder blades, in units of the contrast of a rib."""
    u = grid.s / (chest.lateral + 0.04)
    cage = ramp(1.02 - u, 0.05) * ramp(grid.s - 0.06, 0.04) * ramp(grid.y - body.apex + 0.03, 0.06)
    cage = cage * (0.3 + 0.7 * ramp(chest.floor + 0.02 - grid.y, 0.1))
    cage = cage * ramp(max(chest.base) + 0.25 - grid.y, 0.3)
    posterior = grid.y + 0.16 * u * (1.0 - u) - body.rib_drop * u**3.0
    anterior = grid.y + 0.50 * u - 0.55
    behind = _bands(posterior / body.rib_spacing + body.rib_phase, 0.24)
    front = _bands(anterior / body.rib_spacing + body.rib_phase + 0.3, 0.22)
    front = front * ramp(u - 0.45, 0.2) * ramp(grid.y - body.apex - 0.25, 0.2)
    ribs = cage * (behind + 0.45 * front)
    clavicle_y = body.apex + 0.19 - 0.22 * grid.s + 0.03 * np.sin(9.0 * grid.s)
    inside = ramp(grid.s - 0.07, 0.03) * ramp(0.80 - grid.s, 0.05)
    clavicles = inside * _bar(np.abs(grid.y - clavicle_y), 0.034, grid.edge)
    vertebrae = 0.75 + 0.25 * np.cos(grid.y * (2.0 * np.pi / 0.15))
    spine = ramp(0.085 - grid.s, 0.05) * vertebrae
    blade_x = 0.86 * body.half_width + 0.22 * (grid.y - body.apex - 0.2)
    blade = ramp(grid.s - blade_x, 0.03) * ramp(body.apex + 0.75 - grid.y, 0.15)
    blade = blade * ramp(grid.y - body.apex - 0.05, 0.1) * ramp(blade_x + 0.25 - grid.s, 0.05)
    return ribs + 1.5 * clavicles + 1.1 * spine + 0.5 * blade


def _bands(phase: Field, half: float) -> Field:
    """Bands around whole numbers of `phase`, brighter along their edges as a cortex is."""
    distance = np.abs(phase - np.round(phase))
    return ramp(half - distance, 0.14) * (0.75 + 0.9 * distance)


def _bar(distance: Field, half: float, edge: float) -> Field:
    return ramp(half - distance, 1.5 * edge) * (0.7 + 0.3 * np.clip(distance / half, 0.0, 1.0))


def outline(body: Body, grid: Grid) -> Field:
    """The body against the air around it: neck, shoulders with raised arms, trunk."""
    trunk = body.half_width + body.wall
    neck = 0.24 + 0.3 * body.wall
    slope = np.clip((grid.y - body.apex + 0.28) / 0.36, 0.0, 1.0)
    waist = np.clip((grid.y - body.apex - 0.20) / 0.75, 0.0, 1.0)
    shoulder = trunk + 0.30
    width = neck + (shoulder - neck) * slope**0.8
    width = width + (trunk - shoulder) * waist * waist * (3.0 - 2.0 * waist)
    return ramp(width - grid.s, 2.0 * grid.edge)


def soft_parts(body: Body, grid: Grid, chest: Lungs) -> Field:
    """Structures over or under the lungs: abdomen, breasts, and the dark gastric bubble."""
    abdomen = 0.16 * ramp(grid.y - chest.floor, 2.0 * grid.edge)
    reach = np.sqrt((grid.s - 0.62 * body.half_width) ** 2 + (grid.y - 0.30) ** 2)
    breasts = body.breast * ramp(0.27 - reach, 2.0 * grid.edge)
    total = abdomen + breasts
    if body.bubble:
        bubble_y = body.domes[1] + 0.06 + body.bubble
        bubble = ((grid.x - 0.36) / 1.4) ** 2 + (grid.y - bubble_y) ** 2
        total = total - 0.30 * ramp(body.bubble - np.sqrt(bubble), 2.0 * grid.edge)
    return total
