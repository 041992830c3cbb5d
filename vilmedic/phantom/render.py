"""From a case to an 8-bit image, and where in it each finding was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vilmedic.phantom import anatomy, artefacts
from vilmedic.phantom.anatomy import Field, Grid, Lungs
from vilmedic.phantom.case import Case
from vilmedic.phantom.opacity import Opacity, Scene, draw_opacities


@dataclass(frozen=True)
class Place:
    """Where a finding lies in the image, all from 0 to 1.

    Attributes:
        side: "right" or "left" of the patient, "" for the heart.
        box: (left, top, right, bottom).
        centre: (x, y) of its centre of mass.
    """

    side: str
    box: tuple[float, float, float, float]
    centre: tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """An 8-bit grey image, and the places of each finding by name."""

    pixels: NDArray[np.uint8]
    places: dict[str, list[Place]]


def render(case: Case, size: int) -> Picture:
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
    density = artefacts.add_leads(density, case, rng)
    density = density * anatomy.outline(body, grid)
    low, high = view.window
    shade = np.clip((density - low) / (high - low), 0.0, 1.0) ** view.gamma
    shade = blur(shade, view.blur * size / 128)
    shade += view.noise * rng.standard_normal(shade.shape)
    shade = artefacts.add_border_and_marker(shade, view)
    pixels = (np.clip(shade, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Picture(pixels, _places(opacity.masks))


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
                    start = anatomy.to_image(view, direction * s, y)
                    end = anatomy.to_image(view, direction * s_next, y_next)
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
