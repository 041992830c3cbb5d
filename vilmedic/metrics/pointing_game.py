"""Pointing game: does the attention of a finding's word fall on the finding?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vilmedic.config.types import Resamples
from vilmedic.datasets.image import Window, image_part
from vilmedic.datasets.lines import Lines, read_lines
from vilmedic.errors import DataError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.log import counted
from vilmedic.metrics.classification import interval, resamples
from vilmedic.metrics.contract import Metric

TIE = 1e-5
"""Regions whose attention is that share below the largest are as hot: float32 rounds a sum by its
place in the map."""

Box = tuple[float, float, float, float]
SIDES = ("left", "right")


@dataclass(frozen=True)
class Finding:
    """A finding of a sample.

    Args:
        name: what it is called.
        side: `left` or `right` of the patient; None for one in the middle or on both sides.
        boxes: left, top, right and bottom of its parts, as shares of the image's width and
            height.
    """

    name: str
    side: str | None
    boxes: tuple[Box, ...]

    @property
    def image_half(self) -> str | None:
        """The half of the image that it is in: a patient is looked at from the front."""
        return {"left": "right", "right": "left"}.get(self.side or "")


class _Hit(NamedTuple):
    """The region that one finding word points at."""

    sample: int
    finding: str
    side: float | None  # share that is on it; None for a finding without one
    inside: float
    area: float  # of the boxes, as a share of the image that the model sees


class PointingGame(Metric):
    """How often the hottest region of a word that names a finding lies on it.

    For each finding that a sample has, the words of its report that name the finding are taken,
    and for each the region with the largest attention. `side` is the share of those words whose
    region has its centre in the half of the image where the finding is, over findings that lie
    on one side; a model that looks anywhere gets 0.5. `box` is the share with the centre in a box
    of the finding; chance is `box_chance`, the mean area of the boxes (Zhang et al. 2018,
    "Top-down Neural Attention by Excitation Backprop"). Intervals resample the samples.

    Args:
        root: folder that holds the line files.
        file: name of the line files after the split: a JSON object a line, `{finding: {"side":
            "left", "parts": [{"box": [left, top, right, bottom]}]}}`, sides of the patient and
            shares of the image.
        words: the words that name each finding; null takes the last word of its name. A plural s
            is recognised.
        bootstrap: resamples behind each 95% interval.
    """

    numbers: ClassVar = {
        "side": "higher",
        "box": "higher",
        "box_chance": "neither",
        "words": "neither",
        "words_with_side": "neither",
    }

    def __init__(
        self,
        *,
        root: str,
        file: str = "finding.jsonl",
        words: dict[str, list[str]] | None = None,
        bootstrap: Resamples = 1000,
    ) -> None:
        self.root = root
        self.file = file
        self.words = words
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Read the findings, and refuse a model without words and regions."""
        evaluation.check_local()
        self._findings(evaluation)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`side`, `box` with intervals, `box_chance`, the number of `words`, and `classes`.

        All are None for models without words and regions.
        """
        findings = self._findings(evaluation)
        indices = [int(i) for i in evaluation.features.index]
        lines = evaluation.line_numbers(indices)
        present = {i: findings[line - 1] for i, line in zip(indices, lines, strict=True)}
        chosen = [i for i in indices if self._named(evaluation, i, present[i])]
        maps = evaluation.attention(chosen)
        hits: list[_Hit] = []
        for number, (index, attention) in enumerate(zip(chosen, maps or (), strict=False)):
            _, window = image_part(evaluation.dataset).original(evaluation.dataset, index)
            for word, finding in self._named(evaluation, index, present[index]):
                if word < len(attention):
                    hits.append(_point(number, finding, attention[word], window))
        report = _report(hits, self.bootstrap, evaluation.seed)
        report["classes"] = {
            name: _report([h for h in hits if h.finding == name], self.bootstrap, evaluation.seed)
            for name in sorted({hit.finding for hit in hits})
        }
        return report

    def _findings(self, evaluation: Evaluation) -> list[list[Finding]]:
        findings = read_findings(self.root, evaluation.split, self.file)
        last = max(evaluation.line_numbers(int(i) for i in evaluation.features.index))
        if last > len(findings):
            raise DataError(
                f"{self.root}/{evaluation.split}.{self.file} has "
                f"{counted(len(findings), 'line')}, but the "
                f"split has a sample in line {last}."
            )
        return findings

    def _named(
        self, evaluation: Evaluation, index: int, findings: Sequence[Finding]
    ) -> list[tuple[int, Finding]]:
        """The words of a report that name one of its findings: number and finding."""
        if not findings or not hasattr(evaluation.dataset, "words"):
            return []
        words = evaluation.dataset.words(evaluation.dataset.describe(index)["report"])
        named = []
        for finding in findings:
            names = (self.words or {}).get(finding.name) or [finding.name.split()[-1]]
            wanted = {form for name in names for form in (name.lower(), f"{name.lower()}s")}
            named += [(n, finding) for n, word in enumerate(words) if word.lower() in wanted]
        return named


def read_findings(root: str, split: str, file: str) -> list[list[Finding]]:
    """Read `{name: {"side": ..., "parts": [{"box": [...]}]}}` from each line of a file.

    Args:
        root: folder of the file.
        split: name of the split.
        file: name of the file after the split.

    Returns:
        The findings of each line.

    Raises:
        DataError: a line is not of this form.
    """
    lines = read_lines(root, split, file)
    return [_parse(lines, number) for number in range(len(lines))]


def _point(sample: int, finding: Finding, attention: Tensor, window: Window) -> _Hit:
    """Score the hottest region of a map [h, w], as the mean over equally hot regions."""
    height, width = attention.shape
    left, top, right, bottom = window
    sides, inside = [], []
    for row, column in (attention >= attention.max() * (1 - TIE)).nonzero().tolist():
        x = left + (column + 0.5) / width * (right - left)
        y = top + (row + 0.5) / height * (bottom - top)
        sides.append(0.5 if x == 0.5 else float(finding.image_half == ("left", "right")[x > 0.5]))
        inside.append(any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for b in finding.boxes))
    side = None if finding.image_half is None else sum(sides) / len(sides)
    seen = (right - left) * (bottom - top)
    area = sum(
        max(0.0, min(b[2], right) - max(b[0], left)) * max(0.0, min(b[3], bottom) - max(b[1], top))
        for b in finding.boxes
    )
    return _Hit(sample, finding.name, side, sum(inside) / len(inside), area / seen)


def _report(hits: list[_Hit], bootstrap: int, seed: int) -> dict[str, Any]:
    sided = [hit for hit in hits if hit.side is not None]
    report: dict[str, Any] = {"words": len(hits), "words_with_side": len(sided)}
    for name, judged, values in (
        ("side", sided, [hit.side for hit in sided]),
        ("box", hits, [hit.inside for hit in hits]),
    ):
        numbers = np.array(values, dtype=np.float64)
        report[name] = float(numbers.mean()) if len(numbers) else None
        if bootstrap:
            samples = np.array([hit.sample for hit in judged], dtype=np.int64)
            report[f"{name}_interval"] = _interval(numbers, samples, bootstrap, seed)
    report["box_chance"] = float(np.mean([hit.area for hit in hits])) if hits else None
    return report


def _interval(
    values: NDArray[np.float64], samples: NDArray[np.int64], bootstrap: int, seed: int
) -> list[float] | None:
    """The interval of the mean of values when the samples that they come from are resampled."""
    if not len(values):
        return None
    _, owner = np.unique(samples, return_inverse=True)
    total = np.bincount(owner, weights=values)
    size = np.bincount(owner).astype(np.float64)
    means = [
        counts @ total / (counts @ size)
        for counts in resamples(len(total), number=bootstrap, seed=seed)
    ]
    return interval(np.concatenate(means))


def _parse(lines: Lines, number: int) -> list[Finding]:
    try:
        record: dict[str, Any] = json.loads(lines[number])
        return [
            Finding(
                name,
                entry["side"] if entry.get("side") in SIDES else None,
                tuple(_box(part["box"]) for part in entry.get("parts", [])),
            )
            for name, entry in record.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{lines.where(number)}: not a record of findings ({type(error).__name__}: {error}). "
            'Expected: {"Pneumothorax": {"side": "left", "parts": [{"box": [0.5, 0.2, 0.7, 0.6]}]}}'
            " with left, top, right and bottom as shares of the image."
        ) from None


def _box(values: list[float]) -> Box:
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom
