from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.datasets.dicom_files import make_dicom
from vilmedic.datasets.decode import decode_image
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.transforms import Pixels
from vilmedic.errors import DataError
from vilmedic.inputs import Preprocess, images_in, listed

SIDE = 24


def preprocess(**settings: Any) -> Preprocess:
    node = {"resize": SIDE, "crop": SIDE, **settings}
    return Preprocess(Pixels.of_evaluation(ImageDataset, node))


def grey(height: int = 40, width: int = 56, top: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    rows = np.arange(height)[:, None] * 3 + np.arange(width)[None] * 2
    return (rows * (top // 256) % top).astype(dtype)


def rgb() -> np.ndarray:
    return np.stack([grey(), grey()[::-1], 255 - grey()], axis=2)


@pytest.mark.parametrize("color", ["grey", "rgb"])
@pytest.mark.parametrize(
    ("mode", "pixels"),
    [
        ("L", grey()),
        ("RGB", rgb()),
        ("RGBA", np.dstack([rgb(), grey()])),
        ("LA", np.dstack([grey(), 255 - grey()])),
        ("I;16", grey(top=65536, dtype=np.uint16)),
        ("1", grey() > 100),
        ("P", None),
    ],
)
def test_a_pillow_image_gives_the_same_as_its_file(
    mode: str, pixels: np.ndarray | None, color: str, tmp_path: Path
) -> None:
    image = Image.fromarray(rgb()).quantize(17) if pixels is None else Image.fromarray(pixels)
    assert image.mode == mode
    path = tmp_path / "image.png"
    image.save(path)
    one = preprocess(color=color)
    expected = one(path)
    assert expected.std() > 0.1
    assert (expected.shape, expected.dtype) == ((3, SIDE, SIDE), torch.float32)
    assert torch.equal(one(str(path)), expected)
    assert torch.equal(one(image), expected)
    with Image.open(path) as opened:
        assert torch.equal(one(opened), expected)
    decoded = decode_image(path, color)  # type: ignore[arg-type]
    assert torch.equal(one(path), one.pixels.normalized(one.pixels.plain(decoded)))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_converted_like_pillow(mode: str) -> None:
    image = Image.fromarray(rgb()).convert(mode)
    assert torch.equal(preprocess()(image), preprocess()(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(grey()).save(path, exif=exif)
    expected = preprocess()(path)
    with Image.open(path) as opened:
        assert torch.equal(preprocess()(opened), expected)
    plain = preprocess()(Image.fromarray(grey()))
    assert torch.equal(expected, plain) == (orientation == 1)


@pytest.mark.parametrize(
    "pixels",
    [
        grey(),
        rgb(),
        grey(top=65536, dtype=np.uint16),
        (grey() / 255).astype(np.float32),
        (grey() / 255),
        grey() > 100,
        grey(top=4096, dtype=np.int16),
        grey()[::-1, ::2],
    ],
    ids=lambda pixels: f"{pixels.dtype}-{pixels.ndim}",
)
def test_an_array_gives_the_same_as_its_npy_file(pixels: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", pixels)
    expected = preprocess()(tmp_path / "image.npy")
    assert expected.std() > 0.1
    assert torch.equal(preprocess()(pixels), expected)
    tensor = torch.from_numpy(pixels.copy())
    assert torch.equal(preprocess()(tensor), expected)
    channels = tensor.permute(2, 0, 1) if pixels.ndim == 3 else tensor[None]
    assert torch.equal(preprocess()(channels), expected)


def test_float_pillow_images_equal_float_arrays() -> None:
    pixels = (grey() / 255).astype(np.float32)
    assert torch.equal(preprocess()(Image.fromarray(pixels)), preprocess()(pixels))


def test_dicom(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", grey(top=4096, dtype=np.uint16), BitsStored=12)
    expected = preprocess().pixels.plain(decode_image(path, "grey"))
    assert torch.equal(preprocess().read(path), expected)
    assert expected.float().std() > 10


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((2, 3, 4, 5)), "image"),
        (np.zeros((0, 4)), "image"),
        (np.array([["a"]]), "image"),
        (np.array([[None]]), "holds object values"),
        (np.full((4, 4), np.nan), "image"),
        (np.zeros((4, 4, 2), np.uint8), "image"),
        (np.zeros((4, 4), np.complex64), "image"),
        (3, "given a int, allowed: a path, a Pillow image, an array or a tensor"),
        (None, "given a NoneType, allowed"),
        (b"x", "given a bytes, allowed"),
        ("nowhere.png", r"nowhere\.png"),
    ],
    ids=str,
)
def test_non_images_are_refused(wrong: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        preprocess()(wrong)


def test_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "deep/c.jpg", "deep/er/d.png", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            Image.fromarray(grey()).save(path)
    np.save(tmp_path / "e.npy", grey())
    names = ["a.PNG", "b.png", "e.npy", "deep/c.jpg", "deep/er/d.png"]
    assert images_in(tmp_path) == [str(tmp_path / name) for name in names]
    (tmp_path / "deep" / "up").symlink_to(tmp_path)  # each image is still listed once
    assert listed(tmp_path) == listed(str(tmp_path)) == images_in(tmp_path)
    assert len(images_in(tmp_path)) == len(names)
    with pytest.raises(DataError, match="none: there is no such folder"):
        images_in(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no image \(\.bmp"):
        images_in(tmp_path / "empty")


def test_one_image_is_a_list_of_one(tmp_path: Path) -> None:
    image = Image.fromarray(grey())
    image.save(tmp_path / "a.png")
    assert listed(image) == [image]
    assert listed(tmp_path / "a.png") == [tmp_path / "a.png"]
    for many in (np.stack([rgb(), rgb()]), torch.from_numpy(np.stack([rgb(), rgb()]))):
        assert len(list(listed(many))) == 2
        assert len(list(listed(many[0]))) == 1


def test_batches_of_different_sizes_keep_the_order() -> None:
    one = preprocess(resize=None, crop=None)
    sizes = [(30, 30), (40, 20), (30, 30), (20, 20), (40, 20), (30, 30), (8, 8)]
    images = [np.full(size, 10 * n, np.uint8) for n, size in enumerate(sizes)]
    seen = []
    for groups, errors in one.batches(iter(images), 3, workers=2):
        found: dict[int, Any] = {}
        for places, group in groups:
            found.update(zip(places, group, strict=True))
        assert sorted(found) == list(range(len(errors)))
        seen += [found[place] for place in sorted(found)]
    assert [tuple(image.shape[1:]) for image in seen] == sizes
    assert [int(image[0, 0, 0]) for image in seen] == [10 * n for n in range(len(sizes))]


def test_a_stream_keeps_few_batches_in_memory() -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        for number in range(400):
            taken += 1
            yield np.full((256, 256), number % 256, np.uint8)

    given = 0
    tracemalloc.start()
    for _, errors in preprocess().batches(endless(), 4, workers=2):
        given += len(errors)
        assert taken - given <= 12
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (given, taken) == (400, 400)
    assert peak < 40 * 256 * 256  # a tenth of the input


def test_closing_the_stream_ends_its_threads() -> None:
    import threading

    stream = preprocess().batches((grey() for _ in range(10**9)), 2, workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not [one for one in threading.enumerate() if one.name.startswith("image")]


def test_errors_of_the_input_generator_are_raised_unchanged() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield grey()
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(preprocess().batches(broken(), 1))
