from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from tests.preparation.archives import write_csv
from vilmedic.datasets.file_contents import sha256_of
from vilmedic.errors import DataError
from vilmedic.preparation.tables import find_table, read_table, table_columns


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
