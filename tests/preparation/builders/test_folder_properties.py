"""Every row of a table is on the same line of every built file, or listed as left out."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from vilmedic.datasets.lines import read_lines, split_names
from vilmedic.preparation.builders.any_folder import main
from vilmedic.preparation.folder import LEFT_OUT
from vilmedic.tables import MISSING

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
# Characters with a meaning in tables and line files are drawn more often.
SIGNS = ',;"|\\\n\r\t .é\u0301\u2028\ufeff\u00a0ß=#'
SPECIAL = st.sampled_from([*SIGNS, "NA", "nan", "1.0"])
ANY = st.characters(exclude_categories=["Cs", "Cc"])
TEXT = st.lists(st.one_of(ANY, SPECIAL), max_size=12).map("".join)
NAME = TEXT.filter(lambda text: "/" not in text and "\0" not in text and len(text.encode()) < 99)
CELL = st.one_of(TEXT, st.sampled_from([*MISSING, "NaN ", " N/A", "", " ", "Lungs are clear."]))
NUMBERS = ("0", "1", "y", "n", "yes", "no", "true", "false")  # also 1.0, -1 and similar


def plain(text: str) -> str:
    """A text as one line, without surrounding blanks and invisible characters."""
    before = None
    while text != before:
        before, text = text, " ".join(text.split()).strip("\ufeff\u200b ")
    return text


def is_no_number(text: str) -> bool:
    """Whether a cell is not a value of a 0/1 label column."""
    try:
        return plain(text).lower() not in NUMBERS and float(plain(text)) not in (0, 1, -1)
    except ValueError:
        return True


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
        name: image name without its unique part.
        report: the report text.
        group: the patient.
        labels: one cell of label names.
        there: whether the image is on disk.
        form: Unicode normal form of the file name.
    """

    name: str
    report: str
    group: str
    labels: str
    there: bool
    form: str


LINES = st.lists(
    st.builds(
        Line,
        NAME,
        CELL,
        st.one_of(CELL, st.sampled_from(["1", "1.0", "2"])),
        CELL.filter(is_no_number),
        st.booleans(),
        st.sampled_from(["", "NFC", "NFD"]),
    ),
    min_size=1,
    max_size=6,
)
ORDINARY = Line("a", "Clear.", "1", "mass", True, "")


def is_missing(text: str) -> bool:
    return plain(text).lower() in {"", *MISSING}


def names_of(labels: str) -> list[str]:
    parts = labels.replace(";", ",").replace("|", ",").split(",")
    return [] if is_missing(labels) else [p for p in map(plain, parts) if not is_missing(p)]


def write(folder: Path, rows: list[Line], form: str) -> list[str]:
    """Write the table and the images; return the names in the table."""
    names = [f"{number}_{row.name}.png" for number, row in enumerate(rows)]
    (folder / "images").mkdir()
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        if row.there:
            on_disk = unicodedata.normalize(row.form, name) if row.form else name  # type: ignore[arg-type]
            (folder / "images" / on_disk).write_bytes(bytes([number]))
    cells = [[n, r.report, r.group, r.labels] for n, r in zip(names, rows, strict=True)]
    header = ["file", "report", "group", "labels"]
    if form == "jsonl":
        objects = [dict(zip(header, row, strict=True)) for row in cells]
        content = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects).encode()
    else:
        text = io.StringIO()
        csv.writer(text, delimiter=form[0]).writerows([header, *cells])
        content = text.getvalue().encode(form[1:])
    (folder / f"t.{'jsonl' if form == 'jsonl' else 'csv'}").write_bytes(content)
    return names


def build(folder: Path, form: str, split: str) -> int:
    table = folder / f"t.{'jsonl' if form == 'jsonl' else 'csv'}"
    options = ["--root", folder / "out", "--images", folder / "images", "--table", table]
    options += ["--image-column", "file", "--report-column", "report", "--group-column", "group"]
    return main([*map(str, options), "--label-columns", "labels", "--split", split])


def read(folder: Path, split: str) -> list[tuple[str, str, str, str]]:
    """Image, report, group and labels of each line of a split."""
    if not (folder / f"{split}.image.tok").is_file():
        return []
    files = [read_lines(folder, split, f"{k}.tok") for k in ("image", "report", "patient", "label")]
    assert len({len(lines) for lines in files}) == 1
    images = [split_names(line) for line in files[0]]
    assert all(len(names) == 1 for names in images)
    return [(names[0], *rest) for names, *rest in zip(images, *files[1:], strict=True)]  # type: ignore[misc]


def is_kept(row: Line) -> bool:
    return (
        row.there
        and "\n" not in row.name
        and any(letter.isalnum() or letter == "_" for letter in row.report)
        and not is_missing(row.report)
        and not is_missing(row.group)
        and bool(names_of(row.labels))
    )


@QUICK
@given(LINES, st.sampled_from([",utf-8", ";utf-8-sig", "\tutf-16", "|utf-8", "jsonl"]))
@example([ORDINARY, Line(", b", 'One, "two"\n3;4|5', "p,1", "a;b", True, "NFD")], ",utf-8")
@example([Line('"', "x", "1", "m", True, ""), Line('",', "y", "1", "m", True, "")], ",utf-8")
def test_every_row_is_on_one_line_or_listed_as_left_out(rows: list[Line], form: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = write(folder, rows, form)
        kept = [(name, row) for name, row in zip(names, rows, strict=True) if is_kept(row)]
        status = build(folder, form, "1,0,0")
        assert status == (0 if kept else 2)
        if not kept:
            assert not (folder / "out").exists()
            return
        found = read(folder / "out", "train")
        assert len(found) == len(kept)
        for (name, row), (image, report, group, labels) in zip(kept, found, strict=True):
            assert unicodedata.normalize("NFC", image) == unicodedata.normalize("NFC", name)
            assert (folder / "images" / image).is_file()
            assert plain(report) == plain(row.report)
            assert plain(group) == plain(row.group)
            assert labels.split(",") == list(dict.fromkeys(names_of(row.labels)))
        card = json.loads((folder / "out" / "data_card.json").read_text(encoding="utf-8"))
        out = [name for name, row in zip(names, rows, strict=True) if not is_kept(row)]
        assert sum(card["dropped"].values()) == len(out)
        if out:
            table = (folder / "out" / LEFT_OUT).read_text(encoding="utf-8").split("\n")[1:-1]
            assert [line.split("\t")[0] for line in table] == [plain(name) for name in out]
            assert all(reason and detail for _, reason, detail in (t.split("\t") for t in table))


@QUICK
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 5)), min_size=2))
def test_no_group_and_no_image_is_in_two_splits(rows: list[tuple[int, bool, int]]) -> None:
    """With a few groups, each written in two ways, and a few image contents."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        content = ["file,report,group,labels"]
        for number, (group, spelled, picture) in enumerate(rows):
            (folder / "images" / f"{number}.png").write_bytes(bytes([picture]) * 9)
            content.append(f"{number}.png,Clear.,{group}{'.0' if spelled else ''},a")
        (folder / "t.csv").write_text("\n".join(content) + "\n")
        if build(folder, ",", "0.5,0.2,0.3") == 2:  # too few groups for all splits
            assert not (folder / "out").exists()
            return
        groups, pictures, lines = [], [], 0
        for split in ("train", "validate", "test"):
            found = read(folder / "out", split)
            lines += len(found)
            groups.append({float(group) for _, _, group, _ in found})
            pictures.append({rows[int(image.split(".")[0])][2] for image, *_ in found})
            for image, _, group, _ in found:
                number = int(image.split(".")[0])
                assert group == f"{rows[number][0]}{'.0' if rows[number][1] else ''}"
        assert lines == len(rows)
        for sets in (groups, pictures):
            assert sum(map(len, sets)) == len(set.union(*sets))
