from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilmedic.datasets.decode import UndecodableImage, decode_image
from vilmedic.errors import DataError
from vilmedic.preparation.resize import resize_short_side_file


def ramp(height: int, width: int, top: int = 255) -> np.ndarray:
    """A picture that says where each pixel is: rising to the right and down."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (down * 0.5 + across * 0.5) * top


@pytest.mark.parametrize(
    ("size", "expected"),
    [((90, 60), (48, 32)), ((60, 91), (32, 49)), ((64, 64), (32, 32)), ((20, 70), (20, 70))],
)
def test_the_short_side_and_the_aspect(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    Image.fromarray(ramp(*size).astype(np.uint8)).save(tmp_path / "a.png")
    resize_short_side_file(tmp_path / "a.png", tmp_path / "deep" / "b.jpg", 32)
    with Image.open(tmp_path / "deep" / "b.jpg") as image:
        assert (image.format, image.mode, image.size[::-1]) == ("JPEG", "L", expected)
    got = decode_image(tmp_path / "deep" / "b.jpg")[0].numpy()
    assert np.abs(got - ramp(*expected)).max() < 8


def test_sixteen_bits_become_eight_as_in_training(tmp_path: Path) -> None:
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


def test_a_suffix_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not as '\.jpgg'.*Did you mean '\.jpg'"):
        resize_short_side_file(tmp_path / "a.png", tmp_path / "b.jpgg", 32)
