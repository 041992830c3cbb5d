"""The curves of a run as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vilmedic.errors import escaped
from vilmedic.files import replace_bytes
from vilmedic.post_processing.scatter import COLOURS
from vilmedic.report.curves import Line, Panel, arrange, read_curves
from vilmedic.report.left_out import LeftOut

COLUMNS = 3
NOISY = 60  # points from which on a line is smoothed
SEED_STYLES = ("-", "--", "-.", ":")


def write_curves(run_dir: Path, left_out: LeftOut | None = None) -> Path | None:
    """Draw `curves.png` from what a run directory's training logged.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read, and the picture when it cannot be written.

    Returns:
        The picture; None when nothing was logged, or it cannot be written.
    """
    left_out = left_out or LeftOut(run_dir)
    panels = arrange(read_curves(run_dir, left_out))
    path = run_dir / "curves.png"
    if not panels:
        return None
    with left_out.damaged(path):
        replace_bytes(path, _drawn(panels, run_dir.resolve().name))
        return path
    return None


def _drawn(panels: Sequence[Panel], title: str) -> bytes:
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 2.9 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    head: dict[str, Any] = {"parse_math": False, "fontsize": 13, "fontweight": "bold"}
    figure.suptitle(escaped(title), x=0.01, ha="left", **head)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def draw_panel(axis: Axes, panel: Panel) -> None:
    """Draw the lines of a panel, one colour a name and one style a seed."""
    names = list(dict.fromkeys(line.name for line in panel.lines))
    seeds = list(dict.fromkeys(line.seed for line in panel.lines))
    shown = shorter(names)
    for line in panel.lines:
        thin = line.thinned()
        colour = COLOURS[names.index(line.name) % len(COLOURS)]
        style = SEED_STYLES[seeds.index(line.seed) % len(SEED_STYLES)]
        label = shown[names.index(line.name)]
        label = f"{label}, seed {line.seed}" if len(seeds) > 1 else label
        look: dict[str, Any] = {"color": colour, "linestyle": style}
        if len(thin.values) > NOISY:
            axis.plot(thin.steps, thin.values, alpha=0.25, linewidth=0.8, **look)
            axis.plot(thin.steps, smoothed(thin), linewidth=1.4, label=label, **look)
        else:
            few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(thin.values) < 20 else {}
            axis.plot(thin.steps, thin.values, linewidth=1.4, label=label, **look, **few)
    if panel.reference is not None:
        axis.axhline(panel.reference, color="#888888", linestyle=":", linewidth=1)
    values = [value for line in panel.lines for value in line.values]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * abs(high):  # a constant, which the axis would enlarge to its rounding
        room = 0.1 * abs(high) or 1.0
        axis.set_ylim(low - room, high + room)
    elif panel.logarithmic and low > 0:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10, loc="left", parse_math=False)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if len(names) * len(seeds) > 1:
        legend = axis.legend(fontsize=7, frameon=False, ncols=1 + (len(names) * len(seeds) > 6))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with $ is a name


def smoothed(line: Line, share: float = 0.05) -> list[float]:
    """The mean of a window of a share of the points around each point."""
    half = max(1, round(len(line.values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(line.values)])
    count = len(line.values)
    starts = np.maximum(np.arange(count) - half, 0)
    ends = np.minimum(np.arange(count) + half + 1, count)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def shorter(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with."""
    if len(names) < 2:
        return list(names)
    parts = [name.split("_") for name in names]
    common = 0
    while all(len(part) > common + 1 for part in parts) and (
        len({part[common] for part in parts}) == 1
    ):
        common += 1
    return ["_".join(part[common:]) for part in parts]
