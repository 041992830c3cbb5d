from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.preparation.archives import lines, write_csv, write_images
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.preparation.builders.any_folder import main

HEADER = ["file", "text", "diagnosis", "who", "mass", "nodule"]
SPLITS = ("train", "validate", "test")


def rows(number: int = 40) -> list[list[str]]:
    return [
        [
            f"deep/{n}.png",
            f"Report {n},\n second line.",
            "mass|nodule" if n % 2 else "normal",
            f"person {n // 2}",
            str(n % 2),
            "1.0" if n % 4 == 0 else "",
        ]
        for n in range(number)
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_csv(tmp_path / "table.csv", HEADER, rows())
    write_images(tmp_path / "images", [row[0] for row in rows()])
    return tmp_path


def run(source: Path, *options: str, table: str = "table.csv", status: int = 0) -> Path:
    root = source / "out"
    arguments = ["--root", str(root), "--images", str(source / "images"), "--image-column", "file"]
    assert main([*arguments, "--table", str(source / table), *options]) == status
    return root


def every(root: Path, name: str) -> list[str]:
    return [x for split in SPLITS for x in lines(root / f"{split}.{name}")]


def test_images_reports_labels_and_groups(source: Path) -> None:
    options = ["--report-column", "text", "--label-columns", "diagnosis", "--group-column", "who"]
    root = run(source, *options, "--split", "0.5,0.25,0.25")
    assert [len(lines(root / f"{s}.image.tok")) for s in SPLITS] == [20, 10, 10]
    table = zip(
        every(root, "image.tok"),
        every(root, "report.tok"),
        every(root, "label.tok"),
        every(root, "patient.tok"),
        strict=True,
    )
    for image, report, labels, patient in table:
        number = int(Path(image).stem)
        assert report == f"Report {number}, second line."
        assert labels == ("mass,nodule" if number % 2 else "normal")
        assert patient == f"person {number // 2}"
    groups = [set(lines(root / f"{s}.patient.tok")) for s in SPLITS]
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]


def test_label_columns_of_zeros_and_ones(source: Path) -> None:
    root = run(source, "--label-columns", "mass,nodule")
    for image, labels in zip(every(root, "image.tok"), every(root, "label.tok"), strict=True):
        number = int(Path(image).stem)
        wanted = ["mass"] * (number % 2 == 1) + ["nodule"] * (number % 4 == 0)
        assert labels == (",".join(wanted) or "No Finding")
    assert not list(root.glob("*.report.tok"))
    card = json.loads((root / "data_card.json").read_text())
    assert card["notes"]["splits"].startswith("by row")


def test_a_column_of_splits(source: Path) -> None:
    names = ["train", "Val", "test", "training"]
    table = [[*row, names[n % 4]] for n, row in enumerate(rows())]
    write_csv(source / "table.csv", [*HEADER, "fold"], table)
    root = run(source, "--split-column", "fold", "--group-column", "who", "--leaks", "keep")
    assert [len(lines(root / f"{s}.image.tok")) for s in SPLITS] == [20, 10, 10]
    card = json.loads((root / "data_card.json").read_text())
    assert card["notes"]["groups that are in several splits"] == 20
    assert card["notes"]["groups that are in several splits, by name"][:2] == [
        "person 0",
        "person 1",
    ]
    root = run(source, "--split-column", "fold", "--group-column", "who", "--force")
    assert [len(lines(root / f"{s}.image.tok")) for s in ("validate", "test")] == [10, 10]
    assert not (root / "train.image.tok").exists()
    assert card_of(root)["dropped"] == {"rows whose group is in a later split as well": 20}


def test_left_out_rows_are_listed_with_reasons(source: Path) -> None:
    spoilt = [
        ["", "Text.", "a", "p", "", ""],
        ["gone.png", "Text.", "a", "p", "", ""],
        ["deep/1.png", " . ", "a", "p", "", ""],
        ["deep/1.png", "Text.", "", "p", "", ""],
        ["deep/1.png", "Text.", "a", "", "", ""],
    ]
    write_csv(source / "table.csv", HEADER, rows() + spoilt)
    root = run(
        source, "--report-column", "text", "--label-columns", "diagnosis", "--group-column", "who"
    )
    assert json.loads((root / "data_card.json").read_text())["dropped"] == {
        "rows without a group": 1,
        "rows without a report": 1,
        "rows without an image": 1,
        "rows without labels": 1,
        "rows whose image is not in the folder": 1,
    }
    table = [line.split("\t") for line in lines(root / "left_out.tsv")]
    assert table == [
        ["path", "reason", "detail"],
        ["", "rows without an image", "table.csv:82"],
        ["gone.png", "rows whose image is not in the folder", "table.csv:83"],
        ["deep/1.png", "rows without a report", "table.csv:84"],
        ["deep/1.png", "rows without labels", "table.csv:85"],
        ["deep/1.png", "rows without a group", "table.csv:86"],
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_json_lines(source: Path, packed: bool) -> None:
    objects = [
        {"file": [f"deep/{n}", f"deep/{n + 1}"], "text": f"Report {n}.", "tags": ["a", f"b{n % 2}"]}
        for n in range(0, 40, 2)
    ]
    text = "\n".join(json.dumps(one) for one in objects)
    name = "table.jsonl.gz" if packed else "table.jsonl"
    (source / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    options = ["--report-column", "text", "--label-columns", "tags", "--ext", ".png"]
    root = run(source, *options, table=name)
    assert set(every(root, "label.tok")) == {"a,b0"}
    assert "deep/0.png,deep/1.png" in every(root, "image.tok")
    assert len(every(root, "report.tok")) == 20


def card_of(root: Path) -> dict:
    return json.loads((root / "data_card.json").read_text())


def test_a_build_with_changed_input_is_refused(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "images" / "deep" / "0.png").rename(source / "kept.png")
    root = run(source)
    (source / "images" / "unnamed.png").write_bytes(b"")
    run(source)
    assert "nothing to do" in capsys.readouterr().out
    (source / "kept.png").rename(source / "images" / "deep" / "0.png")
    run(source, status=2)
    assert "was made with list of images of other content" in capsys.readouterr().err
    run(source, "--force")
    assert "deep/0.png" in every(root, "image.tok")
    run(source, "--ext", ".png", status=2)
    assert "ext  instead of .png" in capsys.readouterr().err


def test_a_label_column_of_zeros(source: Path) -> None:
    write_csv(source / "table.csv", HEADER, [[*row[:4], "0", row[5]] for row in rows()])
    root = run(source, "--label-columns", "mass,nodule")
    assert set(every(root, "label.tok")) == {"nodule", "No Finding"}


def test_rows_of_one_image_stay_together(source: Path) -> None:
    table = [[f"deep/{n}.png,deep/{n + 1}.png", *rows()[n][1:]] for n in range(0, 40, 2)]
    again = [[f"./deep//{n}.png", *rows()[n][1:]] for n in range(1, 40, 2)]
    write_csv(source / "table.csv", HEADER, table + again)
    root = run(source, "--split", "0.5,0.25,0.25")
    held = [
        {name for line in lines(root / f"{s}.image.tok") for name in line.split(",")}
        for s in SPLITS
    ]
    assert [len(names) for names in held] == [20, 10, 10]
    assert len(set.union(*held)) == 40
    assert card_of(root)["notes"]["images in several rows, which stay together"] == 20


@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_written_by_spreadsheets(source: Path, mark: str) -> None:
    text = "\r\n".join(mark.join([row[0], row[3], row[4]]) for row in rows())
    (source / "table.csv").write_text(f"file{mark}who{mark}mass\r\n{text}\r\n  \r\n")
    root = run(source, "--group-column", "who", "--label-columns", "mass")
    assert len(every(root, "image.tok")) == 40
    assert set(every(root, "label.tok")) == {"mass", "No Finding"}


@pytest.mark.parametrize("ext", ["png", ".png"])
def test_extension_with_and_without_its_dot(source: Path, ext: str) -> None:
    bare = [[row[0].removesuffix(".png"), *row[1:]] for row in rows()]
    write_csv(source / "table.csv", HEADER, bare)
    assert "deep/0.png" in every(run(source, "--ext", ext), "image.tok")


def test_absolute_paths_within_the_folder(source: Path) -> None:
    table = [[str(source / "images" / row[0]), *row[1:]] for row in rows()]
    write_csv(source / "table.csv", HEADER, table)
    assert "deep/0.png" in every(run(source), "image.tok")


def test_names_that_differ_in_case_are_found_and_counted(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [[row[0].replace("deep", "Deep").upper(), *row[1:]] for row in rows()]
    write_csv(source / "table.csv", HEADER, [*table, ["gone.png", *rows()[0][1:]]])
    root = run(source, "--report-column", "text")
    assert sorted(every(root, "image.tok")) == sorted(row[0] for row in rows())
    shown = capsys.readouterr().out
    assert "images found under a name that differs in letter case: 40" in shown
    assert "1 row whose image is not in the folder, such as gone.png (table.csv:82)" in shown


def write_dicom(path: Path, **fields: str) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.Rows, data.Columns = 8, 8
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 15, 0, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    seed = zlib.crc32(str(path).encode())  # a different image in each file
    pixels = np.random.default_rng(seed).integers(0, 4096, (8, 8), dtype=np.uint16)
    data.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data)


def test_dicom_headers(tmp_path: Path) -> None:
    for n in range(30):
        write_dicom(
            tmp_path / "images" / f"p{n // 2}" / f"{n}.dcm",
            PatientID=f"id{n // 2}",
            ImageComments=f"Clear lungs {n}.",
            ViewPosition="PA" if n % 2 else "AP",
        )
    (tmp_path / "images" / "p0" / "torn.dcm").write_bytes(b"no header")
    (tmp_path / "images" / "p0" / "notes.txt").write_text("not an image")
    root = tmp_path / "out"
    arguments = ["--root", str(root), "--images", str(tmp_path / "images"), "--dicom"]
    arguments += ["--report-column", "ImageComments", "--label-columns", "ViewPosition"]
    assert main([*arguments, "--group-column", "PatientID", "--workers", "1"]) == 0
    for image, report, label, patient in zip(
        *(every(root, f"{k}.tok") for k in ("image", "report", "label", "patient")), strict=True
    ):
        number = int(Path(image).stem)
        assert image == f"p{number // 2}/{number}.dcm"
        assert report == f"Clear lungs {number}."
        assert label == ("PA" if number % 2 else "AP")
        assert patient == f"id{number // 2}"
    card = json.loads((root / "data_card.json").read_text())
    assert card["dropped"] == {"DICOM files that cannot be read": 1, "files that are no DICOM": 1}


def dicom(tmp_path: Path, *options: str, status: int = 0) -> Path:
    root = tmp_path / "out"
    arguments = ["--root", str(root), "--images", str(tmp_path / "images"), "--dicom"]
    arguments += ["--report-column", "ImageComments", "--workers", "1"]
    assert main([*arguments, *options]) == status
    return root


def test_dicom_files_are_found_by_prefix_and_may_lack_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    for n in range(30):
        write_dicom(images / f"IM{n:06}", ImageComments=f"Clear lungs {n}.")
    write_dicom(images / "report.dcm", ImageComments="No picture.")
    data = pydicom.dcmread(images / "report.dcm")
    del data.PixelData
    data.save_as(images / "report.dcm")
    root = dicom(tmp_path)
    assert sorted(every(root, "image.tok")) == [f"IM{n:06}" for n in range(30)]
    assert card_of(root)["dropped"] == {"DICOM files without an image": 1}
    dicom(tmp_path)
    assert "nothing to do" in capsys.readouterr().out
    write_dicom(images / "IM000000", ImageComments="Other lungs 0.")
    dicom(tmp_path, status=2)
    assert "was made with headers of other content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report-column", "texts"], "has no column 'texts'"),
        (["--label-columns", "diagnoses"], "Did you mean 'diagnosis'?"),
        (["--split-column", "who"], "says 'person 0'; allowed are train"),
        (["--split", "0.99,0.005,0.005"], "No patient is left for the split 'validate'"),
    ],
)
def test_wrong_options_are_explained(
    source: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    run(source, *options, status=2)
    assert message in capsys.readouterr().err
    assert not (source / "out").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_paths_outside_the_folder(
    source: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_csv(source / "table.csv", HEADER, [[name, "Text.", "a", "p", "", ""]])
    run(source, status=2)
    assert "does not lie in" in capsys.readouterr().err


def test_an_unknown_header_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dicom(tmp_path / "images" / "a.dcm", PatientID="1")
    arguments = ["--root", str(tmp_path / "out"), "--images", str(tmp_path / "images"), "--dicom"]
    assert main([*arguments, "--group-column", "PatientId"]) == 2
    assert "'PatientId' is no DICOM field. Did you mean 'PatientID'?" in capsys.readouterr().err


def test_every_script_runs_on_its_own(tmp_path: Path) -> None:
    folder = Path(__file__).parents[3] / "data"
    for name in ("mimic_cxr", "indiana", "padchest", "chexpert", "folder"):
        script = folder / f"make_{name}.py"
        command = [sys.executable, str(script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "--root" in done.stdout


def test_missing_values_in_every_column(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing values are recognised alike for images, reports, labels and groups."""
    marks = ["NaN", "NA", "n/a ", "None", "NULL", "", " ", "nan"]
    table = rows()
    for place in range(4):
        for number, mark in enumerate(marks):
            table[8 * place + number][place] = mark
    write_csv(source / "table.csv", HEADER, table)
    options = ["--report-column", "text", "--label-columns", "diagnosis", "--group-column", "who"]
    root = run(source, *options, "--split", "1,0,0")
    assert len(every_train(root)) == 8
    assert not {mark.strip().lower() for mark in marks} & {
        cell.lower() for line in every_train(root) for cell in line
    }
    card = card_of(root)
    assert card["missing"] == {"file": 8, "text": 8, "diagnosis": 8, "who": 8}
    assert card["dropped"] == {
        "rows without a group": 8,
        "rows without a report": 8,
        "rows without an image": 8,
        "rows without labels": 8,
    }
    shown = capsys.readouterr().out
    assert "missing values by column: file 8, text 8, diagnosis 8, who 8" in shown
    assert f"all that is left out, with reasons: {root / 'left_out.tsv'}" in shown
    root = run(source, *options, "--split", "1,0,0", "--missing", "nan,na", "--force")
    assert card_of(root)["missing"] == {"file": 5, "text": 5, "diagnosis": 5, "who": 5}
    assert {"n/a", "None", "NULL"} <= {cell for line in every_train(root) for cell in line}


def every_train(root: Path) -> list[tuple[str, ...]]:
    kinds = ("image", "report", "label", "patient")
    return list(zip(*(lines(root / f"train.{kind}.tok") for kind in kinds), strict=True))


def test_an_empty_build_lists_all_left_out_rows(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(source / "table.csv", HEADER, [[f"elsewhere/{row[0]}", *row[1:]] for row in rows()])
    run(source, status=2)
    shown = capsys.readouterr().err
    assert (
        "left out 40 rows whose image is not in the folder, such as elsewhere/deep/0.png" in shown
    )
    assert f"a file of that name is at {Path('deep', '0.png')}." in shown
    beside = source / "out.left_out.tsv"
    assert f"all that is left out, with reasons: {beside}" in shown
    assert len(lines(beside)) == 41
    write_csv(source / "table.csv", HEADER, rows())
    run(source)
    assert not beside.exists()


def test_an_option_sets_the_meaning_of_minus_one(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(source / "table.csv", HEADER, [[*row[:4], "-1", row[5]] for row in rows()])
    options = ["--label-columns", "mass,nodule", "--split", "1,0,0"]
    root = run(source, *options)
    assert set(lines(root / "train.label.tok")) == {"uncertain mass", "uncertain mass,nodule"}
    assert "'uncertain' and the name: mass 40" in capsys.readouterr().out
    root = run(source, *options, "--uncertain", "absent", "--force")
    assert set(lines(root / "train.label.tok")) == {"No Finding", "nodule"}
    assert "values of -1, counted as absent: mass 40" in capsys.readouterr().out
    run(source, *options, "--uncertain", "error", "--force", status=2)
    assert "table.csv:2: the column 'mass' holds -1" in capsys.readouterr().err


def test_a_name_with_a_comma_keeps_its_report(source: Path) -> None:
    write_images(source / "images", ["frontal, lying.png", "lying.png"])
    table = [["frontal, lying.png", "Of the first.", "a", "p", "", ""], *rows()]
    write_csv(source / "table.csv", HEADER, table)
    root = run(source, "--report-column", "text", "--split", "1,0,0")
    assert lines(root / "train.image.tok")[0] == '"frontal, lying.png"'
    assert lines(root / "train.report.tok")[0] == "Of the first."
    data = ImageDataset(
        split="train", training=False, seed=0, root=str(root), image_path=str(source / "images"),
        resize=8, crop=8, run_dir=source,
    )  # fmt: skip
    assert len(data.images(0)) == 1
    assert data.show(0)["image"] == [str(source / "images" / "frontal, lying.png")]


def test_a_list_with_a_missing_image(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [["deep/1.png,gone.png", *rows()[0][1:]], *rows(), ["deep/2.png, x", *rows()[0][1:]]]
    write_csv(source / "table.csv", HEADER, table)
    run(source, status=2)
    shown = capsys.readouterr().err
    assert (
        "table.csv:2: 'deep/1.png,gone.png' is no image, and of the images that it lists" in shown
    )
    assert "(and 1 more row of this kind)" in shown
    objects = [{"file": ["deep/1.png", "gone.png"]}, {"file": ["deep/2.png"]}]
    (source / "t.jsonl").write_text("\n".join(map(json.dumps, objects)))
    root = run(source, "--split", "1,0,0", table="t.jsonl")
    assert lines(root / "train.image.tok") == ["deep/1.png", "deep/2.png"]
    assert lines(root / "left_out.tsv")[1:] == [
        "gone.png\timages of a list that are not in the folder\tt.jsonl:1"
    ]


def test_the_splits_of_an_annotation_file(source: Path) -> None:
    """The format of report generation projects: three lists, with images as lists of paths."""
    entry = [
        {"id": str(n), "report": f"Report {n}.", "image_path": [f"deep/{n}.png"], "split": "x"}
        for n in range(12)
    ]
    content = {"train": entry[:6], "val": entry[6:9], "test": entry[9:]}
    (source / "annotation.json").write_text(json.dumps(content))
    arguments = ["--root", str(source / "out"), "--images", str(source / "images")]
    arguments += ["--table", str(source / "annotation.json"), "--image-column", "image_path"]
    assert main([*arguments, "--report-column", "report"]) == 0
    for split, first, last in (("train", 0, 6), ("validate", 6, 9), ("test", 9, 12)):
        wanted = [f"Report {n}." for n in range(first, last)]
        assert lines(source / "out" / f"{split}.report.tok") == wanted
    assert card_of(source / "out")["notes"] == {"splits": "those of the table"}
    assert main([*arguments, "--split", "0.25,0.25,0.5", "--force"]) == 0
    assert len(lines(source / "out" / "test.image.tok")) == 6


def test_copies_stay_in_one_split_and_are_named(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(0, 40, 4):
        copy = source / "images" / f"copy{number}.png"
        copy.write_bytes((source / "images" / "deep" / f"{number}.png").read_bytes())
    copies = [[f"copy{n}.png", "Text.", "a", f"other {n}", "", ""] for n in range(0, 40, 4)]
    write_csv(source / "table.csv", HEADER, rows() + copies)
    for options in (["--group-column", "who"], []):
        root = run(source, *options, "--split", "0.5,0.25,0.25", "--force")
        assert sum(len(lines(root / f"{s}.image.tok")) for s in SPLITS) == 50
        for split in SPLITS:
            names = set(lines(root / f"{split}.image.tok"))
            for number in range(0, 40, 4):
                assert (f"copy{number}.png" in names) == (f"deep/{number}.png" in names)
        shown = capsys.readouterr().out
        assert "images of the same content as another one: copy0.png = deep/0.png, " in shown
        assert "and 5 more" in shown


def test_one_image_of_two_groups(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [[row[0], "Again.", "a", f"other {n}", "", ""] for n, row in enumerate(rows()[:10])]
    write_csv(source / "table.csv", HEADER, rows() + again)
    root = run(source, "--group-column", "who", "--split", "0.5,0.25,0.25")
    held = [set(lines(root / f"{s}.image.tok")) for s in SPLITS]
    assert sum(map(len, held)) == len(set.union(*held)) == 40
    assert "sharing an image: 'person 0' and 'other 0' and 'other 1', " in capsys.readouterr().out


def test_copies_in_several_given_splits(source: Path) -> None:
    (source / "images" / "copy.png").write_bytes(
        (source / "images" / "deep" / "0.png").read_bytes()
    )
    table = [[*row, "train"] for row in rows()]
    table += [["copy.png", "Text.", "a", "someone", "", "", "test"]]
    write_csv(source / "table.csv", [*HEADER, "fold"], table)
    root = run(source, "--split-column", "fold")
    assert len(lines(root / "train.image.tok")) == 39
    assert lines(root / "left_out.tsv")[1:] == [
        "deep/0.png\trows whose image is in a later split as well\ttable.csv:2"
    ]
    root = run(source, "--split-column", "fold", "--leaks", "keep", "--force")
    assert len(lines(root / "train.image.tok")) == 40
    assert card_of(root)["notes"]["images that are in several splits, by name"] == ["deep/0.png"]


def test_group_names_with_different_number_formats(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [
        [row[0], row[1], row[2], f"{n % 20}.0" if n < 20 else str(n % 20), *row[4:]]
        for n, row in enumerate(rows())
    ]
    write_csv(source / "table.csv", HEADER, table)
    root = run(source, "--group-column", "who", "--split", "0.5,0.25,0.25")
    groups = [{float(name) for name in lines(root / f"{s}.patient.tok")} for s in SPLITS]
    assert [len(lines(root / f"{s}.image.tok")) for s in SPLITS] == [20, 10, 10]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert "sharing an image: '0.0' and '0', '1.0' and '1', " in capsys.readouterr().out


def test_a_split_that_is_missing_or_unknown(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [[*row, "NA" if n == 3 else "train"] for n, row in enumerate(rows())]
    write_csv(source / "table.csv", [*HEADER, "fold"], table)
    root = run(source, "--split-column", "fold")
    assert card_of(root)["dropped"] == {"rows without a split": 1}
    table[5][-1] = "fold 7 " * 99
    write_csv(source / "table.csv", [*HEADER, "fold"], table)
    run(source, "--split-column", "fold", "--force", status=2)
    shown = capsys.readouterr().err
    assert "table.csv:12: the column 'fold' says 'fold 7 fold 7" in shown
    assert len(shown) < 900


def test_dicom_files_without_preamble_are_found(tmp_path: Path) -> None:
    """Some archives have files without the 128-byte preamble and the DICM prefix."""
    images = tmp_path / "images"
    for n in range(20):
        path = images / f"{n:02}.dcm"
        write_dicom(path, ImageComments=f"Clear lungs {n}." if n else "N/A", PatientID=f"{n}")
        if n % 2:
            path.write_bytes(path.read_bytes()[132:])
            assert decode_image(path).shape == (1, 8, 8)
    (images / "._01.dcm").write_bytes(b"\0\5\x16\7\0\2")
    (images / "torn.dcm").write_bytes((images / "03.dcm").read_bytes()[:40])
    root = dicom(tmp_path, "--group-column", "PatientID", "--split", "1,0,0")
    assert lines(root / "train.image.tok") == [f"{n:02}.dcm" for n in range(1, 20)]
    assert lines(root / "train.report.tok") == [f"Clear lungs {n}." for n in range(1, 20)]
    left_out = [line.split("\t")[:2] for line in lines(root / "left_out.tsv")[1:]]
    assert left_out == [
        ["._01.dcm", "files that are no DICOM"],
        ["torn.dcm", "DICOM files that cannot be read"],
        ["00.dcm", "rows without a report"],
    ]
    assert card_of(root)["missing"] == {"ImageComments": 1}


def test_a_name_that_is_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for n in range(3):
        write_dicom(tmp_path / "images" / f"{n}.dcm", ImageComments=f"Clear lungs {n}.")
    os.rename(tmp_path / "images" / "0.dcm", os.fsencode(tmp_path / "images") + b"/\xe9.dcm")
    root = dicom(tmp_path, "--split", "1,0,0")
    assert lines(root / "train.image.tok") == ["1.dcm", "2.dcm"]
    reason = "rows whose image has a name with a line end or bytes that are not UTF-8"
    assert lines(root / "left_out.tsv")[1:] == [f"\\udce9.dcm\t{reason}\t"]
    one = reason.replace("rows", "row", 1)
    assert rf"1 {one}, such as \udce9.dcm" in capfd.readouterr().out


def test_a_table_of_another_encoding_is_noted(source: Path) -> None:
    text = "file,text\n" + "".join(f"deep/{n}.png,Épanchement {n}\n" for n in range(9))
    (source / "table.csv").write_bytes(text.encode("latin-1"))
    root = run(source, "--report-column", "text", "--split", "1,0,0")
    assert lines(root / "train.report.tok")[0] == "Épanchement 0"
    assert card_of(root)["notes"]["encoding of the table"] == "cp1252"
