from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.preparation.archives import lines, write_csv, write_images
from vilmedic.preparation.builders.padchest import TABLE, main, parse_labels

# The release has more columns than the builder reads; the first has no name.
HEADER = [
    "",
    "ImageID",
    "ImageDir",
    "StudyID",
    "PatientID",
    "Projection",
    "Pediatric",
    "ReportID",
    "Report",
    "MethodLabel",
    "Labels",
]
REPORT = " sin hallazg patolog . silu card normal ."


def row(number: int, patient: int, **given: str) -> list[str]:
    values = {
        "": str(number),
        "ImageID": f"2168401113669640{number:05d}_00-{number:03d}-001.png",
        "ImageDir": "0",
        "StudyID": f"s{number}",
        "PatientID": f"patient{patient}",
        "Projection": "PA",
        "Pediatric": "No",
        "ReportID": str(number),
        "Report": REPORT,
        "MethodLabel": "Physician",
        "Labels": "['normal']",
    } | given
    return [values[name] for name in HEADER]


def run(table: Path, root: Path, *options: str, status: int = 0) -> Path:
    assert main(["--table", str(table), "--root", str(root), *options]) == status
    return root


def every(root: Path, name: str) -> list[str]:
    return [x for split in ("train", "validate", "test") for x in lines(root / f"{split}.{name}")]


def many() -> list[list[str]]:
    return [row(n, n // 3) for n in range(90)]


def test_lines_and_splits_by_patient(tmp_path: Path) -> None:
    write_csv(tmp_path / f"{TABLE}.gz", HEADER, many())
    root = run(tmp_path, tmp_path / "out")
    assert sorted(every(root, "image.tok")) == sorted(line[1] for line in many())
    assert set(every(root, "report.tok")) == {REPORT.strip()}
    patients = [set(lines(root / f"{s}.patient.tok")) for s in ("train", "validate", "test")]
    assert [len(group) for group in patients] == [24, 3, 3]
    assert not patients[0] & patients[1]
    assert not patients[0] & patients[2]


def test_left_out_images_are_counted(tmp_path: Path) -> None:
    spoilt = [
        row(100, 50, Projection="EXCLUDE"),
        row(101, 50, Projection=""),
        row(102, 50, Report=""),
        row(103, 50, Report="nan"),
        row(104, 50, Report=" normal . ."),
        row(105, 50, Labels=""),
        row(106, 50, Labels="['']"),
        row(107, 50, PatientID=""),
    ]
    table = write_csv(tmp_path / "table.csv", HEADER, many() + spoilt)
    card = json.loads((run(table, tmp_path / "out") / "data_card.json").read_text())
    assert card["dropped"] == {
        "images of the projection EXCLUDE": 1,
        "images of the projection (blank)": 1,
        "images without a report": 2,
        "images whose report has no sentence of two words": 1,
        "images without labels": 2,
        "images without a patient": 1,
    }
    assert sum(of["lines"] for of in card["kept"].values()) == 90


def test_projections_and_physicians(tmp_path: Path) -> None:
    rows = many()
    for number in range(0, 90, 3):
        rows[number] = row(number, number // 3, Projection="L")
        rows[number + 1] = row(number + 1, number // 3, MethodLabel="RNN_model")
    table = write_csv(tmp_path / "table.csv", HEADER, rows)
    lateral = run(table, tmp_path / "l", "--projection", "l")
    assert sorted(every(lateral, "image.tok")) == sorted(line[1] for line in rows[::3])
    sure = run(table, tmp_path / "p", "--projection", "PA,AP", "--physician")
    assert sorted(every(sure, "image.tok")) == sorted(line[1] for line in rows[2::3])
    with pytest.raises(SystemExit):
        run(table, tmp_path / "x", "--projection", "AP_horizontl")


def test_only_existing_images_are_used(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "table.csv", HEADER, many())
    write_images(tmp_path / "images", [line[1] for line in many()[:40]])
    root = run(table, tmp_path / "out", "--images", str(tmp_path / "images"))
    assert len(every(root, "image.tok")) == 40


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("['pneumonia', ' pleural effusion']", ("pneumonia", "pleural effusion")),
        ("['normal', 'normal']", ("normal",)),
        ("[\"a, b\", 'c']", ("a b", "c")),
        ("[]", ()),
        ("", ()),
        ("__import__('os').system('true')", ("os", "true")),  # parsed, never executed
    ],
)
def test_labels_are_read_and_never_evaluated(text: str, labels: tuple[str, ...]) -> None:
    assert parse_labels(text) == labels


def test_a_table_of_another_release_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ["Image" if name == "ImageID" else name for name in HEADER]
    table = write_csv(tmp_path / "table.csv", header, many())
    run(table, tmp_path / "out", status=2)
    assert "has no column 'ImageID'" in capsys.readouterr().err


def test_missing_values_and_copies(tmp_path: Path) -> None:
    rows = many()
    for number, mark in ((0, "NaN"), (3, "NA"), (6, "None")):
        rows[number][HEADER.index(("PatientID", "Report", "Labels")[number // 3])] = mark
    table = write_csv(tmp_path / "table.csv", HEADER, rows)
    write_images(tmp_path / "images", [row[1] for row in rows])
    for number in range(10, 40, 6):  # a copy of an image of the next patient
        copy = tmp_path / "images" / rows[number + 2][1]
        copy.write_bytes((tmp_path / "images" / rows[number][1]).read_bytes())
    root = run(table, tmp_path / "out", "--images", str(tmp_path / "images"))
    card = json.loads((root / "data_card.json").read_text())
    assert card["missing"] == {"PatientID": 1, "Report": 1, "Labels": 1}
    assert sum(card["dropped"].values()) == 3
    assert len(card["notes"]["images of the same content as another one"]) == 5
    splits = [set(lines(root / f"{s}.patient.tok")) for s in ("train", "validate", "test")]
    for number in range(3, 13, 2):
        assert sum({f"patient{number}", f"patient{number + 1}"} <= names for names in splits) == 1
