from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.builders.folder_table import LabelColumns, Row, read_rows
from vilmedic.tables import Missing

OBJECTS: list[dict[str, Any]] = [
    {"file": "a.png", "text": "One.", "n": 1.0},
    {"file": ["b.png", None, "c.png"], "text": float("nan"), "n": None},
    {"file": "d.png", "text": "nan "},
    {"file": [], "text": None, "n": True},
]
VALUES = [
    {"file": ["a.png"], "text": ["One."], "n": ["1.0"]},
    {"file": ["b.png", "c.png"], "text": [], "n": []},
    {"file": ["d.png"], "text": [], "n": []},
    {"file": [], "text": [], "n": ["True"]},
]


def rows(path: Path, content: str | bytes, *columns: str) -> tuple[list[Row], Missing]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    missing = Missing()
    return read_rows(path, columns or ["file", "text", "n"], missing), missing


def lined(objects: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in objects)


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.json", "t.JSONL", "t.jsonl.gz"])
def test_json_lines_with_any_file_name(tmp_path: Path, name: str) -> None:
    content = lined(OBJECTS).encode()
    found, missing = rows(tmp_path / name, gzip.compress(content) if "gz" in name else content)
    assert [row.values for row in found] == VALUES
    assert [row.where for row in found] == [f"{tmp_path / name}:{n}" for n in (1, 2, 3, 4)]
    assert dict(missing.counts) == {"file": 2, "text": 3, "n": 2}


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_objects(tmp_path: Path, name: str, indent: int | None, encoding: str) -> None:
    content = json.dumps(OBJECTS, indent=indent).encode(encoding)
    found, _ = rows(tmp_path / name, content)
    assert [row.values for row in found] == VALUES
    assert found[2].where == f"{tmp_path / name}: entry 3"
    assert found[2].place == f"{name}: entry 3"


@pytest.mark.parametrize("indent", [None, 2])
def test_lists_of_splits(tmp_path: Path, indent: int | None) -> None:
    content = {
        "train": [{"id": "1", "report": "One.", "image_path": ["a/0.png", "a/1.png"]}],
        "val": [{"id": "2", "report": None, "image_path": ["b/0.png"]}],
        "test": [],
    }
    path = tmp_path / "annotation.json"
    found, _ = rows(path, json.dumps(content, indent=indent), "image_path", "report")
    assert [row.split for row in found] == ["train", "validate"]
    assert found[0].values == {"image_path": ["a/0.png", "a/1.png"], "report": ["One."]}
    assert found[1].where == f"{path}: val, entry 1"
    assert found[1].text("report") == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"file": "a"}\n\n{"file": \n', r"t\.jsonl:3 is not JSON: .* at character 10"),
        ("t.jsonl", '{"file": \n{"file": "a"}\n', r"t\.jsonl:1 is not JSON"),
        ("t.json", '[\n{"file": "a"},\n{"file" "b"}\n]', r"t\.json:3 is not JSON"),
        ("t.jsonl", '{"file": "a"}\n[1, 2]\n', r"t\.jsonl:2 is not a JSON object but list"),
        ("t.jsonl", '{"file": "a", "file": "b"}\n', r"t\.jsonl:1 .* has the key 'file' twice"),
        ("t.jsonl", '{"file": {"a": 1}}\n', r"t\.jsonl:1: 'file' holds an object"),
        ("t.jsonl", '{"file": [["a"]]}\n', r"t\.jsonl:1: 'file' holds lists"),
        ("t.jsonl", '{"file": "\\ud800"}\n', r"t\.jsonl:1: 'file' holds half a character"),
        ("t.jsonl", '{"file": ' + "[" * 10**5 + "]" * 10**5 + "}\n", r":1 is JSON of too many"),
        ("t.json", '{"images": [{"file": "a"}], "info": 3}', r"t\.json:1: 'file'|no column 'file'"),
        ("t.json", '{\n"images": [], "info": 3}', r"with 'images', 'info', not a list of objects"),
        ("t.json", "3", r"t\.json is JSON with no keys, not a list of objects"),
        ("t.json", "[]", r"t\.json holds no objects"),
        ("t.jsonl", "", r"t\.jsonl:1 is not JSON"),
        ("t.jsonl", '{"files": "a"}\n', r"no column 'file'\. It has files\. Did you mean 'files'"),
    ],
)
def test_invalid_json_is_reported_with_its_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        rows(tmp_path / name, content, "file")
    assert len(str(error.value)) < 500


def test_a_key_missing_in_the_first_object(tmp_path: Path) -> None:
    found, missing = rows(tmp_path / "t.jsonl", '{"a": 1}\n{"a": 2, "b": 3}\n', "a", "b")
    assert [row.values["b"] for row in found] == [[], ["3"]]
    assert missing.counts["b"] == 1


def columns(
    cells: dict[str, list[str]], uncertain: str = "uncertain"
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The notes and the labels of each row, for columns of text cells."""
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


def test_number_columns_in_any_notation() -> None:
    cells = ["1", "1.0", "TRUE", "yes", "0", "0.00", "False", "n", "NaN", ""]
    assert columns({"Edema": cells})[1] == [("Edema",)] * 4 + [("No Finding",)] * 6
    notes, labels = columns({"Edema": ["1", "NA", "0"], "Mass; left": ["", "n/a", "1"]})
    assert notes == {"rows without a value in any label column, 'No Finding'": 1}
    assert labels == [("Edema",), ("No Finding",), ("Mass left",)]


@pytest.mark.parametrize("third", ["2", "maybe", "0.5", "1,0", "o", "-2", "inf"])
def test_a_third_value_in_a_number_column_is_an_error(third: str) -> None:
    with pytest.raises(DataError, match=rf"t\.csv:4: the column 'Edema' holds '{third}', and"):
        columns({"Edema": ["1", "0", third, "0"]})


def test_minus_one_is_noted_and_counted() -> None:
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


def test_missing_names_are_not_labels() -> None:
    cells = ["mass|NA", "nodule; nan", "none", "N/A", "", "mass, mass"]
    assert columns({"finding": cells})[1] == [("mass",), ("nodule",), (), (), (), ("mass",)]


def test_an_empty_column_does_not_affect_the_others() -> None:
    assert columns({"Edema": ["NaN", "NaN"], "Mass": ["0", "1"]})[1] == [("No Finding",), ("Mass",)]
