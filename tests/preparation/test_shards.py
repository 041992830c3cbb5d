from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_shards
from tests.datasets.dicom_files import make_dicom
from vilmedic.datasets.image import ImageDataset
from vilmedic.errors import DataError
from vilmedic.preparation.shards import write_shards


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five training lines, one with two images, and two test lines."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for number in range(6):
        pixels = np.full((9, 9 + number), 40 * number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "train.image.tok").write_text("0\n1,2\n3\n4\n5\n")
    (folder / "train.report.tok").write_text("No effusion.\nÖdem.\nThree\nFour\nFive\n")
    (folder / "test.image.tok").write_text("2.png\n0\n")
    return folder


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def test_shards_hold_the_unchanged_files(root: Path, tmp_path: Path) -> None:
    written = write_shards(root, tmp_path / "out", ext="png", samples=2)
    assert written["train"]["lines"] == 5
    assert written["train"]["images"] == 6
    assert written["train"]["shards"] == 3
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "shards.json",
        "test-000000.tar",
        "test.image.tok",
        "test.shards.npz",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "train.image.tok",
        "train.report.tok",
        "train.shards.npz",
    ]
    first = contents(tmp_path / "out" / "train-000000.tar")
    assert list(first) == [
        "000000000.png",
        "000000000.txt",
        "000000000.json",
        "000000001.0.png",
        "000000001.1.png",
        "000000001.txt",
        "000000001.json",
    ]
    assert first["000000001.1.png"] == (root / "images" / "2.png").read_bytes()
    assert first["000000001.txt"].decode() == "Ödem."
    assert json.loads(first["000000001.json"]) == {"image": "1,2", "report": "Ödem."}


def test_webdataset_can_read_the_shards(root: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shards(root, tmp_path / "out", ext="png", samples=2)
    urls = [str(tmp_path / "out" / f"train-00000{n}.tar") for n in range(3)]
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode("l8")
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == [f"{line:09d}" for line in range(5)]
    assert [sample["txt"] for sample in samples][1:3] == ["Ödem.", "Three"]
    assert samples[2]["png"].shape == (9, 12)
    assert int(samples[2]["png"].max()) == 120


def test_same_input_gives_the_same_bytes_and_an_interruption_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(root, tmp_path / "one", ext="png", samples=2)
    target = tmp_path / "two"
    calls = []
    from vilmedic.preparation import shards

    whole: Callable[..., None] = shards._add

    def stop(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(shards, "_add", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shards(root, target, ext="png", samples=2, workers=1)
    assert not list(target.glob("*.npz")) or not (target / "train.shards.npz").exists()
    calls.clear()
    calls.extend([()] * 100)
    before = len(calls)
    write_shards(root, target, ext="png", samples=2, workers=1)
    assert 0 < len(calls) - before < 18  # finished shards were kept
    for path in (tmp_path / "one").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_changed_files_of_equal_size_are_written_again(root: Path, tmp_path: Path) -> None:
    for number in range(6):
        np.save(root / "images" / f"{number}.npy", np.full((4, 4), number, np.uint8))
    (root / "test.image.tok").write_text("2.npy\n0.npy\n")
    target = tmp_path / "out"
    write_shards(root, target, ext="npy", samples=2)
    kept = (target / "train-000001.tar").stat().st_mtime_ns
    changed = root / "images" / "5.npy"
    np.save(changed, np.full((4, 4), 200, np.uint8))
    reports = root / "train.report.tok"
    reports.write_text(reports.read_text().replace("No effusion.", "An effusion."))
    write_shards(root, target, ext="npy", samples=2)
    assert contents(target / "train-000002.tar")["000000004.npy"] == changed.read_bytes()
    assert contents(target / "train-000000.tar")["000000000.txt"] == b"An effusion."
    assert (target / "train-000001.tar").stat().st_mtime_ns == kept


def test_other_images_under_the_same_names_are_refused(root: Path, tmp_path: Path) -> None:
    write_shards(root, tmp_path / "out", ext="png")
    shutil.copytree(root / "images", tmp_path / "other")
    with pytest.raises(DataError, match=r"image_path.*--force"):
        write_shards(root, tmp_path / "out", ext="png", image_path=tmp_path / "other")


def test_invalid_arguments_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no line files of images"):
        write_shards(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="another folder"):
        write_shards(root, root)
    with pytest.raises(DataError, match=r"1 missing image.*set that, or ext"):
        write_shards(root, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(DataError, match="not empty and holds no shards"):
        write_shards(root, tmp_path / "mine", ext="png", force=True)
    write_shards(root, tmp_path / "out", ext="png", samples=1000)
    with pytest.raises(DataError, match="--force"):
        write_shards(root, tmp_path / "out", ext="png", samples=2)
    write_shards(root, tmp_path / "out", ext="png", samples=2, force=True)
    assert len(list((tmp_path / "out").glob("train-*.tar"))) == 3


def test_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out")
    assert make_shards.main([str(root), target, "--ext", "png", "--samples", "2"]) == 0
    assert "train: 5 lines with 6 images in 3 shards" in capsys.readouterr().out
    assert make_shards.main([str(tmp_path / "no"), target]) == 2
    assert "make_shards: " in capsys.readouterr().err


def test_names_without_a_suffix_get_one_from_the_content(tmp_path: Path) -> None:
    """webdataset distinguishes the files of a sample by the part after the first dot."""
    webdataset = pytest.importorskip("webdataset")
    root, images = tmp_path / "set", tmp_path / "images"
    root.mkdir()
    images.mkdir()
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    names = ["1.2.840.113619.2.7", "IM000012", "scan.2019", "14", "15.", "photo"]
    for name in names[:2]:
        make_dicom(images / name, pixels)
    for name, form in zip(names[2:], ["PNG", "PNG", "PNG", "JPEG"], strict=True):
        Image.fromarray(pixels).save(images / name, form)
    (root / "train.image.tok").write_text("".join(f"{name}\n" for name in names))
    write_shards(root, tmp_path / "out", image_path=images)
    samples = list(
        webdataset.WebDataset(str(tmp_path / "out" / "train-000000.tar"), shardshuffle=False)
    )
    found = [sorted(key for key in sample if not key.startswith("__")) for sample in samples]
    suffixes = ["dcm", "dcm", "png", "png", "png", "jpg"]
    assert found == [sorted([suffix, "json"]) for suffix in suffixes]
    for sample, name, suffix in zip(samples, names, suffixes, strict=True):
        assert sample[suffix] == (images / name).read_bytes()
    given: dict[str, Any] = {"split": "train", "training": False, "seed": 0}
    both = [
        ImageDataset(root=str(folder), image_path=path, resize=None, crop=None, **given)
        for folder, path in ((root, str(images)), (tmp_path / "out", None))
    ]
    for line in range(len(names)):
        assert torch.equal(both[0].images(line)[0], both[1].images(line)[0])


def test_a_file_that_is_not_an_image_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "images" / "12").write_text("words")
    (root / "test.image.tok").write_text("12\n0.png\n")
    with pytest.raises(DataError, match=r"12 has neither the name nor the content of an image"):
        write_shards(root, tmp_path / "out", ext="")
