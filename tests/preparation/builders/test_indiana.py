from __future__ import annotations

import csv
import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.preparation.archives import lines, write_csv, write_images
from vilmedic.preparation.builders.indiana import main

REAL = Path(
    os.environ.get("VILMEDIC_REAL_DATA", Path(__file__).parents[4] / "shared" / "data")
).resolve()

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <uId id="CXR{uid}"/>
   <MedlineCitation><Article><Abstract>
     <AbstractText Label="COMPARISON">None.</AbstractText>
     <AbstractText Label="FINDINGS"{findings}
     <AbstractText Label="IMPRESSION"{impression}
   </Abstract></Article></MedlineCitation>
   <MeSH>
      <major>Catheters, Indwelling/right</major><major>Cardiomegaly/mild</major>
      <major>Cardiomegaly/borderline</major><automatic>cardiomegaly</automatic>
   </MeSH>
   {images}
</eCitation>"""


def xml(uid: int, findings: str, impression: str, images: int = 2) -> str:
    def body(text: str) -> str:
        return f">{text}</AbstractText>" if text else "/>"

    names = [f"CXR{uid}_IM-{uid:04d}-{n}001" for n in range(1, images + 1)]
    return REPORT.format(
        uid=uid,
        findings=body(findings),
        impression=body(impression),
        images="".join(
            f'<parentImage id="{name}"><caption>x</caption></parentImage>' for name in names
        ),
    )


def write_reports(folder: Path, reports: dict[int, str]) -> Path:
    place = folder / "ecgen-radiology"
    place.mkdir(parents=True)
    for uid, text in reports.items():
        (place / f"{uid}.xml").write_text(text, encoding="utf-8")
    return place


def many(number: int = 30) -> dict[int, str]:
    return {
        uid: xml(uid, f"Clear lungs number {uid}.", f"Normal chest {uid}.")
        for uid in range(1, number + 1)
    }


def run(reports: Path, root: Path, *options: str, status: int = 0) -> Path:
    assert main(["--reports", str(reports), "--root", str(root), *options]) == status
    return root


def every(root: Path, name: str) -> list[str]:
    return [x for split in ("train", "validate", "test") for x in lines(root / f"{split}.{name}")]


def test_reports_images_and_labels(tmp_path: Path) -> None:
    root = run(write_reports(tmp_path, many()), tmp_path / "out")
    rows = zip(
        every(root, "image.tok"),
        every(root, "report.tok"),
        every(root, "label.tok"),
        every(root, "patient.tok"),
        strict=True,
    )
    seen = []
    for images, report, labels, uid in rows:
        number = int(uid)
        assert images == ",".join(f"CXR{uid}_IM-{number:04d}-{n}001.png" for n in (1, 2))
        assert report == f"Normal chest {uid}. Clear lungs number {uid}."
        assert labels == "Catheters Indwelling,Cardiomegaly"
        seen.append(number)
    assert sorted(seen) == list(range(1, 31))
    assert [len(lines(root / f"{s}.image.tok")) for s in ("train", "validate", "test")] == [
        24,
        3,
        3,
    ]


def test_archive_and_folder_give_the_same_lines(tmp_path: Path) -> None:
    folder = write_reports(tmp_path, many())
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        archive.add(folder, "ecgen-radiology")
    first = run(folder, tmp_path / "a")
    second = run(tmp_path / "NLMCXR_reports.tgz", tmp_path / "b")
    for path in first.glob("*.tok"):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_changed_byte_in_the_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_reports(tmp_path, many())
    archive = tmp_path / "NLMCXR_reports.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, "ecgen-radiology")
    content = archive.read_bytes()
    for place in range(100, len(content), len(content) // 9):
        archive.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        run(archive, tmp_path / "out", status=2)
        assert "is no complete archive" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_archives_and_tables_are_distinguished(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "reports.tar.gz", "w:gz") as archive:
        archive.add(write_reports(tmp_path, many()), "ecgen-radiology")
    root = run(tmp_path / "reports.tar.gz", tmp_path / "out")
    assert len(every(root, "image.tok")) == 30


def test_left_out_reports_are_counted(tmp_path: Path) -> None:
    reports = many()
    reports[3] = xml(3, "Seen.", "", images=0)
    reports[4] = xml(4, "", "")
    reports[5] = xml(5, "Only findings here.", "")
    root = run(write_reports(tmp_path, reports), tmp_path / "out")
    card = json.loads((root / "data_card.json").read_text())
    assert card["dropped"] == {
        "reports without an image": 1,
        "reports without findings or impression": 1,
    }
    assert card["notes"] == {
        "reports": 30,
        "reports with findings": 29,
        "reports with an impression": 27,
    }
    assert "Only findings here." in every(root, "report.tok")
    findings = run(tmp_path / "ecgen-radiology", tmp_path / "f", "--section", "findings")
    assert "Clear lungs number 7." in every(findings, "findings.tok")


def write_tables(folder: Path, number: int = 30) -> None:
    rows = [
        [uid, "normal", "normal", "x", "None.", "None.", f"Clear {uid} lungs.", f"Normal {uid}."]
        for uid in range(1, number + 1)
    ]
    header = [
        "uid",
        "MeSH",
        "Problems",
        "image",
        "indication",
        "comparison",
        "findings",
        "impression",
    ]
    write_csv(folder / "indiana_reports.csv", header, rows)
    views = [
        [uid, f"{uid}_IM-{uid:04d}-{n}001.dcm.png", "Lateral" if n == 1 else "Frontal"]
        for uid in range(1, number + 1)
        for n in (1, 2)
    ]
    write_csv(folder / "indiana_projections.csv", ["uid", "filename", "projection"], views)


def test_tables_without_the_archive(tmp_path: Path) -> None:
    write_tables(tmp_path)
    root = run(tmp_path / "indiana_reports.csv", tmp_path / "out")
    images = every(root, "image.tok")
    assert images[0].count(",") == 1
    assert all(line.split(",")[0].endswith("-2001.dcm.png") for line in images)
    assert set(every(root, "label.tok")) == {"normal"}


@pytest.mark.parametrize(("projection", "number"), [("frontal", "2001"), ("lateral", "1001")])
def test_projections_of_the_images_in_the_archive(
    tmp_path: Path, projection: str, number: str
) -> None:
    write_reports(tmp_path, many())
    write_tables(tmp_path)
    root = run(tmp_path, tmp_path / "out", "--projection", projection)
    images = every(root, "image.tok")
    assert len(images) == 30
    assert all(line.startswith("CXR") and line.endswith(f"-{number}.png") for line in images)
    ordered = run(tmp_path, tmp_path / "all")
    assert all(line.split(",")[0].endswith("-2001.png") for line in every(ordered, "image.tok"))


def test_projections_need_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_reports(tmp_path, many())
    run(folder, tmp_path / "out", "--projection", "frontal", status=2)
    assert "--projections" in capsys.readouterr().err


def test_only_existing_images_are_used(tmp_path: Path) -> None:
    folder = write_reports(tmp_path, many())
    write_images(tmp_path / "images", [f"CXR{uid}_IM-{uid:04d}-2001.png" for uid in range(1, 21)])
    root = run(folder, tmp_path / "out", "--images", str(tmp_path / "images"))
    assert len(every(root, "image.tok")) == 20
    assert all(line.endswith("-2001.png") for line in every(root, "image.tok"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<eCitation><uId id='CXR7'/>", "is no report of the collection"),
        ("<eCitation></eCitation>", "is no report of the collection"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><eCitation/>", "declares entities"),
    ],
)
def test_invalid_reports_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    folder = write_reports(tmp_path, {7: text})
    run(folder, tmp_path / "out", status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "7.xml" in error


def test_the_published_reports(tmp_path: Path) -> None:
    """The counts agree with grep on the unpacked files.

    `grep -l '<AbstractText Label="FINDINGS">' *.xml | wc -l` gives 3425, and 3921 for IMPRESSION;
    `grep -L parentImage` gives 104, and 25 of the others match neither of the first two.
    """
    archive = REAL / "indiana" / "NLMCXR_reports.tgz"
    if not archive.is_file():
        pytest.skip(f"no real data in {archive} (set VILMEDIC_REAL_DATA)")
    root = run(archive, tmp_path / "out")
    card = json.loads((root / "data_card.json").read_text())
    assert card["notes"] == {
        "reports": 3955,
        "reports with findings": 3425,
        "reports with an impression": 3921,
    }
    assert card["dropped"] == {
        "reports without an image": 104,
        "reports without findings or impression": 25,
    }
    kept = card["kept"]
    assert sum(of["lines"] for of in kept.values()) == 3955 - 104 - 25
    assert sum(of["patients"] for of in kept.values()) == 3826
    findings = run(archive, tmp_path / "f", "--section", "findings")
    impression = run(archive, tmp_path / "i", "--section", "impression")
    assert len(every(findings, "findings.tok")) == 3425 - 88
    assert len(every(impression, "impression.tok")) == 3921 - 88 - 13
    assert all(name.endswith(".png") for name in every(root, "image.tok"))


def test_missing_values_of_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tables(tmp_path)
    path = tmp_path / "indiana_reports.csv"
    header, *rows = list(csv.reader(path.read_text().splitlines()))
    rows[1][2] = "normal;NA"
    rows[2][2] = "nan"
    rows[3][6:8] = ["NaN", "None"]
    rows = [[f"{row[0]}.0", *row[1:]] for row in rows]
    write_csv(path, header, rows)
    root = run(path, tmp_path / "out")
    card = json.loads((root / "data_card.json").read_text())
    assert card["dropped"] == {"reports without findings or impression": 1}
    assert lines(root / "left_out.tsv")[1].split("\t") == [
        "report 4",
        "reports without findings or impression",
        "indiana_reports.csv:5",
    ]
    assert set(every(root, "label.tok")) == {"normal", "No Indexing"}
    assert card["missing"] == {"Problems": 1, "findings": 1, "impression": 1}
    rows[5][0] = "NA"
    write_csv(path, header, rows)
    run(path, tmp_path / "other", status=2)
    assert f"{path}:7 has no uid." in capsys.readouterr().err


def test_images_without_a_report_are_listed(tmp_path: Path) -> None:
    write_tables(tmp_path)
    path = tmp_path / "indiana_projections.csv"
    header, *rows = list(csv.reader(path.read_text().splitlines()))
    rows[7][1] = "NA"
    write_csv(path, header, [*rows, ["", "", ""], ["77", "77_IM-0077-1001.dcm.png", "Frontal"]])
    root = run(tmp_path / "indiana_reports.csv", tmp_path / "out")
    table = [line.split("\t") for line in lines(root / "left_out.tsv")[1:]]
    assert sorted(table) == [
        ["", "rows without the name of an image", "indiana_projections.csv:62"],
        ["77_IM-0077-1001.dcm.png", "images without a report", "indiana_projections.csv"],
        ["report 4", "rows without the name of an image", "indiana_projections.csv:9"],
    ]
    assert sum(len(line.split(",")) for line in every(root, "image.tok")) == len(rows) - 1
