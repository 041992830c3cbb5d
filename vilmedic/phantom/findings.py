"""Which findings a case has, on which side, where in the lung and how severe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vilmedic.phantom import FINDINGS

NORMAL_SHARE = 0.38
COUNT_SHARES = (0.52, 0.33, 0.15)
"""How many findings an abnormal case has: one, two or three."""

SIDES = ("right", "left")
SEVERITIES: dict[str, tuple[str, str, str]] = {
    "Atelectasis": ("mild", "moderate", "severe"),
    "Cardiomegaly": ("mild", "moderate", "severe"),
    "Pleural Effusion": ("small", "moderate", "large"),
    "Pneumonia": ("mild", "moderate", "severe"),
    "Pneumothorax": ("small", "moderate", "large"),
}
_EXTENTS: dict[str, tuple[tuple[float, float], ...]] = {
    "Atelectasis": ((0.65, 0.85), (0.75, 0.95), (0.85, 1.0)),  # length, in lung widths
    "Cardiomegaly": ((0.57, 0.62), (0.62, 0.69), (0.69, 0.78)),  # cardiothoracic ratio
    "Pleural Effusion": ((0.26, 0.33), (0.40, 0.52), (0.60, 0.80)),  # height, in lung heights
    "Pneumonia": ((0.13, 0.16), (0.18, 0.22), (0.25, 0.32)),  # radius, in body units
    "Pneumothorax": ((0.13, 0.18), (0.21, 0.28), (0.32, 0.42)),  # gap, in body units
}
ZONES = {"upper": 0.26, "mid": 0.52, "lower": 0.76}
"""Where the zones of a lung lie between its apex (0) and its base (1)."""


@dataclass(frozen=True)
class Part:
    """One place at which a finding is drawn.

    Attributes:
        side: "right" or "left" of the patient, "" for the heart.
        zone: one of `ZONES`, "" where the finding has its own place.
        extent: size, in the unit that suits the finding.
        centre: (across, along) the lung, each from 0 to 1.
        tilt: slope of what is linear.
        pull: how far the diaphragm is drawn up by lost volume.
        lobes: number of patches or bands.
    """

    side: str
    zone: str
    extent: float
    centre: tuple[float, float]
    tilt: float
    pull: float
    lobes: int


@dataclass(frozen=True)
class Finding:
    """A finding of a case; `side` is "right", "left", "bilateral" or "" for the heart."""

    name: str
    severity: str
    side: str
    parts: tuple[Part, ...]


def draw_findings(rng: np.random.Generator) -> tuple[Finding, ...]:
    """Draws the findings of one case, in the order of `FINDINGS`.

    Sides are chosen so that one finding does not hide another: consolidation and atelectasis keep
    off a side that is full of fluid or that has collapsed.
    """
    if rng.random() < NORMAL_SHARE:
        return ()
    count = 1 + int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    names = {str(name) for name in rng.choice(FINDINGS, size=count, replace=False)}
    taken: dict[str, int] = {"right": 0, "left": 0}
    found: dict[str, Finding] = {}
    for name in ("Pneumothorax", "Pleural Effusion", "Pneumonia", "Atelectasis", "Cardiomegaly"):
        if name in names:
            found[name] = _draw(rng, name, taken)
    return tuple(found[name] for name in FINDINGS if name in found)


def _draw(rng: np.random.Generator, name: str, taken: dict[str, int]) -> Finding:
    level = int(rng.integers(3))
    both_sides = {"Pleural Effusion": 0.25, "Pneumonia": 0.2}.get(name, 0.0)
    bilateral = rng.random() < both_sides and not any(taken.values())
    sides: tuple[str, ...]
    if name == "Cardiomegaly":
        sides = ("",)
    elif bilateral:
        sides = SIDES
        level = min(level, 1)
    else:
        first = SIDES[int(rng.integers(2))]
        other = SIDES[1 - SIDES.index(first)]
        sides = (first,) if taken[first] <= taken[other] else (other,)
    if name == "Pleural Effusion" and taken.get(sides[0]):
        level = min(level, 1)
    parts = tuple(_draw_part(rng, name, level, side, taken) for side in sides)
    for part in parts:
        if part.side:
            taken[part.side] += 1 + level
    side = "bilateral" if bilateral else sides[0]
    return Finding(name, SEVERITIES[name][level], side, parts)


def _draw_part(
    rng: np.random.Generator, name: str, level: int, side: str, taken: dict[str, int]
) -> Part:
    extent = float(rng.uniform(*_EXTENTS[name][level]))
    zone, pull, lobes = "", 0.0, 1
    across = float(rng.uniform(0.3, 0.75))
    if name == "Pneumonia":
        zone = str(rng.choice(list(ZONES)))
        if taken[side]:
            zone = str(rng.choice(["upper", "mid"]))
        lobes = int(rng.integers(3, 7))
    if name == "Atelectasis":
        zone = str(rng.choice(["mid", "lower"])) if not taken[side] else "mid"
        pull = float(rng.uniform(0.02, 0.06)) * (1 + level)
        lobes = 1 + level
    along = ZONES.get(zone, 0.5) + float(rng.uniform(-0.07, 0.07))
    tilt = float(rng.uniform(-0.45, 0.45))
    return Part(side, zone, extent, (across, along), tilt, pull, lobes)
