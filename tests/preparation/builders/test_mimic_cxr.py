from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.preparation.archives import (
    Mimic,
    lines,
    make_mimic,
    report_text,
    write_images,
    write_mimic,
)
from vilmedic.preparation.builders.chexpert import CHEXPERT_LABELS
from vilmedic.preparation.builders.mimic_cxr import main

SPLITS = ("train", "validate", "test")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    write_mimic(folder, make_mimic())
    return folder


def run(raw: Path, root: Path, *options: str, status: int = 0) -> Path:
    arguments = ["--reports", str(raw), "--tables", str(raw), "--root", str(root), *options]
    assert main([*arguments, "--workers", "1"]) == status
    return root


def card_of(root: Path) -> dict:
    return json.loads((root / "data_card.json").read_text())


def test_every_line_matches_the_archive(raw: Path, tmp_path: Path) -> None:
    made = make_mimic()
    root = run(raw, tmp_path / "out")
    views = {row[0]: row[4] for row in made.metadata}
    split_of = {f"s{study}": split for _, study, _, split in made.split}
    labels_of = {
        f"s{study}": [n for n, v in zip(CHEXPERT_LABELS, values, strict=True) if v == "1.0"]
        for _, study, *values in made.chexpert
    }
    seen = set()
    for split in SPLITS:
        files = [lines(root / f"{split}.{k}.tok") for k in ("image", "report", "label", "patient")]
        for images, report, labels, patient in zip(*files, strict=True):
            names = images.split(",")
            study = names[0].split("/")[3]
            assert split_of[study] == split
            assert f"/p{patient}/" in names[0]
            order = [views[Path(name).stem] for name in names]
            assert order in (["PA", "LATERAL"], ["AP"])
            assert labels.split(",") == (labels_of[study] or ["No Finding"])
            text = made.reports[f"p{patient[:2]}/p{patient}/{study}.txt"]
            findings, impression = text.split("FINDINGS:")[1].split("IMPRESSION:")
            assert report == f"{impression.strip()} {findings.strip()}"
            seen.update(names)
    assert seen == set(made.images)


@pytest.mark.parametrize("zipped", [True, False])
def test_archive_folder_tables_and_processes_give_the_same_bytes(
    raw: Path, tmp_path: Path, zipped: bool
) -> None:
    write_mimic(tmp_path / "other", make_mimic(), zipped=zipped, compressed=False)
    first, second = run(raw, tmp_path / "a"), run(tmp_path / "other", tmp_path / "b")
    for path in first.glob("*.tok"):
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert main(["--reports", str(raw), "--tables", str(raw), "--root", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "data_card.json").read_bytes() == (
        first / "data_card.json"
    ).read_bytes()


@pytest.mark.parametrize("section", ["findings", "impression"])
def test_one_section_is_written_to_a_file_of_its_name(
    raw: Path, tmp_path: Path, section: str
) -> None:
    root = run(raw, tmp_path / "out", "--section", section)
    texts = lines(root / f"train.{section}.tok")
    assert len(texts) == len(lines(root / "train.image.tok"))
    assert not (root / "train.report.tok").exists()
    both = lines(run(raw, tmp_path / "both") / "train.report.tok")
    assert all(text in whole for text, whole in zip(texts, both, strict=True))


def test_left_out_studies_are_counted(tmp_path: Path) -> None:
    made = make_mimic()
    studies = [(row[0], row[1]) for row in made.chexpert]
    paths = [f"p{patient[:2]}/p{patient}/s{study}.txt" for patient, study in studies]
    made.reports[paths[0]] = report_text(None, "")
    made.reports[paths[1]] = report_text(None, " ___.")
    del made.reports[paths[2]]
    made.reports[paths[3]] = " HISTORY:  Cough.\n\n The lungs are clear and the heart is normal.\n"
    made.reports[paths[4]] = report_text("The heart is large.", None)
    del made.chexpert[5]
    write_mimic(tmp_path / "raw", made)
    root = run(tmp_path / "raw", tmp_path / "out")
    card = card_of(root)
    dropped = card["dropped"]
    assert dropped.pop("studies without a report file") == 1
    assert dropped.pop("studies without labels") == 1
    assert sum(dropped.values()) == 2  # the two empty reports
    assert card["notes"] == {"reports without headings, taken from their text": 1}
    kept = sum(of["lines"] for of in card["kept"].values())
    assert kept == len(studies) - 4
    strict = card_of(run(tmp_path / "raw", tmp_path / "strict", "--headings-only"))
    assert sum(of["lines"] for of in strict["kept"].values()) == kept - 1
    impressions = card_of(run(tmp_path / "raw", tmp_path / "i", "--section", "impression"))
    assert impressions["dropped"]["studies whose report has no impression"] == 4


def test_the_data_card_has_counts_and_checksums(raw: Path, tmp_path: Path) -> None:
    root = run(raw, tmp_path / "out")
    card = card_of(root)
    labels = Counter(",".join(lines(root / "train.label.tok")).split(","))
    assert card["labels"]["train"] == dict(labels)
    images = ",".join(lines(root / "train.image.tok")).split(",")
    assert card["kept"]["train"] == {
        "lines": len(lines(root / "train.report.tok")),
        "images": len(images),
        "patients": len(set(lines(root / "train.patient.tok"))),
    }
    assert set(card["files"]) == {path.name for path in root.glob("*.tok")}
    assert set(card["inputs"]) == {path.name for path in raw.iterdir()}
    assert str(tmp_path) not in json.dumps(card)


def test_options_for_views_and_lines(raw: Path, tmp_path: Path) -> None:
    made = make_mimic()
    views = {row[0]: row[4] for row in made.metadata}
    root = run(raw, tmp_path / "lateral", "--views", "lateral")
    names = [name for split in SPLITS for name in lines(root / f"{split}.image.tok")]
    assert {views[Path(name).stem] for name in names} == {"LATERAL"}
    root = run(raw, tmp_path / "order", "--views", "LATERAL,frontal")
    first = [line.split(",")[0] for line in lines(root / "train.image.tok")]
    assert {views[Path(name).stem] for name in first} == {"LATERAL", "AP"}
    root = run(raw, tmp_path / "image", "--line", "image")
    names = [name for split in SPLITS for name in lines(root / f"{split}.image.tok")]
    assert sorted(names) == sorted(made.images)


def test_unlisted_views_come_last(tmp_path: Path) -> None:
    made = make_mimic()
    for row in made.metadata:
        if row[4] == "PA":
            row[4] = "ODD VIEW"
    write_mimic(tmp_path / "raw", made)
    views = {row[0]: row[4] for row in made.metadata}
    root = run(tmp_path / "raw", tmp_path / "out")
    rows = [line.split(",") for s in SPLITS for line in lines(root / f"{s}.image.tok")]
    assert sorted(name for names in rows for name in names) == sorted(made.images)
    orders = {tuple(views[Path(name).stem] for name in names) for names in rows}
    assert orders == {("LATERAL", "ODD VIEW"), ("AP",)}
    root = run(tmp_path / "raw", tmp_path / "front", "--views", "frontal")
    names = [name for s in SPLITS for name in lines(root / f"{s}.image.tok")]
    assert {views[Path(name).stem] for name in names} == {"AP"}


@pytest.mark.parametrize("uncertain", ["negative", "positive", "mixed", "drop"])
def test_uncertain_labels(raw: Path, tmp_path: Path, uncertain: str) -> None:
    # With so few studies, dropping the uncertain ones leaves no test data, as the card says.
    root = run(raw, tmp_path / "out", "--uncertain", uncertain)
    values = [dict(zip(CHEXPERT_LABELS, row[2:], strict=True)) for row in make_mimic().chexpert]
    counts = Counter(",".join(x for f in root.glob("*.label.tok") for x in lines(f)).split(","))
    rows = [row for row in values if uncertain != "drop" or "-1.0" not in row.values()]
    for name in ("Edema", "Fracture"):
        taken = {"1.0"}
        if uncertain == "positive" or (uncertain == "mixed" and name == "Edema"):
            taken.add("-1.0")
        assert counts[name] == sum(row[name] in taken for row in rows)
    dropped = card_of(root)["dropped"].get("studies with uncertain labels", 0)
    assert dropped == len(values) - len(rows)
    empty = card_of(root)["notes"].get("splits without a sample", "")
    assert empty == ("validate, test" if uncertain == "drop" else "")


def test_only_existing_images_are_used(raw: Path, tmp_path: Path) -> None:
    made = make_mimic()
    write_images(tmp_path / "images", made.images[::3])
    root = run(raw, tmp_path / "out", "--images", str(tmp_path / "images"))
    names = [
        name
        for path in root.glob("*.image.tok")
        for line in lines(path)
        for name in line.split(",")
    ]
    assert sorted(names) == sorted(made.images[::3])


def test_balanced_splits_are_by_patient_with_even_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mimic(tmp_path / "raw", make_mimic(patients=240, studies=3))
    root = run(tmp_path / "raw", tmp_path / "out", "--balanced", "--split", "0.7,0.15,0.15")
    card = card_of(root)
    patients = {split: set(lines(root / f"{split}.patient.tok")) for split in SPLITS}
    assert not patients["train"] & patients["validate"]
    assert not patients["train"] & patients["test"]
    assert not patients["validate"] & patients["test"]
    kept = {split: card["kept"][split]["lines"] for split in SPLITS}
    assert sum(kept.values()) == 720
    assert kept["train"] == pytest.approx(504, abs=6)
    key = "largest difference of a label's share between splits, "
    assert card["notes"][key + "after"] < 0.02 < card["notes"][key + "before"]
    printed = capsys.readouterr().out
    assert "before balancing" in printed
    assert "after balancing" in printed
    again = run(tmp_path / "raw", tmp_path / "b", "--balanced", "--split", "0.7,0.15,0.15")
    assert (again / "train.image.tok").read_bytes() == (root / "train.image.tok").read_bytes()


def test_a_build_is_not_overwritten(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run(raw, tmp_path / "out")
    run(raw, root)
    assert "nothing to do" in capsys.readouterr().out
    before = (root / "train.image.tok").read_bytes()
    run(raw, root, "--line", "image", status=2)
    message = capsys.readouterr().err
    assert "line study instead of image" in message
    assert "--force" in message
    assert (root / "train.image.tok").read_bytes() == before
    run(raw, root, "--line", "image", "--section", "impression", "--force")
    assert (root / "train.image.tok").read_bytes() != before
    assert not (root / "train.report.tok").exists()
    (root / "train.label.tok").write_text("changed\n")
    run(raw, root, "--line", "image", "--section", "impression", status=2)
    assert "train.label.tok: is missing or was changed" in capsys.readouterr().err


def test_other_files_are_never_overwritten(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.report.tok").write_text("mine\n")
    run(raw, tmp_path / "out", status=2)
    assert "without a data_card.json" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.report.tok").read_text() == "mine\n"


def drop_column(made: Mimic) -> None:
    made.split = [row[:3] for row in made.split]


def bad_split(made: Mimic) -> None:
    made.split[0][3] = "tests"


def bad_label(made: Mimic) -> None:
    made.chexpert[0][2] = "2.0"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_column, "has 3 fields; the header has 4"),
        (bad_split, "split 'tests'; allowed are train, validate, test. Did you mean 'test'?"),
        (bad_label, "'2.0' is no label value"),
    ],
)
def test_invalid_tables_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, message: str
) -> None:
    made = make_mimic(patients=2)
    spoil(made)
    write_mimic(tmp_path / "raw", made)
    run(tmp_path / "raw", tmp_path / "out", status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_files_are_explained(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "mimic-cxr-reports.zip").write_bytes(b"PK\x03\x04 cut")
    run(raw, tmp_path / "out", status=2)
    assert "no complete archive" in capsys.readouterr().err
    (raw / "mimic-cxr-reports.zip").unlink()
    run(raw, tmp_path / "out", status=2)
    assert "python data/download.py SELFSUP" in capsys.readouterr().err
    (raw / "mimic-cxr-2.0.0-split.csv.gz").rename(raw / "mimic-cxr-2.0.0-splits.csv")
    run(raw, tmp_path / "out", status=2)
    assert "Did you mean 'mimic-cxr-2.0.0-splits.csv'?" in capsys.readouterr().err


def test_reports_in_other_encodings(raw: Path, tmp_path: Path) -> None:
    made = make_mimic()
    write_mimic(raw, made)
    names = sorted(made.reports)[:3]
    folder = tmp_path / "files"
    for name, text in made.reports.items():
        content = text.encode()
        if name == names[0]:
            content = text.replace("FINDINGS:", "FINDINGS: The patient’s heart – 37 °C –").encode(
                "cp1252"
            )
        elif name == names[1]:
            content = ("FINDINGS: " + "两肺纹理清晰，心影不大。" * 3).encode("gb18030")
        elif name == names[2]:
            content = ("﻿" + text).encode("utf-16-le")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    root = tmp_path / "out"
    arguments = ["--reports", str(folder), "--tables", str(raw), "--root", str(root)]
    assert main([*arguments, "--workers", "1"]) == 0
    reports = [text for split in SPLITS for text in lines(root / f"{split}.report.tok")]
    assert sum("The patient’s heart – 37 °C –" in text for text in reports) == 1
    assert not any("\ufffd" in text or "\0" in text for text in reports)
    card = card_of(root)
    assert card["notes"]["files of reports read as cp1252"] == [names[0]]
    assert card["dropped"]["studies whose report is neither UTF-8 nor cp1252 text"] == 1


@pytest.mark.parametrize("mark", ["NA", "nan", "None"])
def test_rewritten_tables_are_read(raw: Path, tmp_path: Path, mark: str) -> None:
    """Missing values have a marker, and ids became floating-point numbers."""
    wanted = run(raw, tmp_path / "first", "--uncertain", "mixed")
    made = make_mimic()
    for row in made.chexpert:
        row[1] = f"{row[1]}.0"
    made.chexpert = [[cell or mark for cell in row] for row in made.chexpert]
    made.split = [[row[0], f"{row[1]}.0", f"{row[2]}.0", row[3]] for row in made.split]
    write_mimic(tmp_path / "again", made)
    root = run(tmp_path / "again", tmp_path / "second", "--uncertain", "mixed")
    for path in sorted(wanted.glob("*.tok")):
        assert (root / path.name).read_bytes() == path.read_bytes()
    assert card_of(root)["missing"] == card_of(wanted)["missing"]


def test_left_out_studies_are_listed_and_errors_have_lines(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_mimic()
    made.split[2][2] = "NaN"
    with_pa = {row[2] for row in made.metadata if row[4] == "PA"}
    patient, study = next(row[:2] for row in made.chexpert[4:] if row[1] in with_pa)
    del made.reports[f"p{patient[:2]}/p{patient}/s{study}.txt"]
    write_mimic(tmp_path / "raw2", made, compressed=False)
    root = run(tmp_path / "raw2", tmp_path / "out", "--views", "PA")
    table = [line.split("\t") for line in lines(root / "left_out.tsv")[1:]]
    assert Counter(reason for _, reason, _ in table) == card_of(root)["dropped"]
    assert [made.split[2][0], "rows without a patient, study, split or image"] == table[0][:2]
    assert table[0][2] == "mimic-cxr-2.0.0-split.csv:4"
    others = [row[0] for row in made.metadata if row[4] != "PA" and row[0] != made.split[2][0]]
    assert card_of(root)["dropped"]["images of other views"] == len(others)
    name = f"files/p{patient[:2]}/p{patient}/s{study}.txt"
    assert [name, "studies without a report file", ""] in table
    made.chexpert[1][3] = "2"
    write_mimic(tmp_path / "raw3", made, compressed=False)
    run(tmp_path / "raw3", tmp_path / "out3", status=2)
    assert "mimic-cxr-2.0.0-chexpert.csv:3: study " in capsys.readouterr().err
    made.split[7][3] = "dev"
    made.chexpert[1][3] = ""
    write_mimic(tmp_path / "raw4", made, compressed=False)
    run(tmp_path / "raw4", tmp_path / "out4", status=2)
    assert "mimic-cxr-2.0.0-split.csv:9: study " in capsys.readouterr().err
