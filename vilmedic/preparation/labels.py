"""Labels out of tables: the 14 of CheXpert and MIMIC-CXR, and those of any columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vilmedic.datasets.lines import brief
from vilmedic.errors import DataError
from vilmedic.tables import Missing, trimmed

if TYPE_CHECKING:
    from vilmedic.preparation.folder_table import Row

NO_FINDING = "No Finding"
CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    NO_FINDING,
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
UNCERTAIN = ("negative", "positive", "mixed", "drop")
# Of the five competition labels, those that GLoRIA counts as present, after Irvin et al. 2019.
MIXED_POSITIVE = frozenset({"Atelectasis", "Edema", "Pleural Effusion"})
UNCERTAIN_CELLS = ("uncertain", "absent", "error")  # what -1 counts as in columns of 0 and 1
_WORDS = {"true": 1, "yes": 1, "y": 1, "false": 0, "no": 0, "n": 0}
_BETWEEN = re.compile(r"[,;|]")
_NUMBERS = {"": 0, "1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


def present_labels(
    values: Sequence[str], names: Sequence[str], uncertain: str
) -> tuple[str, ...] | None:
    """The labels that count as present in a row of a label table.

    Args:
        values: one a label: `1.0` is present, `0.0` absent, `-1.0` uncertain, blank not mentioned.
        names: the labels.
        uncertain: `negative` counts uncertain labels as absent, `positive` as present, `mixed` as
            present for atelectasis, edema and pleural effusion only, and `drop` refuses the row.

    Returns:
        The names, in the order given; `No Finding` when nothing is present; None when the row is
        refused.

    Raises:
        ValueError: a value is none of the four.
    """
    present = []
    for name, value in zip(names, values, strict=True):
        number = label_number(value)
        if number == -1:
            if uncertain == "drop":
                return None
            if uncertain == "positive" or (uncertain == "mixed" and name in MIXED_POSITIVE):
                present.append(name)
        elif number == 1:
            present.append(name)
    return tuple(present) or (NO_FINDING,)


def label_number(value: str) -> int:
    """1, 0 or -1 of a cell of a label table; a blank one is 0.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _NUMBERS[value]
    except KeyError:
        raise ValueError(f"'{value}' is no label value; allowed are 1, 0, -1 and blank") from None


class LabelColumns:
    """The labels of the rows of any table.

    A column holds names, or is one of 0 and 1 when at least half of its values are 0, 1, -1, true,
    false, yes or no; its own name is then the label.

    Args:
        columns: to read.
        rows: of the table.
        missing: which parts of a list of names are missing.
        uncertain: what -1 counts as, one of `UNCERTAIN_CELLS`.
        no_label: label of a row with 1 in none of its columns, where all are of 0 and 1.

    Attributes:
        notes: what was counted.

    Raises:
        DataError: a column of 0 and 1 holds something else, or -1 that is to be an error.
    """

    def __init__(
        self,
        columns: Sequence[str],
        rows: Sequence[Row],
        missing: Missing,
        uncertain: str,
        no_label: str,
    ) -> None:
        self.missing, self.uncertain, self.no_label = missing, uncertain, no_label
        self.columns = columns
        self.numbers = {name for name in columns if _is_number_column(name, rows)}
        filled = {name for name in columns if any(row.values[name] for row in rows)}
        self.only_numbers = bool(self.numbers) and filled == self.numbers
        self.notes: dict[str, Any] = {}
        unsure: Counter[str] = Counter()
        for name in columns:
            if name in self.numbers:
                unsure[name] = self._check(name, rows)
        if +unsure:
            meaning = "counted as absent"
            if uncertain == "uncertain":
                meaning = "each a label of its own, 'uncertain' and the name"
            self.notes[f"values of -1, {meaning}"] = dict(+unsure)
        blank = sum(not any(row.values[name] for name in columns) for row in rows)
        if self.only_numbers and blank:
            self.notes[f"rows without a value in any label column, '{no_label}'"] = blank

    def of(self, row: Row) -> tuple[str, ...]:
        """The labels of a row; none when it names none."""
        found: list[str] = []
        for name in self.columns:
            values = row.values[name]
            if name not in self.numbers:
                parts = [trimmed(part) for value in values for part in _BETWEEN.split(value)]
                found += [part for part in parts if not self.missing.is_missing(part)]
                continue
            numbers = {_cell_number(value) for value in values}
            label = " ".join(_BETWEEN.sub(" ", name).split())
            if 1 in numbers:
                found.append(label)
            elif -1 in numbers and self.uncertain == "uncertain":
                found.append(f"uncertain {label}")
        if not found and self.only_numbers:
            return (self.no_label,)
        return tuple(dict.fromkeys(found))

    def _check(self, name: str, rows: Sequence[Row]) -> int:
        """How many values of a column are -1."""
        cells = [(row, value) for row in rows for value in row.values[name]]
        other = [(row, value) for row, value in cells if _cell_number(value) is None]
        if other:
            row, value = other[0]
            raise DataError(
                f"{row.where}: the column '{name}' holds '{brief(value)}', and mostly 0 and 1"
                f"{_further(other)}. Allowed are 0, 1, -1, true, false, yes, no and missing values "
                "(--missing says which texts count as such); names of labels belong into a column "
                "of their own."
            )
        unsure = [(row, value) for row, value in cells if _cell_number(value) == -1]
        if unsure and self.uncertain == "error":
            raise DataError(
                f"{unsure[0][0].where}: the column '{name}' holds -1{_further(unsure)}. Say with "
                f"--uncertain what it counts as: {', '.join(UNCERTAIN_CELLS[:2])}."
            )
        return len(unsure)


def _is_number_column(name: str, rows: Sequence[Row]) -> bool:
    values = [value for row in rows for value in row.values[name]]
    known = sum(_cell_number(value) is not None for value in values)
    return bool(values) and 2 * known >= len(values)


def _cell_number(value: str) -> int | None:
    """1, 0 or -1 in any way of writing them; None for all else."""
    word = value.lower()
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = float(word)
    except ValueError:
        return None
    return int(number) if number in (0, 1, -1) else None


def _further(cells: Sequence[object]) -> str:
    return f" (and {len(cells) - 1:,} more such cells)" if len(cells) > 1 else ""
