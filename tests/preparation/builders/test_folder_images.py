from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from vilmedic.errors import DataError
from vilmedic.preparation.builders.folder_images import (
    BACKSLASHES,
    CASE,
    NUMBER,
    UNICODE,
    FoundImage,
    ImageFolder,
    connected,
    name_differences,
    same_content,
    settled,
)

NFC, NFD = (unicodedata.normalize(form, "Röntgen/Größe.png") for form in ("NFC", "NFD"))


def folder(root: Path, *names: str, ext: str = "") -> ImageFolder:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 20)
    return ImageFolder(root, ext)


@pytest.mark.parametrize(
    ("on_disk", "named", "differs"),
    [
        ("a.png", "a.png", ()),
        ("a.png", "./a.png", ()),
        (NFD, NFC, (UNICODE,)),
        (NFC, NFD, (UNICODE,)),
        ("sub/a.png", "sub\\a.png", (BACKSLASHES,)),
        ("sub\\a.png", "sub\\a.png", ()),
        ("sub\\A.png", "sub\\a.png", (CASE,)),
        ("sub/a.png", "Sub/A.PNG", (CASE,)),
        (NFD, NFC.upper().replace("SS", "ß"), (CASE, UNICODE)),
        ("sub/a.png", ".\\SUB\\a.png", (BACKSLASHES, CASE)),
    ],
)
def test_names_that_differ_in_unicode_form_or_case(
    tmp_path: Path, on_disk: str, named: str, differs: tuple[str, ...]
) -> None:
    found = folder(tmp_path, on_disk, "other.png").find(named)
    assert (found.path, found.state) == (on_disk, "there")
    assert set(found.differs) == set(differs)
    assert name_differences([[found], [found]]) == dict.fromkeys(differs, 2)


def test_numeric_image_names(tmp_path: Path) -> None:
    images = folder(tmp_path, "12.png", "13.0.png", "13.png", ext=".png")
    assert images.find("12.0") == FoundImage("12.0.png", "12.png", "there", (NUMBER,))
    assert images.find("13.0") == FoundImage("13.0.png", "13.0.png", "there")
    assert images.find("14.0").state == "missing"


def test_an_ambiguous_name_matches_no_file(tmp_path: Path) -> None:
    images = folder(tmp_path, "a.png", "A.png", "sub/b.png", "SUB/b.png", NFC, NFD)
    for name in ("a.PNG", "Sub/B.png"):
        found = images.find(name)
        assert (found.state, found.path) == ("ambiguous", name)
        assert images.hint(found).startswith("Files that fit: ")
    for name in ("a.png", "A.png", "sub/b.png", "SUB/b.png", NFC, NFD):
        assert images.find(name) == FoundImage(name, name, "there")


def test_a_file_with_its_own_row_is_not_matched_again(tmp_path: Path) -> None:
    """On a case-insensitive disk `a.png` has overwritten `A.png`."""
    images = folder(tmp_path, "a.png", "b.png")
    rows = [[images.find(name)] for name in ("a.png", "A.png", "B.png", "B.PNG", "b.pNg")]
    assert [row[0].state for row in settled(rows)] == ["there", *["ambiguous"] * 4]
    assert images.hint(settled(rows)[1][0]) == "The file that fits, a.png, already has its own row."
    rows = [[images.find(name)] for name in ("B.png", "B.png", ".\\B.png")]
    assert [row[0].state for row in settled(rows)] == ["there"] * 3


def test_a_cell_is_read_as_a_name_before_a_list(tmp_path: Path) -> None:
    images = folder(tmp_path, "scan, left.png", "left.png", "scan", "a.png", "b.png")
    assert [one.path for one in images.images(["scan, left.png"])] == ["scan, left.png"]
    assert [one.path for one in images.images(["a.png, b.png,"])] == ["a.png", "b.png"]
    assert [one.path for one in images.images(["a.png", "scan, left.png"])] == [
        "a.png",
        "scan, left.png",
    ]
    (gone,) = images.images(["gone.png,lost.png"])
    assert (gone.name, gone.state) == ("gone.png,lost.png", "missing")
    with pytest.raises(DataError, match=r"t\.csv:3: 'a\.png,gone\.png' is no image, .*'gone\.png'"):
        images.images(["a.png,gone.png"], "t.csv:3")
    long = ",".join(["deep/folder/a.png"] * 99)  # longer than a file name can be
    assert images.images([long])[0].state == "missing"


@pytest.mark.parametrize(
    "name", ["../a.png", "..\\a.png", "/etc/a.png", "C:\\scans\\a.png", "sub/../../a.png"]
)
def test_paths_outside_the_folder_are_an_error_with_their_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"t\.csv:9: The image .* does not lie in"):
        folder(tmp_path / "images", "a.png").images([name], "t.csv:9")


def test_hints_for_missing_images(tmp_path: Path) -> None:
    images = folder(tmp_path, "deep/down/a.png", "scan_01.png", "x.jpg")
    hint = images.hint(images.find("a.png"))
    assert hint.endswith(f"a file of that name is at {Path('deep', 'down', 'a.png')}.")
    assert "Did you mean 'scan_01.png'?" in images.hint(images.find("scan_1.png"))
    assert images.hint(images.find("x")) == "There is x.jpg: give --ext .jpg."


def test_folders_and_broken_links_are_not_images(tmp_path: Path) -> None:
    images = folder(tmp_path, "sub/a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    for name in ("sub", "gone.png", "", ".", "a\0b.png", "x" * 999):
        assert images.find(name).state == "missing"


def test_images_with_equal_content(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", "b.png", "c.png", "empty", "empty2", "d.png", "e.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    for name in ("empty", "empty2"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.png").write_bytes(b"1" + b"0" * 5000)  # only the end is equal
    (tmp_path / "e.png").write_bytes(b"2" + b"0" * 5000)
    names = ("a.png", "b.png", "c.png", "empty", "empty2", "d.png", "e.png", "a.png")
    same = same_content(tmp_path, names)
    assert list(same) == ["a.png", "c.png"]
    assert same["a.png"] == same["c.png"]


def test_groups_are_connected_transitively() -> None:
    rows = [["a", "b"], ["c"], ["d", "c"], ["b", "d"], ["e"]]
    found = connected(rows)
    assert len({found[n] for n in (0, 1, 2, 3)}) == 1
    assert found[4] == "e"
