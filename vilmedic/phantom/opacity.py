"""Findings laid over the chest: where fluid, consolidation, free air and collapsed lung are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vilmedic.phantom.anatomy import Field, Grid, Lungs, ramp
from vilmedic.phantom.case import Body
from vilmedic.phantom.findings import Finding, Part


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
    """What the findings of one case do to the lungs.

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


def draw_opacities(findings: tuple[Finding, ...], scene: Scene) -> Opacity:
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


def _fluid(part: Part, scene: Scene) -> Field:
    """A pleural effusion: all below a meniscus that climbs at the chest wall and mediastinum."""
    base = scene.chest.base[part.side == "left"]
    height = part.extent * (base - scene.body.apex)
    u = np.clip(scene.chest.across, 0.0, 1.0)
    surface = base - height * (0.62 + 0.38 * u**2.5 + 0.10 * (1.0 - u) ** 4)
    return 0.96 * ramp(scene.grid.y - surface, 0.05)


def _consolidation(part: Part, scene: Scene) -> Field:
    """Pneumonia: a cluster of fluffy patches."""
    x, y = _place(part, scene)
    rng = scene.rng
    total = np.zeros_like(scene.grid.x)
    for _ in range(part.lobes):
        angle, far = rng.uniform(0.0, 2.0 * np.pi), part.extent * rng.uniform(0.1, 0.75)
        radius = part.extent * rng.uniform(0.5, 0.85)
        dx = scene.grid.s - (x + far * np.cos(angle))
        dy = scene.grid.y - (y + far * np.sin(angle))
        total += np.exp(-(((dx * dx + dy * dy) / radius**2) ** 1.15))
    return np.clip(total * (0.95 + 0.35 * scene.texture), 0.0, 0.9)


def _plates(part: Part, scene: Scene) -> Field:
    """Atelectasis: one to three bands, slightly bent and thinning out, with sharp edges."""
    x, y = _place(part, scene)
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


def _add_free_air(part: Part, scene: Scene, result: Opacity) -> Field:
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


def _place(part: Part, scene: Scene) -> tuple[float, float]:
    """The centre of a part in body units, given where it lies across and along its lung."""
    body = scene.body
    base = scene.chest.base[part.side == "left"] - 0.5 * body.dome_height
    y = body.apex + part.centre[1] * (base - body.apex)
    narrow = min(1.0, 0.55 + part.centre[1])
    x = 0.13 + part.centre[0] * (body.half_width * narrow - 0.13)
    return x, y


_AIRLESS = {"Pleural Effusion": _fluid, "Pneumonia": _consolidation, "Atelectasis": _plates}
