from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import resize
from tests.datasets.dicom_files import make_dicom, table
from vilmedic.datasets.decode import UndecodableImage, decode_image
from vilmedic.errors import DataError
from vilmedic.preparation.resize import resize_short_side_file, resize_tree


def ramp(height: int, width: int, top: int = 255) -> np.ndarray:
    """An image whose values rise to the right and down, so that each position differs."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (down * 0.5 + across * 0.5) * top


@pytest.mark.parametrize(
    ("size", "expected"),
    [((90, 60), (48, 32)), ((60, 91), (32, 49)), ((64, 64), (32, 32)), ((20, 70), (20, 70))],
)
def test_short_side_and_aspect_ratio(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    Image.fromarray(ramp(*size).astype(np.uint8)).save(tmp_path / "a.png")
    resize_short_side_file(tmp_path / "a.png", tmp_path / "deep" / "b.jpg", 32)
    with Image.open(tmp_path / "deep" / "b.jpg") as image:
        assert (image.format, image.mode, image.size[::-1]) == ("JPEG", "L", expected)
    got = decode_image(tmp_path / "deep" / "b.jpg")[0].numpy()
    assert np.abs(got - ramp(*expected)).max() < 8


def test_sixteen_bits_are_converted_as_in_training(tmp_path: Path) -> None:
    deep = ramp(80, 64, top=4095).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    resize_short_side_file(tmp_path / "a.png", tmp_path / "b.png", 64)
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "L"
    assert (decode_image(tmp_path / "b.png") == decode_image(tmp_path / "a.png")).all()


def test_colour_is_kept_and_grey_in_three_channels_is_not(tmp_path: Path) -> None:
    grey = ramp(40, 40).astype(np.uint8)
    Image.fromarray(np.stack([grey, grey, grey], axis=2)).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey, grey, 255 - grey], axis=2)).save(tmp_path / "colour.png")
    modes = {}
    for name in ("grey", "colour"):
        resize_short_side_file(tmp_path / f"{name}.png", tmp_path / f"{name}.jpg", 32)
        with Image.open(tmp_path / f"{name}.jpg") as image:
            modes[name] = image.mode
    assert modes == {"grey": "L", "colour": "RGB"}


def test_a_higher_quality_is_closer(tmp_path: Path) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "a.png")
    errors = {}
    for quality in (50, 95):
        resize_short_side_file(tmp_path / "a.png", tmp_path / "b.jpg", 64, quality=quality)
        got = decode_image(tmp_path / "b.jpg")[0].numpy().astype(float)
        errors[quality] = np.abs(got - noisy).mean()
    assert errors[95] < 5 < errors[50]


def test_a_broken_image_leaves_nothing(tmp_path: Path) -> None:
    Image.fromarray(ramp(64, 64).astype(np.uint8)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "out").mkdir()
    with pytest.raises(UndecodableImage, match=r"cut\.jpg"):
        resize_short_side_file(tmp_path / "cut.jpg", tmp_path / "out" / "b.jpg", 32)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unwritable_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not as '\.jpgg'.*Did you mean '\.jpg'"):
        resize_short_side_file(tmp_path / "a.png", tmp_path / "b.jpgg", 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    (folder / "p10" / "s1").mkdir(parents=True)
    ramp = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "p10" / "a.jpg")
    Image.fromarray(ramp.astype(np.uint16) * 200).save(folder / "p10" / "b.PNG")
    make_dicom(folder / "p10" / "s1" / "c.dcm", ramp.astype(np.uint16) * 20)
    make_dicom(folder / "p10" / "s1" / "1.2.840.99", ramp)
    (folder / "p10" / "report.txt").write_text("No effusion.")
    return folder


def test_the_folder_tree_is_kept(source: Path, tmp_path: Path) -> None:
    found = resize_tree(source, tmp_path / "small", 30)
    assert (found.written, found.present, found.unreadable) == (4, 0, {})
    assert dict(found.other) == {".txt": 1}
    names = ["p10/a.jpg", "p10/b.jpg", "p10/s1/1.2.840.99.jpg", "p10/s1/c.jpg"]
    for name in names:
        image = Image.open(tmp_path / "small" / name)
        assert image.size == (40, 30)
        assert image.mode == "L"
        pixels = np.asarray(image).astype(float)
        assert pixels[-1, -1] > pixels[0, 0] + 100
    assert resize_tree(source, tmp_path / "png", 30, suffix=".png").written == 4
    assert Image.open(tmp_path / "png" / "p10" / "b.png").size == (40, 30)


def test_a_second_run_writes_only_missing_or_changed_images(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "small"
    resize_tree(source, target, 30)
    (target / "p10" / "a.jpg").unlink()
    newer = (target / "p10" / "b.jpg").stat().st_mtime_ns + 10**9
    os.utime(source / "p10" / "b.PNG", ns=(newer, newer))
    os.utime(target / "resize.txt", ns=(0, 0))
    found = resize_tree(source, target, 30)
    assert (found.written, found.present) == (2, 2)
    with pytest.raises(DataError, match=r"made with short side 30.*not short side 20.*--force"):
        resize_tree(source, target, 20)
    assert resize_tree(source, target, 20, force=True).written == 4
    assert Image.open(target / "p10" / "a.jpg").size == (27, 20)


def test_the_number_of_processes_does_not_change_the_output(source: Path, tmp_path: Path) -> None:
    for number in range(50):
        (source / f"{number}.jpg").write_bytes((source / "p10" / "a.jpg").read_bytes())
    one = resize_tree(source, tmp_path / "one", 30, workers=1)
    two = resize_tree(source, tmp_path / "two", 30, workers=2)
    assert one.written == two.written == 54
    for path in (tmp_path / "one").rglob("*.jpg"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert other.read_bytes() == path.read_bytes()


def test_unreadable_files_are_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (source / "p10" / "a.jpg").read_bytes()
    (source / "bad.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "empty.png").write_bytes(b"")
    target = tmp_path / "small"
    assert resize.main([str(source), str(target), "--size", "30"]) == 1
    shown = capsys.readouterr()
    assert "4 images written, 0 there already, 2 unreadable" in shown.out
    assert "bad.jpg" in shown.err
    listed = (target / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [
        str(source / "bad.jpg"),
        str(source / "empty.png"),
    ]
    assert not list(target.glob("bad*"))
    (source / "bad.jpg").write_bytes(whole)
    (source / "empty.png").unlink()
    assert resize.main([str(source), str(target), "--size", "30"]) == 0
    assert (target / "unreadable.txt").read_text() == ""


def test_links(source: Path, tmp_path: Path) -> None:
    """Linked folders are followed; broken links are listed, and the rest is written."""
    (source / "p10").rename(tmp_path / "disk")
    (source / "p10").symlink_to(tmp_path / "disk")
    (source / "gone.png").symlink_to(tmp_path / "gone")
    (source / "gone").symlink_to(tmp_path / "gone")
    found = resize_tree(source, tmp_path / "small", 30)
    assert found.written == 4
    assert (tmp_path / "small" / "p10" / "s1" / "c.jpg").is_file()
    listed = (tmp_path / "small" / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [
        str(source / "gone"),
        str(source / "gone.png"),
    ]
    assert all("cannot be read: No such file or directory" in line for line in listed)


def test_a_folder_that_cannot_be_listed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("s1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", refused)
    found = resize_tree(source, tmp_path / "small", 30)
    assert found.written == 2
    folder = source / "p10" / "s1"
    assert found.unreadable == {str(folder): f"{folder} cannot be read: Permission denied."}


def test_images_with_the_same_target_name_are_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "p10" / "a.png").write_bytes((source / "p10" / "b.PNG").read_bytes())
    target = tmp_path / "small"
    assert resize.main([str(source), str(target), "--size", "30"]) == 1
    assert not (target / "p10" / "a.jpg").exists()
    assert all((target / "p10" / name).is_file() for name in ("b.jpg", "s1/c.jpg"))
    listed = dict(line.split("\t") for line in (target / "unreadable.txt").read_text().splitlines())
    assert list(listed) == [str(source / "p10" / "a.jpg"), str(source / "p10" / "a.png")]
    assert listed[str(source / "p10" / "a.png")].endswith(
        f"would be written to a.jpg, as would {source / 'p10' / 'a.jpg'}. Rename one of them."
    )
    assert "unreadable.txt" in capsys.readouterr().err


def test_files_that_are_not_images_are_listed(source: Path, tmp_path: Path) -> None:
    """Pillow can write .pdf files, and macOS stores `._x.jpg` beside `x.jpg`."""
    (source / "report.pdf").write_bytes(b"%PDF-1.4")
    (source / "p10" / "._a.jpg").write_bytes(b"\0\5\x16\7\0\2")
    (source / "p10" / "s1" / "._c.dcm").write_bytes(b"\0\5\x16\7\0\2")
    found = resize_tree(source, tmp_path / "small", 30)
    assert (found.written, found.unreadable) == (4, {})
    assert dict(found.other) == {".pdf": 1, ".txt": 1, "._*": 2}
    listed = (tmp_path / "small" / "left_out.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == {
        str(source / name)
        for name in ("report.pdf", "p10/._a.jpg", "p10/report.txt", "p10/s1/._c.dcm")
    }
    assert all(line.split("\t")[1] for line in listed)


def test_invalid_arguments_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="lies within"):
        resize_tree(source, source / "small", 30)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no images, but 1 \.txt"):
        resize_tree(tmp_path / "texts", tmp_path / "small", 30)
    assert resize.main([str(tmp_path / "nowhere"), str(tmp_path / "small")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_damaged_and_special_files_are_listed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200), dtype=np.uint8)
    Image.fromarray(noise).save(source / "damaged.jpg", quality=90)
    content = (source / "damaged.jpg").read_bytes()
    (source / "damaged.jpg").write_bytes(content[:9000] + bytes(400) + content[9400:])
    os.mkfifo(source / "pipe.jpg")
    os.mkfifo(source / "IM0001")
    Image.fromarray(noise).resize((1, 66000)).save(source / "long.png")
    assert resize.main([str(source), str(tmp_path / "small"), "--max-pixels", "66000"]) == 1
    capsys.readouterr()
    listed = (tmp_path / "small" / "unreadable.txt").read_text().splitlines()
    reasons = {Path(line.split("\t")[0]).name: line for line in listed}
    assert sorted(reasons) == ["IM0001", "damaged.jpg", "long.png", "pipe.jpg"]
    assert "it is a named pipe, not a file" in reasons["pipe.jpg"]
    assert "too long for JPEG, 66000 pixels" in reasons["long.png"]
    assert resize.main([str(source), str(tmp_path / "tiny"), "--max-pixels", "1000"]) == 1
    assert "60 x 80 pixels, more than max_pixels=1000" in capsys.readouterr().err


def test_contradicting_headers_are_reported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    lut = table(list(range(4096)), 0, 16)
    make_dicom(source / "x.dcm", values, VOILUTSequence=[lut])
    assert resize.main([str(source), str(tmp_path / "small"), "--format", "png"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"read by its content: \S+x\.dcm: its VOI table states 16 bits", shown)
    assert np.asarray(Image.open(tmp_path / "small" / "x.png")).max() == 255


def test_images_without_a_suffix_are_found_by_content(source: Path, tmp_path: Path) -> None:
    ramp = Image.fromarray(np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8))
    kinds = {
        "IM000012": "PNG",
        "1.2.840.7": "JPEG",
        "scan.1": "TIFF",
        "x.img": "BMP",
        "y": "JPEG2000",
    }
    for name, kind in kinds.items():
        ramp.save(source / name, kind)
    np.save(source / "array.npy", np.asarray(ramp))
    (source / "array.npy").rename(source / "array")
    (source / "patients").write_text("BMI,age\n22,40\n")
    found = resize_tree(source, tmp_path / "small", 30)
    assert (found.written, found.unreadable) == (4 + len(kinds) + 1, {})
    assert set(found.left_out) == {str(source / "patients"), str(source / "p10" / "report.txt")}
    for name in [*kinds, "array"]:
        pixels = np.asarray(Image.open(tmp_path / "small" / f"{name}.jpg")).astype(float)
        assert pixels.shape == (30, 40)
        assert pixels[-1, -1] > pixels[0, 0] + 100


def test_other_formats_are_counted_by_type(source: Path, tmp_path: Path) -> None:
    for name in ("a.gif", "b.pdf", "c.eps"):
        (source / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    found = resize_tree(source, tmp_path / "small", 30)
    assert dict(found.other) == {".txt": 1, ".gif": 1, ".pdf": 1, ".eps": 1}
    assert found.unreadable == {}
