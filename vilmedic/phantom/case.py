"""Random parameters of a phantom: patient, exposure and findings, before rendering.

Lengths are in *body units*: the image spans -1 to 1 on both axes at scale 1, x to the right of the
image, y downwards, the origin in the middle of the chest. Findings have a side, a
place in the lung and a severity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vilmedic.phantom import FINDINGS, SPLITS

STREAMS = ("case", "pixels", "patches", "report", "impression")
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
class Body:
    """Anatomy of one patient; pairs are (right, left) in the patient's own sides.

    Attributes:
        half_width: from the midline to the inner chest wall at its widest.
        wall: thickness of the soft tissue around the rib cage.
        apex: y of the lung apices.
        domes: y of the two diaphragm domes.
        dome_height: how far the costophrenic angles lie under the domes.
        heart_ratio: cardiothoracic ratio, width of the heart over that of the inner chest.
        heart_y: y of the middle of the heart.
        heart_tilt: radians by which the long axis of the heart points down to the apex.
        aorta: radius of the aortic knob.
        tissue: density of the soft tissue around the lungs.
        air: how much darker the lungs are than that.
        bone: contrast of the ribs.
        rib_spacing: distance between neighbouring ribs.
        rib_phase: where the first rib starts, in rib spacings.
        rib_drop: how far posterior ribs fall on the way to the side.
        vessels: contrast of the vessels in the lungs.
        breast: density of the breast shadows, 0 for none.
        bubble: radius of the gastric bubble, 0 for none.
        low_volumes: whether the patient breathed in poorly, as the report may say.
    """

    half_width: float
    wall: float
    apex: float
    domes: tuple[float, float]
    dome_height: float
    heart_ratio: float
    heart_y: float
    heart_tilt: float
    aorta: float
    tissue: float
    air: float
    bone: float
    rib_spacing: float
    rib_phase: float
    rib_drop: float
    vessels: float
    breast: float
    bubble: float
    low_volumes: bool


@dataclass(frozen=True)
class View:
    """Acquisition of the image: position of the body, exposure and artefacts.

    Attributes:
        angle: rotation in radians.
        scale: (x, y) size of a body unit, in half images.
        shift: (x, y) of the middle of the chest, in half images.
        gamma: exponent of the tone curve.
        window: (lowest, highest) density that is shown.
        gradient: (x, y) change of density across a body unit.
        blur: weight of the neighbours in a three-tap blur, 0 to 0.25.
        noise: standard deviation of the grain.
        margins: (left, top, right, bottom) of the collimated border, in half images.
        border: brightness of that border.
        marker: the letter of the side marker, "" for none.
        marker_at: (x, y) of the marker, in half images.
        leads: number of electrocardiogram leads on the skin.
        projection: "AP" or "PA", as the report may say.
    """

    angle: float
    scale: tuple[float, float]
    shift: tuple[float, float]
    gamma: float
    window: tuple[float, float]
    gradient: tuple[float, float]
    blur: float
    noise: float
    margins: tuple[float, float, float, float]
    border: float
    marker: str
    marker_at: tuple[float, float]
    leads: int
    projection: str


@dataclass(frozen=True)
class Case:
    """One sample before it is rendered and reported."""

    seed: int
    split: str
    index: int
    body: Body
    view: View
    findings: tuple[CaseFinding, ...]

    def stream(self, name: str) -> np.random.Generator:
        """A generator of its own for one purpose, so that wording never changes the pixels."""
        return stream(self.seed, self.split, self.index, name)


def stream(seed: int, split: str, index: int, name: str) -> np.random.Generator:
    """The random generator of one sample and one purpose.

    Args:
        seed: seed of the data set.
        split: name of the split.
        index: number of the sample in its split.
        name: one of `STREAMS`.
    """
    return np.random.default_rng([seed, SPLITS.index(split), index, STREAMS.index(name)])


def draw_case(seed: int, split: str, index: int) -> Case:
    """Draws one case; the same arguments always give the same case."""
    rng = stream(seed, split, index, "case")
    findings = draw_findings(rng)
    body = _draw_body(rng)
    for finding in findings:
        if finding.name == "Cardiomegaly":
            body = replace(body, heart_ratio=finding.parts[0].extent)
        if finding.name == "Atelectasis":
            domes = list(body.domes)
            for part in finding.parts:
                domes[part.side == "left"] -= part.pull
            body = replace(body, domes=(domes[0], domes[1]))
    return Case(seed, split, index, body, _draw_view(rng, body), findings)


@dataclass(frozen=True)
class Lesion:
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
class CaseFinding:
    """A finding of a case; `side` is "right", "left", "bilateral" or "" for the heart."""

    name: str
    severity: str
    side: str
    parts: tuple[Lesion, ...]


def draw_findings(rng: np.random.Generator) -> tuple[CaseFinding, ...]:
    """Draws the findings of one case, in the order of `FINDINGS`.

    Sides are chosen so that one finding does not hide another: consolidation and atelectasis keep
    off a side that is full of fluid or that has collapsed.
    """
    if rng.random() < NORMAL_SHARE:
        return ()
    count = 1 + int(rng.choice(len(COUNT_SHARES), p=COUNT_SHARES))
    names = {str(name) for name in rng.choice(FINDINGS, size=count, replace=False)}
    taken: dict[str, int] = {"right": 0, "left": 0}
    found: dict[str, CaseFinding] = {}
    for name in ("Pneumothorax", "Pleural Effusion", "Pneumonia", "Atelectasis", "Cardiomegaly"):
        if name in names:
            found[name] = _draw(rng, name, taken)
    return tuple(found[name] for name in FINDINGS if name in found)


def _draw_body(rng: np.random.Generator) -> Body:
    low_volumes = bool(rng.random() < 0.2)
    right_dome = rng.uniform(0.16, 0.30) if low_volumes else rng.uniform(0.34, 0.54)
    left_dome = right_dome + rng.uniform(0.02, 0.08)
    return Body(
        half_width=rng.uniform(0.58, 0.76),
        wall=rng.uniform(0.10, 0.30),
        apex=rng.uniform(-0.82, -0.70),
        domes=(right_dome, left_dome),
        dome_height=rng.uniform(0.12, 0.22),
        heart_ratio=rng.uniform(0.36, 0.47),
        heart_y=rng.uniform(-0.06, 0.0),
        heart_tilt=rng.uniform(0.45, 0.8),
        aorta=rng.uniform(0.06, 0.10),
        tissue=rng.uniform(0.54, 0.66),
        air=rng.uniform(0.36, 0.46),
        bone=rng.uniform(0.05, 0.11),
        rib_spacing=rng.uniform(0.135, 0.165),
        rib_phase=rng.uniform(0.0, 1.0),
        rib_drop=rng.uniform(0.20, 0.36),
        vessels=rng.uniform(0.10, 0.20),
        breast=rng.uniform(0.03, 0.09) if rng.random() < 0.4 else 0.0,
        bubble=rng.uniform(0.07, 0.13) if rng.random() < 0.4 else 0.0,
        low_volumes=low_volumes,
    )


def _draw_view(rng: np.random.Generator, body: Body) -> View:
    """Draws a view in which both lungs are in the image, at any size and place that allows it."""
    angle = float(np.clip(rng.normal(0.0, 0.10), -0.22, 0.22))
    scale_y = rng.uniform(0.66, 1.14)
    scale_x = min(scale_y * rng.uniform(0.93, 1.07), 0.88 / body.half_width)
    lean = abs(float(np.sin(angle))) * 0.65 * scale_y
    half = body.half_width * scale_x + 0.02
    shift_x = _draw_within(rng, half + lean - 1.0, 1.0 - half - lean, 0.30)
    top, bottom = body.apex * scale_y, (max(body.domes) + body.dome_height) * scale_y
    shift_y = _draw_within(rng, -0.97 - top, 0.97 - bottom - 0.5 * lean, 0.30)
    # Collimation cuts into what lies around the chest, never into the lungs.
    around = (
        1.0 + shift_x - half - lean,
        1.0 + shift_y + top - 0.03,
        1.0 - shift_x - half - lean,
        1.0 - shift_y - bottom - 0.5 * lean,
    )
    collimated = rng.random(4) < (0.6 if rng.random() < 0.6 else 0.0)
    cuts = rng.uniform(0.2, 0.8, 4) * collimated
    left, upper, right, lower = (
        max(0.0, float(cut * room)) for cut, room in zip(cuts, around, strict=True)
    )
    marker = str(rng.choice(["L", "R"])) if rng.random() < 0.5 else ""
    marker_x = rng.uniform(0.70, 0.86) * (1 if marker == "L" else -1)
    return View(
        angle=angle,
        scale=(float(scale_x), float(scale_y)),
        shift=(shift_x, shift_y),
        gamma=float(np.exp(rng.uniform(-0.4, 0.4))),
        window=(float(rng.uniform(-0.08, 0.08)), float(rng.uniform(0.88, 1.10))),
        gradient=(float(rng.uniform(-0.12, 0.12)), float(rng.uniform(-0.12, 0.12))),
        blur=float(rng.uniform(0.0, 0.2)),
        noise=float(rng.uniform(0.008, 0.03)),
        margins=(left, upper, right, lower),
        border=float(rng.choice([0.0, 0.0, 0.0, 0.0, 0.95])),
        marker=marker,
        marker_at=(float(marker_x), float(rng.uniform(-0.88, -0.6))),
        leads=int(rng.integers(2, 5)) if rng.random() < 0.2 else 0,
        projection=str(rng.choice(["AP", "PA"])),
    )


def _draw_within(rng: np.random.Generator, low: float, high: float, most: float) -> float:
    """A number from `low` to `high`, at most `most` from 0; their middle where they cross."""
    if low > high:
        return 0.5 * (low + high)
    return float(rng.uniform(max(low, -most), min(high, most)))


def _draw(rng: np.random.Generator, name: str, taken: dict[str, int]) -> CaseFinding:
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
    return CaseFinding(name, SEVERITIES[name][level], side, parts)


def _draw_part(
    rng: np.random.Generator, name: str, level: int, side: str, taken: dict[str, int]
) -> Lesion:
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
    return Lesion(side, zone, extent, (across, along), tilt, pull, lobes)
