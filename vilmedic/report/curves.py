"""The curves of a run: the numbers logged during training, arranged in panels and drawn."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vilmedic.checkpoints.left_out import LeftOut, read_entries
from vilmedic.drawing.scatter import COLOURS
from vilmedic.errors import escaped, visible
from vilmedic.files import replace_bytes
from vilmedic.registry import METRICS
from vilmedic.training.metrics_log import UNPLOTTED

MOST_POINTS = 600
MOST_NAMES = 200  # of numbers, and of seeds, that are drawn: each name can be a panel
LARGEST = 1e300  # values beyond it, and their sums, have no place on an axis

_TITLES = {
    "loss_over_ln_batch": "Loss over ln(batch), 1 is chance",
    "in_batch_r1": "Recall at 1 within the batch",
    "temperature": "Temperature",
    "duplicate_reports": "Share of repeated reports in a batch",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "samples_per_second": "Samples a second",
    "data_wait": "Share of time waiting for data",
    "memory_gib": "Most memory held, GiB",
}
_LOGARITHMIC = ("grad_norm",)
_REFERENCE = {"loss_over_ln_batch": 1.0}
_MACHINE = ("samples_per_second", "data_wait", "memory_gib")
_RANKS = re.compile(r"median_rank|mean_rank")

COLUMNS = 3
NOISY = 60  # points from which on a line is smoothed
SEED_STYLES = ("-", "--", "-.", ":")


@dataclass
class Line:
    """One number of one run over its steps.

    Args:
        name: the key it was logged under.
        seed: the seed of the run.
        steps: optimizer steps.
        values: a number a step.
    """

    name: str
    seed: int
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def thinned(self, most: int = MOST_POINTS) -> Line:
        """The means of consecutive points, at most so many; the line itself when it is short."""
        stride = math.ceil(len(self.steps) / most)
        if stride <= 1:
            return self
        thin = Line(self.name, self.seed)
        for start in range(0, len(self.steps), stride):
            some = self.values[start : start + stride]
            thin.steps.append(self.steps[min(start + stride, len(self.steps)) - 1])
            thin.values.append(sum(some) / len(some))
        return thin


@dataclass
class Panel:
    """Lines that are drawn into one picture.

    Args:
        title: what they show.
        lines: the lines.
        logarithmic: whether the vertical axis is.
        reference: a value to compare with; None draws none.
    """

    title: str
    lines: list[Line]
    logarithmic: bool = False
    reference: float | None = None


def read_curves(run_dir: Path, left_out: LeftOut | None = None) -> list[Line]:
    """Every number of `metrics.jsonl` and `timing.jsonl` of all seeds, in the order logged.

    Args:
        run_dir: the directory.
        left_out: takes the files, and lines in them, that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    lines: dict[tuple[str, int], Line] = {}
    for file in ("metrics", "timing"):
        path = run_dir / f"{file}.jsonl"
        with left_out.damaged(path):
            entries = read_entries(path)
            # The last line may be half written: by a run that goes on, or one that was killed.
            odd = sum(entry is None and text.endswith(b"\n") for text, entry in entries)
            if odd:
                text = f"{odd:,} of {len(entries):,} lines, which are not what a run writes"
                left_out.add(path, text)
            for _, entry in entries:
                _add(lines, entry or {})
    for position, what in enumerate(("numbers", "seeds")):
        known = dict.fromkeys(key[position] for key in lines)
        if len(known) > MOST_NAMES:
            left_out.add(
                run_dir / "metrics.jsonl", f"of its {len(known):,} {what} all but {MOST_NAMES}"
            )
            kept = set(list(known)[:MOST_NAMES])
            lines = {key: line for key, line in lines.items() if key[position] in kept}
    return list(lines.values())


def arrange(lines: Iterable[Line]) -> list[Panel]:
    """Lines by what belongs together: losses, scores, diagnostics, the machine."""
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(_group(line.name), []).append(line)
    # The rank alone decides; groups of the same rank stay in the order in which they were logged.
    return [
        Panel(
            title,
            members,
            logarithmic=members[0].name in _LOGARITHMIC,
            reference=_REFERENCE.get(members[0].name),
        )
        for (_, title), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


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


def _add(lines: dict[tuple[str, int], Line], entry: dict[str, Any]) -> None:
    """Add the numbers of a line of a file to the curves."""
    for name, value in entry.items():
        if name in ("seed", "step", *UNPLOTTED) or not _finite(value):
            continue
        key = (name, entry["seed"])
        if key not in lines:
            lines[key] = Line(visible(name), entry["seed"])
        lines[key].steps.append(entry["step"])
        lines[key].values.append(float(value))


def _group(name: str) -> tuple[int, str]:
    """The rank and the title of the panel of a number."""
    if name == "loss" or name.endswith("_loss"):
        return 0, "Loss"
    if name in _MACHINE:
        return 6, _TITLES[name]
    if name in ("grad_norm", "lr"):
        return 5, _TITLES[name]
    if name.startswith("feature_std_"):
        return 3, "Spread of the features, 0 is collapsed"
    if name in _TITLES:
        return 2, _TITLES[name]
    for metric in sorted(METRICS.names(), key=len, reverse=True):
        before, found, after = name.partition(f"_{metric}_")
        if found and after:
            ranks = ", ranks" if _RANKS.search(after) else ""
            return 1, f"{before}: {metric.replace('_', ' ')}{ranks}"
    return 4, name.replace("_", " ")


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < LARGEST
