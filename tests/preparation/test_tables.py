from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tests.preparation.archives import write_csv
from vilmedic.errors import DataError
from vilmedic.files import sha256_of
from vilmedic.preparation.tables import (
    Missing,
    find_table,
    read_numbered,
    read_table,
    table_columns,
)


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    text = [["1", 'a "quoted", text', " x "], ["2", "two\nlines", ""]]
    for name in ("t.csv", "t.csv.gz"):
        path = write_csv(tmp_path / name, ["id", "report", "view"], text)
        assert list(read_table(path, ["view", "report"])) == [
            ("x", 'a "quoted", text'),
            ("", "two\nlines"),
        ]
        assert table_columns(path) == ["id", "report", "view"]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfid,b\r\n1,2\r\n\r\n")
    assert list(read_table(tmp_path / "t.csv", ["id"])) == [("1",)]


def test_either_form_is_found(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["x"], [])
    assert find_table(tmp_path, "a.csv.gz") == path
    packed = write_csv(tmp_path / "a.csv.gz", ["x"], [])
    assert find_table(tmp_path, "a.csv") == packed
    with pytest.raises(DataError, match=r"Did you mean 'a\.csv'"):
        find_table(tmp_path, "aa.csv")


def test_damage_is_reported_with_its_place(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["x", "yes"], [["1", "2"], ["3"]])
    with pytest.raises(DataError, match=r"a\.csv:3 has 1 fields; the header has 2"):
        list(read_table(path, ["x"]))
    with pytest.raises(DataError, match=r"no column 'yess'\. It has x, yes\. Did you mean 'yes'"):
        list(read_table(path, ["yess"]))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"x\n" * 10000)[:-20])
    with pytest.raises(DataError, match=r"cut\.csv\.gz cannot be read"):
        list(read_table(tmp_path / "cut.csv.gz", ["x"]))
    with pytest.raises(DataError, match="No such file"):
        list(read_table(tmp_path / "none.csv", ["x"]))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_what_separates_fields_is_known_from_the_header(tmp_path: Path, mark: str) -> None:
    text = f'x{mark}"y, z; w"\n1{mark}"a,b;c\td"\n   \n\n'
    (tmp_path / "a.csv").write_text(text)
    assert table_columns(tmp_path / "a.csv") == ["x", "y, z; w"]
    assert list(read_table(tmp_path / "a.csv", ["y, z; w", "x"])) == [("a,b;c\td", "1")]


def test_the_sum_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1_000_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        "sep=;\r\nx;y\r\n1;a,b\r\n",
        '"sep=;"\nx;y\n1;a,b\n',
        "\ufeffsep=;\nx;y\n1;a,b\n",
        "sep=\t\nx\ty\n1\ta,b\n",
        "SEP=|\nx|y\n1|a,b\n",
        "\n  \nx;y\n1;a,b\n",
        'x|y\n1|"a,b"\n',
        "x;y\r1;a,b\r",
        'x, y\n1, "a,b"\n',
    ],
)
def test_what_is_before_the_header_and_between_fields(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert list(read_table(tmp_path / "a.csv", ["y", "x"])) == [("a,b", "1")]
    assert table_columns(tmp_path / "a.csv") == ["x", "y"]


def test_lines_are_those_on_which_rows_start(tmp_path: Path) -> None:
    text = 'sep=,\nx,y\n1,"two\nlines"\n\n2,b\n3\n'
    (tmp_path / "a.csv").write_text(text)
    rows = read_numbered(tmp_path / "a.csv", ["x"])
    assert next(rows) == (3, ("1",))
    assert next(rows) == (6, ("2",))
    with pytest.raises(DataError, match=r"a\.csv:7 has 1 fields; the header has 2"):
        next(rows)


@pytest.mark.parametrize("header", ["x,y,y", "y,x,y", "x,y, y "])
def test_two_columns_of_one_name(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv has 2 columns named 'y' \(columns [12], 3\)"):
        list(read_table(tmp_path / "a.csv", ["x", "y"]))
    assert len(list(read_table(tmp_path / "a.csv", ["x"]))) == 1  # the others may be what they are


def test_a_quotation_mark_that_is_not_closed_swallows_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x,y\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(DataError, match=r"a\.csv:3 cannot be read as a row: .*quotation mark"):
        list(read_table(tmp_path / "a.csv", ["x"]))
    (tmp_path / "a.csv").write_text('x,y\n1,a\n2,"b" or c\n')
    with pytest.raises(DataError, match=r"a\.csv:3 cannot be read as a row"):
        list(read_table(tmp_path / "a.csv", ["x"]))


def test_a_long_list_of_columns_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"c{n}" for n in range(900)) + "\n")
    with pytest.raises(DataError, match=r"It has c0, c1, c2, c3, c4 and 895 more\.") as error:
        list(read_table(tmp_path / "a.csv", ["report"]))
    assert len(str(error.value)) < 300


def test_missing_cells_are_empty_and_counted_by_column(tmp_path: Path) -> None:
    cells = ["NaN", "nan ", "NA", "N/A", " n/a", "None", "NULL", "", "  ", "\u00a0", "<NA>", "no"]
    write_csv(tmp_path / "a.csv", ["x", "y"], [[cell, "NA"] for cell in cells])
    missing = Missing()
    rows = list(read_table(tmp_path / "a.csv", ["x", "y"], missing))
    assert [x for x, _ in rows] == [""] * 11 + ["no"]
    assert dict(missing.counts) == {"x": 11, "y": 12}
    missing = Missing(["no", "-"])
    rows = list(read_table(tmp_path / "a.csv", ["x"], missing))
    assert [x for (x,) in rows] == [
        *("NaN", "nan", "NA", "N/A", "n/a", "None", "NULL", "", "", "", "<NA>", ""),
    ]
    assert dict(missing.counts) == {"x": 4}
