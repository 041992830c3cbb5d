"""The numbers logged during training, arranged in panels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vilmedic.errors import visible
from vilmedic.registry import METRICS
from vilmedic.report.left_out import LeftOut
from vilmedic.training.metrics_log import UNPLOTTED, read_entries

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
