from __future__ import annotations

import bz2
import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.text_file import encoding_of, open_text

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
    path = tmp_path / "t.csv"  # read by its content: what is compressed need not say so
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
def test_an_encoding_that_cannot_be_told_from_a_few_words(
    tmp_path: Path, text: str, encoding: str
) -> None:
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
    """All letters of one are letters in the other character sets too, of no language there."""
    path = tmp_path / "t.csv"
    path.write_bytes(f'file,report\na.png,"{text}"\n'.encode(encoding))
    with open_text(path) as file:
        assert text in file.read()


def test_utf8_with_a_damaged_line_is_not_taken_for_latin_1(tmp_path: Path) -> None:
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
def test_what_is_no_text_is_named_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_text(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(TEXT.encode())
    assert encoding_of(path) == "utf-8"
    path.write_bytes(TEXT.encode("utf-16"))
    assert encoding_of(path) == "utf-16"
