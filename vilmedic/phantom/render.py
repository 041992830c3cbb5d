"""Rendering of a phantom case to an 8-bit image with the boxes of its findings.

Over the healthy chest lie the findings (fluid, consolidation, free air, collapsed lung), and over
those what is on a radiograph but not in the patient: leads, side marker, collimated border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vilmedic.phantom import anatomy
from vilmedic.phantom.anatomy import Field, Grid, Lungs, pixel_axes, ramp, to_image
from vilmedic.phantom.case import Body, Case, CaseFinding, Lesion, View

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


@dataclass(frozen=True)
class Place:
    """Position of a finding in the image, all from 0 to 1.

    Attributes:
        side: "right" or "left" of the patient, "" for the heart.
        box: (left, top, right, bottom).
        centre: (x, y) of its centre of mass.
    """

    side: str
    box: tuple[float, float, float, float]
    centre: tuple[float, float]


@dataclass(frozen=True)
class Phantom:
    """A drawn case: an 8-bit grey image, and the places of each finding by name."""

    pixels: NDArray[np.uint8]
    places: dict[str, list[Place]]


def render(case: Case, size: int) -> Phantom:
    """Draws a case.

    Args:
        case: what to draw.
        size: pixels a side.
    """
    rng = case.stream("pixels")
    body, view = case.body, case.view
    grid = anatomy.make_grid(view, size)
    chest = anatomy.lungs(body, grid)
    heart = anatomy.heart(body, grid)
    texture = smooth_noise(rng, 18, size)
    # Patches have a generator of their own: without findings the rest of the image is the same.
    scene = Scene(body, grid, chest, heart, texture, case.stream("patches"))
    opacity = draw_opacities(case.findings, scene)
    density = _density(case, grid, chest, heart, opacity, rng)
    density += view.gradient[0] * grid.x + view.gradient[1] * grid.y
    density += 0.025 * smooth_noise(rng, 4, size)
    density = add_leads(density, case, rng)
    density = density * anatomy.outline(body, grid)
    low, high = view.window
    shade = np.clip((density - low) / (high - low), 0.0, 1.0) ** view.gamma
    shade = blur(shade, view.blur * size / 128)
    shade += view.noise * rng.standard_normal(shade.shape)
    shade = add_border_and_marker(shade, view)
    pixels = (np.clip(shade, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Phantom(pixels, _places(opacity.masks))


def vessels(case: Case, rng: np.random.Generator, size: int) -> Field:
    """Branching vessels from both hila, drawn as lines that thin out on the way."""
    scale = 2
    canvas = Image.new("L", (size * scale, size * scale))
    pen = ImageDraw.Draw(canvas)
    body, view = case.body, case.view
    hilum_y = body.apex + 0.68
    half = size * scale / 2
    unit = size * scale / 256 * view.scale[1]
    for direction in (-1, 1):
        for angle in np.linspace(-1.35, 1.35, 9) + rng.uniform(-0.15, 0.15, 9):
            twigs = [(0.15, hilum_y + 0.1 * angle, float(angle), 3.4, 0)]
            while twigs:
                s, y, heading, width, depth = twigs.pop()
                wobble = rng.uniform(-0.3, 0.3, 4)
                for step in range(4):
                    heading += 0.5 * float(wobble[step])
                    length = 0.085 if depth == 0 else 0.065
                    s_next, y_next = s + length * np.cos(heading), y + length * np.sin(heading)
                    start = to_image(view, direction * s, y)
                    end = to_image(view, direction * s_next, y_next)
                    shade = int(255 * max(0.2, width / 3.4))
                    line = [((u + 1) * half, (v + 1) * half) for u, v in (start, end)]
                    pen.line(line, fill=shade, width=max(1, round(width * unit)))
                    s, y, width = s_next, y_next, 0.86 * width
                if depth < 2:
                    fork = 0.35 + 0.1 * float(wobble[0])
                    twigs.append((s, y, heading + fork, width, depth + 1))
                    twigs.append((s, y, heading - fork, width, depth + 1))
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255.0


def smooth_noise(rng: np.random.Generator, cells: int, size: int) -> Field:
    """Smooth random field with standard deviation near 1, about `cells` bumps across the image."""
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    fine = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(fine, dtype=np.float64)


def blur(shade: Field, weight: float) -> Field:
    """Blurs with a three-tap filter in both directions, repeated where the weight is large."""
    for _ in range(int(np.ceil(weight / 0.25))):
        part = min(weight, 0.25)
        padded = np.pad(shade, 1, mode="edge")
        rows = (1.0 - 2.0 * part) * padded[1:-1] + part * (padded[:-2] + padded[2:])
        shade = (1.0 - 2.0 * part) * rows[:, 1:-1] + part * (rows[:, :-2] + rows[:, 2:])
        weight -= part
    return shade


@dataclass(frozen=True)
class Scene:
    """The healthy chest that findings are laid over.

    Attributes:
        body: the patient.
        grid: body coordinates of the pixels.
        chest: the lungs.
        heart: mask of the heart, already enlarged where that is the finding.
        texture: smooth random field around 0, which makes consolidation patchy.
        rng: generator for the places of single patches and bands.
    """

    body: Body
    grid: Grid
    chest: Lungs
    heart: Field
    texture: Field
    rng: np.random.Generator


@dataclass
class Opacity:
    """Effect of the findings of a case on the lungs.

    Attributes:
        airless: share of each pixel's air that is replaced, 0 to 1.
        free_air: 1 where the pleural space holds air.
        pleura: 1 along the edge of a collapsed lung.
        collapsed: in the lung beside a pneumothorax, the size of that; 0 elsewhere.
        masks: the region in which each (finding, side) was drawn.
    """

    airless: Field
    free_air: Field
    pleura: Field
    collapsed: Field
    masks: dict[tuple[str, str], Field]


def draw_opacities(findings: tuple[CaseFinding, ...], scene: Scene) -> Opacity:
    """Lays all findings of a case over its lungs."""
    zero = np.zeros_like(scene.grid.x)
    result = Opacity(zero, zero, zero, zero, {})
    for finding in findings:
        for part in finding.parts:
            if finding.name == "Cardiomegaly":
                mask = scene.heart
            elif finding.name == "Pneumothorax":
                mask = _add_free_air(part, scene, result)
            else:
                mask = _AIRLESS[finding.name](part, scene) * scene.grid.on(part.side)
                result.airless = np.maximum(result.airless, mask)
                mask = mask * scene.chest.mask
            result.masks[finding.name, part.side] = mask
    return result


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


def _density(
    case: Case, grid: Grid, chest: Lungs, heart: Field, opacity: Opacity, rng: np.random.Generator
) -> Field:
    """Density of what the rays pass: soft tissue, less the air of the lungs, plus bone."""
    body = case.body
    middle = anatomy.mediastinum(body, grid)
    air = chest.mask * (1.0 - 0.94 * heart) * (1.0 - 0.85 * middle) * (1.0 - opacity.airless)
    markings = vessels(case, rng, grid.x.shape[0]) * chest.mask * (1.0 - opacity.free_air)
    density = body.tissue + anatomy.soft_parts(body, grid, chest)
    density += 0.10 * np.maximum(heart, middle)
    density -= body.air * air
    density += body.vessels * markings * air
    density -= 0.13 * opacity.free_air * air
    density += 0.55 * opacity.collapsed * air
    density += 0.22 * opacity.pleura * air
    density -= 0.12 * anatomy.airways(body, grid)
    return density + body.bone * anatomy.bones(body, grid, chest)


def _places(masks: dict[tuple[str, str], Field]) -> dict[str, list[Place]]:
    places: dict[str, list[Place]] = {}
    for (name, side), mask in masks.items():
        rows, columns = np.nonzero(mask > 0.5 * mask.max())
        size = mask.shape[0]
        weight = mask[rows, columns]
        centre = (
            float(np.average(columns + 0.5, weights=weight) / size),
            float(np.average(rows + 0.5, weights=weight) / size),
        )
        left, top = columns.min() / size, rows.min() / size
        right, bottom = (columns.max() + 1) / size, (rows.max() + 1) / size
        box = (float(left), float(top), float(right), float(bottom))
        places.setdefault(name, []).append(Place(side, box, centre))
    return places


def _fluid(part: Lesion, scene: Scene) -> Field:
    """A pleural effusion: all below a meniscus that climbs at the chest wall and mediastinum."""
    base = scene.chest.base[part.side == "left"]
    height = part.extent * (base - scene.body.apex)
    u = np.clip(scene.chest.across, 0.0, 1.0)
    surface = base - height * (0.62 + 0.38 * u**2.5 + 0.10 * (1.0 - u) ** 4)
    return 0.96 * ramp(scene.grid.y - surface, 0.05)


def _consolidation(part: Lesion, scene: Scene) -> Field:
    """Pneumonia: a cluster of fluffy patches."""
    x, y = _centre(part, scene)
    rng = scene.rng
    total = np.zeros_like(scene.grid.x)
    for _ in range(part.lobes):
        angle, far = rng.uniform(0.0, 2.0 * np.pi), part.extent * rng.uniform(0.1, 0.75)
        radius = part.extent * rng.uniform(0.5, 0.85)
        dx = scene.grid.s - (x + far * np.cos(angle))
        dy = scene.grid.y - (y + far * np.sin(angle))
        total += np.exp(-(((dx * dx + dy * dy) / radius**2) ** 1.15))
    return np.clip(total * (0.95 + 0.35 * scene.texture), 0.0, 0.9)


def _plates(part: Lesion, scene: Scene) -> Field:
    """Atelectasis: one to three bands, slightly bent and thinning out, with sharp edges."""
    x, y = _centre(part, scene)
    length = part.extent * (scene.body.half_width - 0.12)
    thick = 0.034 + 0.020 * part.extent + 0.06 * part.pull
    aside = 0.06 if x < 0.4 else -0.06
    total = np.zeros_like(scene.grid.x)
    for band in range(part.lobes):
        slope = part.tilt + band * scene.rng.uniform(-0.2, 0.2)
        bend = scene.rng.uniform(-0.8, 0.8)
        reach = 0.5 * length * (1.0 if band == 0 else scene.rng.uniform(0.6, 0.9))
        dx = scene.grid.s - x - aside * band
        dy = scene.grid.y - y - 0.13 * band
        rise = dy - slope * dx - bend * (dx * dx - 0.02)
        taper = np.sqrt(np.clip(1.0 - (dx / reach) ** 2, 0.0, 1.0))
        bar = ramp(thick * taper - np.abs(rise), 2.0 * scene.grid.edge) * (taper > 0)
        total = np.maximum(total, bar)
    return 0.9 * total


def _add_free_air(part: Lesion, scene: Scene, result: Opacity) -> Field:
    """Pneumothorax: the lung draws away from the wall, and more so from the apex."""
    grid, chest = scene.grid, scene.chest
    side = grid.on(part.side)
    gap = part.extent * (1.0 - 0.35 * np.clip(chest.along, 0.0, 1.0))
    beside = np.minimum(chest.lateral - gap - grid.s, grid.s - chest.medial + 0.03)
    below = grid.y - scene.body.apex - 1.4 * part.extent
    radius = 0.24 * scene.body.half_width
    corner = np.hypot(np.maximum(radius - beside, 0.0), np.maximum(radius - below, 0.0))
    inside = radius - corner + np.maximum(np.minimum(beside, below) - radius, 0.0)
    lung = ramp(inside, grid.edge) * side
    free = chest.mask * side * (1.0 - lung)
    line = ramp(0.020 - np.abs(inside - 0.012), 1.2 * grid.edge) * side * chest.mask
    result.free_air = np.maximum(result.free_air, free)
    result.pleura = np.maximum(result.pleura, line)
    result.collapsed = np.maximum(result.collapsed, lung * part.extent)
    return free


def _centre(part: Lesion, scene: Scene) -> tuple[float, float]:
    """The centre of a part in body units, given where it lies across and along its lung."""
    body = scene.body
    base = scene.chest.base[part.side == "left"] - 0.5 * body.dome_height
    y = body.apex + part.centre[1] * (base - body.apex)
    narrow = min(1.0, 0.55 + part.centre[1])
    x = 0.13 + part.centre[0] * (body.half_width * narrow - 0.13)
    return x, y


_AIRLESS = {"Pleural Effusion": _fluid, "Pneumonia": _consolidation, "Atelectasis": _plates}
