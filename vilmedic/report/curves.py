"""Training curves: logged numbers arranged in panels and drawn."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vilmedic.checkpoints.left_out import LeftOut, read_entries
from vilmedic.drawing.colours import series_colours
from vilmedic.errors import escaped, visible
from vilmedic.evaluation.results import protocol_name
from vilmedic.files import replace_bytes
from vilmedic.log import counted
from vilmedic.registry import METRICS
from vilmedic.report.settings import data_of, read_settings, score_of, section
from vilmedic.training.metrics_log import UNPLOTTED

MOST_POINTS = 600
MOST_NAMES = 200  # of numbers, and of seeds, that are drawn: each name can be a panel
LARGEST = 1e300  # values beyond it, and their sums, have no place on an axis

_TITLES = {
    "loss_over_ln_batch": "Loss over ln(batch), 1 is guessing",
    "in_batch_r1": "Recall at 1 within the batch",
    "temperature": "Temperature",
    "duplicate_reports": "Share of repeated reports in a batch",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "samples_per_second": "Samples per second",
    "data_wait": "Share of time waiting for data",
    "memory_gib": "Most memory held, GiB",
}
_LOSSES = {"loss": "loss of single steps", "train_loss": "train_loss, mean of the epoch"}
_LOGARITHMIC = ("grad_norm",)
_REFERENCE = {"loss_over_ln_batch": 1.0}
_MATTER = 6  # panels that are drawn large; the page folds the others
_SCORES = 3  # of them at most so many hold scores
_SCORE_RANK = 1
_RANK = {
    **{"loss_over_ln_batch": 2, "grad_norm": 3, "lr": 3},
    **{"samples_per_second": 5, "data_wait": 5, "memory_gib": 5},
}
_RANKS = re.compile(r"median_rank|mean_rank")

BEST = "#c2410c"
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
        values: one number per step.
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
    """Lines that are drawn into one panel.

    Args:
        title: what they show.
        lines: the lines.
        logarithmic: whether the vertical axis is.
        reference: a value to compare with; None draws none.
        folded: whether it is not among the panels that matter most.
        best: the step of the best checkpoint of each seed.
    """

    title: str
    lines: list[Line]
    logarithmic: bool = False
    reference: float | None = None
    folded: bool = False
    best: dict[int, int] = field(default_factory=dict)


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
            # The last line may be half written: by a running command, or one that was killed.
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


def arrange(
    lines: Iterable[Line], *, score: str = "", best: Mapping[int, int] | None = None
) -> list[Panel]:
    """Lines by what belongs together: losses, scores, diagnostics, the machine.

    The panels that matter come first: the loss, scores, the one that chooses checkpoints before the
    others, and what shows a collapse. The others are folded.

    Args:
        lines: the lines.
        score: name of the score that the checkpoints are chosen by.
        best: the step of the best checkpoint of each seed.
    """
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        groups.setdefault(_group(line.name), []).append(line)

    def order(item: tuple[tuple[int, str], list[Line]]) -> tuple[int, bool]:
        (rank, _), members = item
        return rank, all(line.name != score for line in members)

    # Groups of the same rank stay in the order in which they were logged.
    ranked = sorted(groups.items(), key=order)
    scores = [key for key, _ in ranked if key[0] == _SCORE_RANK]
    later = set(scores[_SCORES:])
    panels = [
        Panel(
            title,
            members,
            logarithmic=members[0].name in _LOGARITHMIC,
            reference=_REFERENCE.get(members[0].name),
            best=dict(best or {}),
        )
        for (_, title), members in sorted(ranked, key=lambda item: item[0] in later)
    ]
    for panel in panels[_MATTER:]:
        panel.folded = True
    return panels


def best_steps(lines: Iterable[Line], score: str, better: str | None) -> dict[int, int]:
    """The step at which a score was best, for each seed; the first one of equal values.

    Args:
        lines: the curves of a run.
        score: name of the score that checkpoints are chosen by.
        better: `higher` or `lower`; None where that is not known, which gives none.
    """
    found = {}
    for line in lines:
        if line.name == score and better is not None:
            choose = np.argmax if better == "higher" else np.argmin
            found[line.seed] = line.steps[int(choose(line.values))]
    return found


def write_curves(run_dir: Path, left_out: LeftOut | None = None) -> Path | None:
    """Draw `curves.png` from what a run directory's training logged.

    Args:
        run_dir: the directory.
        left_out: takes the files that cannot be read, and the figure when it cannot be written.

    Returns:
        The figure; None when nothing was logged, or it cannot be written.
    """
    left_out = left_out or LeftOut(run_dir)
    settings = read_settings(run_dir, left_out)
    lines = read_curves(run_dir, left_out)
    score, better = score_of(run_dir, settings, left_out)
    panels = arrange(lines, score=score, best=best_steps(lines, score, better))
    path = run_dir / "curves.png"
    if not panels:
        return None
    with left_out.damaged(path):
        system, data = section(settings, "model").get("proto"), data_of(settings)
        title = ": ".join(filter(None, [run_dir.resolve().name, str(system or "")]))
        replace_bytes(path, _drawn(panels, f"{title} on {data}" if data else title))
        return path
    return None


def draw_panel(axis: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    """Draw the lines of a panel, one colour per name and one style per seed.

    Args:
        axis: where to.
        panel: what to draw.
        colours: of each name; see `series_colours`.
    """
    names = list(dict.fromkeys(line.name for line in panel.lines))
    seeds = list(dict.fromkeys(line.seed for line in panel.lines))
    shown = line_labels(names)
    for line in panel.lines:
        thin = line.thinned()
        style = SEED_STYLES[seeds.index(line.seed) % len(SEED_STYLES)]
        label = shown[names.index(line.name)]
        label = f"{label}, seed {line.seed}" if len(seeds) > 1 else label
        look: dict[str, Any] = {"color": colours[line.name], "linestyle": style}
        if len(thin.values) > NOISY:
            axis.plot(thin.steps, thin.values, alpha=0.25, linewidth=0.8, **look)
            axis.plot(thin.steps, smoothed(thin), linewidth=1.4, label=label, **look)
        else:
            few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(thin.values) < 20 else {}
            axis.plot(thin.steps, thin.values, linewidth=1.4, label=label, **look, **few)
    if panel.reference is not None:
        axis.axhline(panel.reference, color="#888888", linestyle=":", linewidth=1)
    for seed, step in panel.best.items():
        style = SEED_STYLES[seeds.index(seed) % len(SEED_STYLES)] if seed in seeds else "-"
        axis.axvline(step, color=BEST, linestyle=style, linewidth=0.8, alpha=0.7)
    values = [value for line in panel.lines for value in line.values]
    low, high = min(values), max(values)
    if high - low <= 1e-6 * abs(high):  # a constant: autoscaling would show its rounding
        margin = 0.1 * abs(high) or 1.0
        axis.set_ylim(low - margin, high + margin)
    elif panel.logarithmic and low > 0:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=10, loc="left", parse_math=False)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if len(names) * len(seeds) > 1:
        legend = axis.legend(fontsize=7, frameon=False, ncols=1 + (len(names) * len(seeds) > 6))
        for text in legend.get_texts():
            text.set_parse_math(False)  # a name with $ is a name


def smoothed(line: Line, share: float = 0.05) -> list[float]:
    """Moving average over a window that is a share of the points."""
    half = max(1, round(len(line.values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(line.values)])
    count = len(line.values)
    starts = np.maximum(np.arange(count) - half, 0)
    ends = np.minimum(np.arange(count) + half + 1, count)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def line_labels(names: Sequence[str]) -> list[str]:
    """Return the labels of the lines of a panel; two training losses say what each is of."""
    both = {"loss", "train_loss"} <= set(names)
    replaced = _LOSSES if both else {}
    pairs = zip(names, shorter(names), strict=True)
    return [replaced.get(name, short) for name, short in pairs]


def shorter(names: Sequence[str]) -> list[str]:
    """Remove the common first words of names."""
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
    shown = [panel for panel in panels if not panel.folded]
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    head: dict[str, Any] = {"parse_math": False, "fontsize": 13, "fontweight": "bold"}
    figure.suptitle(escaped(title), x=0.01, ha="left", **head)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = panel_colours(panels)
    for axis, panel in zip(axes, shown, strict=False):
        draw_panel(axis, panel, colours)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    notes = ["vertical line: the best checkpoint"] if panels[0].best else []
    if folded := len(panels) - len(shown):
        notes.append(f"{counted(folded, 'more panel')} in report.html")
    if notes:
        figure.supxlabel("; ".join(notes), x=0.01, ha="left", fontsize=9, color="#555555")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def panel_colours(panels: Iterable[Panel]) -> dict[str, str]:
    """The colour of each series of some panels; one number of several metrics has one colour."""
    groups = [list(dict.fromkeys(line.name for line in panel.lines)) for panel in panels]
    plain = {name: _number_of(name) for names in groups for name in names}
    colours = series_colours([[plain[name] for name in names] for names in groups])
    return {name: colours[number] for name, number in plain.items()}


def _number_of(name: str) -> str:
    """The name of a score without split and metric, such as `auroc`; other names unchanged."""
    found = _score_parts(name)
    return found[2] if found else name.removeprefix("feature_std_")


def _score_parts(name: str) -> tuple[str, str, str] | None:
    """The split, the metric and the number of a score; None for what is no score."""
    for metric in sorted(METRICS.names(), key=len, reverse=True):
        before, found, after = name.partition(f"_{metric}_")
        if found and after:
            return before, metric, after
    return None


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
    if name.startswith("feature_std_"):
        return 2, "Spread of the embeddings, 0 is collapsed"
    if name in _TITLES:
        return _RANK.get(name, 4), _TITLES[name]
    if (found := _score_parts(name)) is not None:
        before, metric, after = found
        ranks = ", median rank" if _RANKS.search(after) else ""
        number = re.match(r"(\d+)_", after)
        nth = f" ({number[1]})" if number else ""
        plain = protocol_name(metric)
        split = before.removeprefix("ema_").replace("validation", "validate")
        ema = ", averaged weights" if before.startswith("ema_") else ""
        plain = plain if metric == "knn" else plain.capitalize()
        title = f"{plain}{nth}{ranks}, {split} split{ema}"
        return _SCORE_RANK, title
    return 4, name.replace("_", " ")


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < LARGEST
