"""Every text is on the line of its image in the built files, or listed as left out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.preparation.archives import lines
from tests.preparation.builders.test_any_folder import write_dicom
from vilmedic.datasets.lines import read_lines
from vilmedic.datasets.report_text import CLEANERS
from vilmedic.datasets.text import TextDataset
from vilmedic.errors import DataError
from vilmedic.preparation.builders.any_folder import main

# Any characters of a text file, including those that end lines in some programs.
LINE_ENDS = "\n\r\x0b\x0c\x1c\x85\u2028"
TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(f'a é,";\ufeff{LINE_ENDS}'),
    max_size=20,
)


def build(root: Path, *options: str) -> dict[str, str]:
    """Build a folder and return the report of each image."""
    arguments = ["--root", str(root / "out"), "--images", str(root / "images"), "--split", "1,0,0"]
    assert main([*arguments, "--workers", "1", *options]) == 0
    out = root / "out"
    images, reports = (read_lines(out, "train", f"{kind}.tok") for kind in ("image", "report"))
    return dict(zip(images, reports, strict=True))


def one_line(text: str) -> str:
    return " ".join(text.replace("\ufeff", " ").split())


@settings(max_examples=20)
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_reports_of_a_table(reports: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        rows = {f"{number}.png": text for number, text in enumerate(["clear lungs", *reports])}
        for name in rows:
            Image.new("L", (4, 4)).save(root / "images" / name)
        table = [json.dumps({"file": name, "report": text}) for name, text in rows.items()]
        (root / "table.jsonl").write_text("\n".join(table) + "\n")
        options = ("--image-column", "file", "--report-column", "report")
        found = build(root, "--table", str(root / "table.jsonl"), *options)
        for name, text in found.items():
            assert one_line(text) == one_line(rows[name])
        left_out = root / "out" / "left_out.tsv"
        named = lines(left_out)[1:] if left_out.is_file() else []
        assert {line.split("\t")[0] for line in named} == rows.keys() - found.keys()
        for name in rows.keys() - found.keys():
            assert not any(c.isalnum() for c in rows[name]) or one_line(rows[name]).lower() in (
                ["nan", "na", "n/a", "none", "null"]
            )


@settings(max_examples=20)
@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from([None, "ISO_IR 100", "ISO_IR 192"]))
def test_reports_of_dicom_headers_in_utf8(reports: list[str], declared: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = {f"{number}.dcm": f"clear {text}" for number, text in enumerate(reports)}
        for name, text in rows.items():
            fields = {"SpecificCharacterSet": declared} if declared else {}
            # Latin-1 writes the bytes unchanged.
            raw = text if declared == "ISO_IR 192" else text.encode().decode("latin-1")
            write_dicom(root / "images" / name, ImageComments=raw, **fields)
        found = build(root, "--dicom", "--report-column", "ImageComments")
        assert {name: one_line(text.replace("\0", " ")) for name, text in found.items()} == {
            name: one_line(text.replace("\0", " ")) for name, text in rows.items()
        }


@settings(max_examples=12)
@given(st.lists(TEXT, min_size=1, max_size=6), st.sampled_from([None, *CLEANERS]))
def test_reports_of_a_line_file(texts: list[str], processing: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reports = ["clear lungs here", *(one_line(f"clear lungs {text}") for text in texts)]
        (root / "train.report.tok").write_text("\n".join(reports) + "\n", newline="\n")
        data = TextDataset(
            split="train", training=True, seed=0, run_dir=root, root=folder, processing=processing
        )
        assert [data.texts[line] for line in range(len(reports))] == reports
        clean = CLEANERS[processing] if processing else str
        assert list(data.cleaned) == [clean(text).strip() for text in reports]
        ids = data.encode_text([*data.texts])["input_ids"]
        unknown = data.tokenizer.unk_token_id
        assert not (ids == unknown).any()  # all words of training are known


@pytest.mark.parametrize("processing", CLEANERS)
def test_reports_that_cleaning_empties_are_named(tmp_path: Path, processing: str) -> None:
    (tmp_path / "train.report.tok").write_text("clear lungs\n...\n両肺\nUnchanged.\n___\n")
    emptied = {
        "r2gen_clean_report": [2, 5],
        "ifcc_clean_report": [],
        "gloria_clean_report_chexpert": [2, 3, 4, 5],
        "multilingual_clean_report": [2, 5],
        "remove_prior_references": [4],
        "remove_deidentification": [5],
    }[processing]
    runtime = {"split": "train", "training": True, "seed": 0, "run_dir": tmp_path}
    if not emptied:
        TextDataset(**runtime, root=str(tmp_path), processing=processing)
        return
    with pytest.raises(DataError) as caught:
        TextDataset(**runtime, root=str(tmp_path), processing=processing)
    for line in emptied:
        assert f"train.report.tok:{line}: " in str(caught.value)
