from __future__ import annotations

from typing import Any

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.folder_table import Row
from vilmedic.preparation.labels import CHEXPERT_LABELS, LabelColumns, present_labels
from vilmedic.tables import Missing

NAMES = ("Atelectasis", "Cardiomegaly", "No Finding")


@pytest.mark.parametrize(
    ("uncertain", "labels"),
    [
        ("negative", ("No Finding",)),
        ("positive", ("Atelectasis", "Cardiomegaly")),
        ("mixed", ("Atelectasis",)),
        ("drop", None),
    ],
)
def test_uncertain_labels(uncertain: str, labels: tuple[str, ...] | None) -> None:
    assert present_labels(["-1.0", "-1", ""], NAMES, uncertain) == labels


def test_certain_labels_do_not_depend_on_the_policy() -> None:
    for uncertain in ("negative", "positive", "mixed", "drop"):
        assert present_labels(["1.0", "0.0", ""], NAMES, uncertain) == ("Atelectasis",)
        assert present_labels(["", "0", "1"], NAMES, uncertain) == ("No Finding",)
        assert present_labels(["", "", ""], NAMES, uncertain) == ("No Finding",)


@pytest.mark.parametrize("value", ["2.0", "yes", "nan", "0.5"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=f"'{value}' is no label value"):
        present_labels([value, "", ""], NAMES, "negative")


def test_the_fourteen_labels() -> None:
    assert len(set(CHEXPERT_LABELS)) == 14
    assert list(CHEXPERT_LABELS) == sorted(CHEXPERT_LABELS)


def columns(
    cells: dict[str, list[str]], uncertain: str = "uncertain"
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The notes, and the labels of each row, of columns whose cells are texts."""
    names = list(cells)
    missing = Missing()
    rows = [
        Row(
            f"t.csv:{line}",
            {n: [v] if (v := missing.text(c, n)) else [] for n, c in zip(names, row, strict=True)},
        )
        for line, row in enumerate(zip(*cells.values(), strict=True), start=2)
    ]
    made = LabelColumns(names, rows, missing, uncertain, "No Finding")
    return made.notes, [made.of(row) for row in rows]


def test_columns_of_numbers_in_any_way_of_writing_them() -> None:
    cells = ["1", "1.0", "TRUE", "yes", "0", "0.00", "False", "n", "NaN", ""]
    assert columns({"Edema": cells})[1] == [("Edema",)] * 4 + [("No Finding",)] * 6
    notes, labels = columns({"Edema": ["1", "NA", "0"], "Mass; left": ["", "n/a", "1"]})
    assert notes == {"rows without a value in any label column, 'No Finding'": 1}
    assert labels == [("Edema",), ("No Finding",), ("Mass left",)]


@pytest.mark.parametrize("third", ["2", "maybe", "0.5", "1,0", "o", "-2", "inf"])
def test_a_third_value_in_a_column_of_numbers(third: str) -> None:
    with pytest.raises(DataError, match=rf"t\.csv:4: the column 'Edema' holds '{third}', and"):
        columns({"Edema": ["1", "0", third, "0"]})


def test_minus_one_is_said_and_counted() -> None:
    cells = {"Edema": ["-1", "-1.0", "1", "0"], "Mass": ["0", "1", "", "0"]}
    notes, labels = columns(cells)
    assert notes == {"values of -1, each a label of its own, 'uncertain' and the name": {
        "Edema": 2
    }}  # fmt: skip
    assert labels == [
        ("uncertain Edema",),
        ("uncertain Edema", "Mass"),
        ("Edema",),
        ("No Finding",),
    ]
    notes, labels = columns(cells, "absent")
    assert notes == {"values of -1, counted as absent": {"Edema": 2}}
    assert labels[:2] == [("No Finding",), ("Mass",)]
    with pytest.raises(DataError, match=r"t\.csv:2: the column 'Edema' holds -1 \(and 1 more"):
        columns(cells, "error")


def test_names_that_are_missing_are_no_labels() -> None:
    cells = ["mass|NA", "nodule; nan", "none", "N/A", "", "mass, mass"]
    assert columns({"finding": cells})[1] == [("mass",), ("nodule",), (), (), (), ("mass",)]


def test_a_column_without_values_changes_nothing_of_the_others() -> None:
    assert columns({"Edema": ["NaN", "NaN"], "Mass": ["0", "1"]})[1] == [("No Finding",), ("Mass",)]
