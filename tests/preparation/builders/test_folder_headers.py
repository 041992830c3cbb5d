from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.preparation.archives import lines
from tests.preparation.builders.test_any_folder import dicom, write_dicom

CHINESE = ["两肺纹理清晰，心影不大。", "左侧胸腔积液。", "右肺下叶肺炎，建议复查。", "心影增大。"]
RUSSIAN = ["Без очаговых изменений.", "Легкие чистые.", "Сердце не увеличено.", "Норма."]


def write(folder: Path, texts: list[str], encoding: str, declared: str | None, count: int) -> None:
    """Write files with texts in one encoding that declare another."""
    for n in range(count):
        fields = {"ImageComments": texts[n % len(texts)].encode(encoding).decode("latin-1")}
        if declared:
            fields["SpecificCharacterSet"] = declared
        write_dicom(folder / f"{encoding}{n:02}.dcm", PatientID=f"{n}", **fields)


def read(root: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(root.glob("*.image.tok")):
        reports = lines(path.with_name(path.name.replace("image", "report")))
        found |= zip(lines(path), reports, strict=True)
    return found


@pytest.mark.parametrize("declared", [None, "ISO_IR 100"])
@pytest.mark.parametrize(
    ("encoding", "texts"), [("gb18030", CHINESE), ("cp1251", RUSSIAN), ("utf-8", CHINESE + RUSSIAN)]
)
def test_missing_and_wrong_character_sets(
    tmp_path: Path, encoding: str, texts: list[str], declared: str | None
) -> None:
    write(tmp_path / "images", texts, encoding, declared, 12)
    root = dicom(tmp_path, "--group-column", "PatientID", "--split", "0.5,0.25,0.25")
    assert sorted(read(root).items()) == [
        (f"{encoding}{n:02}.dcm", texts[n % len(texts)]) for n in range(12)
    ]
    notes = json.loads((root / "data_card.json").read_text())["notes"]
    if encoding != "utf-8":
        assert notes[f"headers in {encoding}, which they do not declare"] == 12


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ("ISO_IR 100", "Épanchement pleural gauche"),
        ("ISO_IR 144", "Легкие чистые"),
        ("ISO_IR 192", "两肺 чистые"),
        ("GB18030", "两肺纹理清晰"),
        ("ISO 2022 IR 6\\ISO 2022 IR 87", "Yamada^Tarou=山田"),
    ],
)
def test_declared_character_sets(tmp_path: Path, declared: str, text: str) -> None:
    for n in range(4):
        write_dicom(
            tmp_path / "images" / f"{n}.dcm", SpecificCharacterSet=declared, ImageComments=text
        )
    root = dicom(tmp_path, "--split", "0.5,0.25,0.25")
    assert set(read(root).values()) == {text}
    assert "headers" not in str(json.loads((root / "data_card.json").read_text())["notes"])


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [
        ("\\ISO 2022 IR 149", "euc_kr", "폐야에 이상 소견 없음"),
        ("\\ISO 2022 IR 58", "gb2312", "两肺纹理清晰，心影不大"),
    ],
)
def test_a_declared_character_set_without_its_escapes(
    tmp_path: Path, declared: str, encoding: str, text: str
) -> None:
    """Read as declared, not guessed from the bytes."""
    write(tmp_path / "images", [text], encoding, declared, 4)
    root = dicom(tmp_path, "--group-column", "PatientID", "--split", "0.5,0.25,0.25")
    assert set(read(root).values()) == {text}
    notes = json.loads((root / "data_card.json").read_text())["notes"]
    assert not any("declare" in note for note in notes)


@pytest.mark.parametrize("declared", [None, "ISO_IR 100", "ISO_IR 192"])
def test_an_escape_character_without_an_encoding_change(
    tmp_path: Path, declared: str | None
) -> None:
    fields = {"SpecificCharacterSet": declared} if declared else {}
    write_dicom(tmp_path / "images" / "0.dcm", ImageComments="clear \x1b[1mlungs", **fields)
    root = dicom(tmp_path, "--split", "1,0,0")
    assert read(root) == {"0.dcm": "clear \x1b[1mlungs"}


def test_doubtful_encodings_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = "张三 1".encode("gb18030").decode("latin-1")
    for n in range(4):
        write_dicom(tmp_path / "images" / f"{n}.dcm", ImageComments=raw)
    root = dicom(tmp_path, "--split", "0.5,0.25,0.25")
    assert (
        "headers in a doubtful character set, which --encoding sets: 4" in capsys.readouterr().out
    )
    notes = json.loads((root / "data_card.json").read_text())["notes"]
    assert list(notes["the doubtful ones, and what they were read as"]) == [
        f"{n}.dcm" for n in range(4)
    ]


def test_a_given_encoding_applies_to_all_files(tmp_path: Path) -> None:
    raw = "张三 1".encode("gb18030").decode("latin-1")
    write_dicom(tmp_path / "images" / "0.dcm", ImageComments=raw, SpecificCharacterSet="ISO_IR 100")
    write_dicom(tmp_path / "images" / "1.dcm", ImageComments="normal chest")
    root = dicom(tmp_path, "--encoding", "GB18030", "--split", "1,0,0")
    assert lines(root / "train.report.tok") == ["张三 1", "normal chest"]


def test_an_unknown_character_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dicom(tmp_path / "images" / "0.dcm", ImageComments="normal")
    dicom(tmp_path, "--encoding", "gb18031", status=2)
    assert "no character set 'gb18031'" in capsys.readouterr().err
