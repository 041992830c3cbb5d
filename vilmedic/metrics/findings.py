"""Where the findings of a data set are: line files of JSON, as phantom data sets have them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vilmedic.datasets.lines import Lines, read_lines
from vilmedic.errors import DataError

Box = tuple[float, float, float, float]
SIDES = ("left", "right")


@dataclass(frozen=True)
class Finding:
    """A finding of a sample.

    Args:
        name: what it is called.
        side: `left` or `right` of the patient; None for one in the middle or on both sides.
        boxes: left, top, right and bottom of its parts, as shares of the picture's width and
            height.
    """

    name: str
    side: str | None
    boxes: tuple[Box, ...]

    @property
    def image_half(self) -> str | None:
        """The half of the picture that it is in: a patient is looked at from the front."""
        return {"left": "right", "right": "left"}.get(self.side or "")


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
            " with left, top, right and bottom as shares of the picture."
        ) from None


def _box(values: list[float]) -> Box:
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom
