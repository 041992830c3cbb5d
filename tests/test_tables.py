from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.preparation.archives import write_csv
from vilmedic.errors import DataError
from vilmedic.files import sha256_of
from vilmedic.tables import (
    Missing,
    encoding_of,
    find_table,
    open_text,
    read_numbered,
    read_table,
    table_columns,
)


def test_columns_have_the_requested_order(tmp_path: Path) -> None:
    text = [["1", 'a "quoted", text', " x "], ["2", "two\nlines", ""]]
    for name in ("t.csv", "t.csv.gz"):
        path = write_csv(tmp_path / name, ["id", "report", "view"], text)
        assert list(read_table(path, ["view", "report"])) == [
            ("x", 'a "quoted", text'),
            ("", "two\nlines"),
        ]
        assert table_columns(path) == ["id", "report", "view"]


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfid,b\r\n1,2\r\n\r\n")
    assert list(read_table(tmp_path / "t.csv", ["id"])) == [("1",)]


def test_plain_and_gzipped_files_are_found(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["x"], [])
    assert find_table(tmp_path, "a.csv.gz") == path
    packed = write_csv(tmp_path / "a.csv.gz", ["x"], [])
    assert find_table(tmp_path, "a.csv") == packed
    with pytest.raises(DataError, match=r"Did you mean 'a\.csv'"):
        find_table(tmp_path, "aa.csv")


def test_damage_is_reported_with_its_line(tmp_path: Path) -> None:
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
def test_the_delimiter_is_detected_from_the_header(tmp_path: Path, mark: str) -> None:
    text = f'x{mark}"y, z; w"\n1{mark}"a,b;c\td"\n   \n\n'
    (tmp_path / "a.csv").write_text(text)
    assert table_columns(tmp_path / "a.csv") == ["x", "y, z; w"]
    assert list(read_table(tmp_path / "a.csv", ["y, z; w", "x"])) == [("a,b;c\td", "1")]


def test_file_checksum(tmp_path: Path) -> None:
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
def test_blank_lines_and_spaces_are_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert list(read_table(tmp_path / "a.csv", ["y", "x"])) == [("a,b", "1")]
    assert table_columns(tmp_path / "a.csv") == ["x", "y"]


def test_line_numbers_are_those_where_rows_start(tmp_path: Path) -> None:
    text = 'sep=,\nx,y\n1,"two\nlines"\n\n2,b\n3\n'
    (tmp_path / "a.csv").write_text(text)
    rows = read_numbered(tmp_path / "a.csv", ["x"])
    assert next(rows) == (3, ("1",))
    assert next(rows) == (6, ("2",))
    with pytest.raises(DataError, match=r"a\.csv:7 has 1 fields; the header has 2"):
        next(rows)


@pytest.mark.parametrize("header", ["x,y,y", "y,x,y", "x,y, y "])
def test_duplicate_column_names_are_an_error(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv has 2 columns named 'y' \(columns [12], 3\)"):
        list(read_table(tmp_path / "a.csv", ["x", "y"]))
    assert len(list(read_table(tmp_path / "a.csv", ["x"]))) == 1  # other columns are not checked


def test_an_unclosed_quotation_mark_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x,y\n1,a\n2,"b\n3,c\n4,d\n')
    with pytest.raises(DataError, match=r"a\.csv:3 cannot be read as a row: .*quotation mark"):
        list(read_table(tmp_path / "a.csv", ["x"]))
    (tmp_path / "a.csv").write_text('x,y\n1,a\n2,"b" or c\n')
    with pytest.raises(DataError, match=r"a\.csv:3 cannot be read as a row"):
        list(read_table(tmp_path / "a.csv", ["x"]))


def test_a_long_list_of_columns_is_shortened(tmp_path: Path) -> None:
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


TEXT = "file,report\r\na.png,Épanchement pleural gauche.\r\nb.png,Cœur normal.\r\n"


def archive(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name in names:
            packed.writestr(name, "a,b\n1,2\n")
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as packed:
        packed.addfile(tarfile.TarInfo("t.csv"))
    return content.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16-le", "utf-16-le"),
        ("utf-16-be", "utf-16-be"),
        ("utf-32", "utf-32"),
        ("cp1252", "cp1252"),
    ],
)
def test_the_same_text_in_any_encoding(
    tmp_path: Path, encoding: str, found: str, packed: bool
) -> None:
    path = tmp_path / "t.csv"  # compression is detected from the content
    content = TEXT.encode(encoding)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert encoding_of(path) == found
    with open_text(path) as file:
        assert file.read() == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_of_a_script_without_ascii(tmp_path: Path, encoding: str) -> None:
    text = "image_file,report\na.png," + "两肺纹理清晰，心影不大。" * 2000 + "\n"
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    assert encoding_of(tmp_path / "t.csv") == encoding


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Plućni parenhim bez infiltrata, urednih dimenzija srčana", "cp1250"),  # or Lithuanian
        ("Лёгкие чистые", "cp1251"),
        ("两肺纹理清晰", "gb18030"),
    ],
)
def test_ambiguous_encodings_are_refused(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(f"file,report\na.png,{text}\n".encode(encoding))
    with pytest.raises(DataError, match=r"t\.csv:2 holds the byte .*--encoding"):
        open_text(path)
    with open_text(path, encoding) as file:
        assert text in file.read()
    with pytest.raises(DataError, match=r"t\.csv:2 holds the byte 0x.. *, so it is not ascii"):
        open_text(path, "ascii")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1250", "Plíce bez infiltrativních změn, srdce přiměřené velikosti, žádný výpotek."),
        ("cp1250", "Pola płucne bez zagęszczeń, sylwetka serca niepowiększona."),
        ("cp1250", "A tüdőkben kóros árnyék nem látható, a szív nem nagyobb."),
        (
            "cp1250",
            "Plućni parenhim bez infiltrata, srčana sjena, ošit desno povišen, žilni crtež.",
        ),
        ("cp1250", "Fără leziuni pleuropulmonare, cord în limite normale, sinusuri libere."),
        ("cp1254", "Akciğerlerde infiltrasyon izlenmedi, kalp boyutları doğal, şüpheli nodül."),
        ("cp1257", "Plaučiuose infiltracijos nematyti, širdies šešėlis nepadidėjęs."),
        ("cp1252", "Pas d'épanchement, où ça? Élargissement du médiastin, à droite."),
        ("cp1252", "Kein Pleuraerguß, Herz nicht vergrößert, Zwerchfell unauffällig."),
        ("cp1252", "Neumotórax derecho pequeño, ¿elevación? Silueta cardíaca normal."),
        ("cp1252", "Não há derrame pleural, coração de dimensões normais."),
        ("cp1252", "Ingen pleuravæske, hjertet er ikke forstørret på højre side."),
        ("cp1252", "Ingen pleuravätska, hjärtat är ej förstorat på bilden."),
        ("cp1252", "Engin vökvasöfnun í fleiðruholi, hjartað er ekki stækkað, Þykkni."),
        ("cp1252", "The patient\u2019s \u201cmass\u201d \u2013 3 cm\xb2 at 37 \xb0C, 5 \xb5m"),
        ("cp1252", "Épanchement à droite. Pleuraerguß, vergrößert. Pequeño, corazón. På højre."),
    ],
)
def test_languages_of_latin_script(tmp_path: Path, encoding: str, text: str) -> None:
    """Their letters are letters in the other encodings too, but form no language there."""
    path = tmp_path / "t.csv"
    path.write_bytes(f'file,report\na.png,"{text}"\n'.encode(encoding))
    with open_text(path) as file:
        assert text in file.read()


def test_damaged_utf8_is_not_read_as_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(TEXT.encode() * 3 + b"c.png,caf\xe9\n")
    with pytest.raises(DataError, match=r"t\.csv:10 holds the byte 0xe9, which is not UTF-8"):
        encoding_of(path)
    path.write_bytes(TEXT.encode() + b"c.png,\0\0\0\n")
    with pytest.raises(DataError, match=r"t\.csv:4 holds a NUL character.*damaged"):
        encoding_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv.gz", TEXT.encode(), r"is not gzipped, .*Rename it to t\.csv\."),
        ("t.csv", archive("t.csv"), "is a zip archive, .*Unpack it"),
        ("t.csv.gz", archive("t.csv"), "is a zip archive, .*Unpack it"),
        ("t.csv", archive("xl/workbook.xml"), "is an Excel file, .*Save it as CSV"),
        ("t.xlsx", archive("[Content_Types].xml"), "is an Excel file, .*Save it as CSV"),
        ("t.xls", b"\xd0\xcf\x11\xe0" + b"\0" * 600, "is an Excel file, .*Save it as CSV"),
        ("t.tar", tar(), "is a tar archive"),
        ("t.tar.gz", gzip.compress(tar()), "is a tar archive"),
        ("t.csv.bz2", bz2.compress(TEXT.encode()), "is compressed with bzip2"),
        ("t.parquet", b"PAR1" + b"\0" * 600, "is a Parquet file, .*to_csv"),
        ("t.pdf", b"%PDF-1.7\n", "is a PDF"),
        ("t.csv", b"\n<!DOCTYPE html><html>Log in</html>", "is a web page"),
        ("t.csv.gz", gzip.compress(TEXT.encode() * 99)[:-12], "cannot be read: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_non_text_files_are_refused_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_text(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(TEXT.encode())
    assert encoding_of(path) == "utf-8"
    path.write_bytes(TEXT.encode("utf-16"))
    assert encoding_of(path) == "utf-16"
