from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vilmedic.datasets.decode import UndecodableImage, decode_image

RAMP = np.add.outer(np.arange(24) * 4, np.arange(32) * 5).astype(np.uint8)
COLOUR = np.dstack([RAMP, RAMP[::-1], 255 - RAMP])


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def close(image: torch.Tensor, expected: np.ndarray, tolerance: float = 1) -> bool:
    assert image.dtype == torch.uint8
    return bool(np.abs(image.numpy().astype(float) - expected).max() <= tolerance)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "pixels"),
    [
        ("1", (RAMP > 100) * np.uint8(255)),
        ("L", RAMP),
        ("P", RAMP // 2 * 2),
        ("RGB", np.dstack([RAMP] * 3)),
        ("LA", np.dstack([RAMP, np.full_like(RAMP, 255)])),
        ("RGBA", np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 255)])),
    ],
)
def test_png_modes(tmp_path: Path, mode: str, pixels: np.ndarray) -> None:
    if mode == "P":
        image = Image.fromarray(pixels, "L").convert("P")
    elif mode == "1":
        image = Image.fromarray(pixels, "L").convert("1")
    else:
        image = Image.fromarray(pixels, mode)
    path = save(tmp_path / "a.png", image)
    expected = pixels if pixels.ndim == 2 else pixels[:, :, 0]
    grey = decode_image(path, "grey")
    assert grey.shape == (1, 24, 32)
    assert close(grey[0], expected)
    rgb = decode_image(path, "rgb")
    assert rgb.shape == (3, 24, 32)
    assert all(close(channel, expected) for channel in rgb)


def test_colour_becomes_grey_by_luma(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(COLOUR))
    assert close(decode_image(path, "grey")[0], luma(COLOUR))
    assert close(decode_image(path, "rgb"), COLOUR.transpose(2, 0, 1), 0)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_modes(tmp_path: Path, mode: str, progressive: bool) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    path = save(tmp_path / "a.jpg", image, quality=100, subsampling=0, progressive=progressive)
    assert close(decode_image(path, "grey")[0], luma(COLOUR), 6)
    rgb = decode_image(path, "rgb")
    if mode == "L":
        assert close(rgb[0], luma(COLOUR), 6)
    else:
        assert close(rgb, COLOUR.transpose(2, 0, 1), 8)


def test_alpha_is_composited_over_black(tmp_path: Path) -> None:
    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1))
    path = save(tmp_path / "a.png", Image.fromarray(np.dstack([COLOUR, alpha]), "RGBA"))
    expected = COLOUR * (alpha[:, :, None] / 255)
    assert close(decode_image(path, "rgb"), expected.transpose(2, 0, 1), 2)
    assert close(decode_image(path, "grey")[0], luma(expected), 2)


def test_transparent_palette_entry_and_colour_key_become_black(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 200, 200, 200])
    path = save(tmp_path / "p.png", palette, transparency=0)
    assert decode_image(path, "grey").tolist() == [[[0, 200], [200, 0]]]
    path = save(tmp_path / "k.png", Image.fromarray(RAMP), transparency=int(RAMP[5, 5]))
    assert int(decode_image(path, "grey")[0, 5, 5]) == 0


@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_sixteen_bit_images_are_scaled_by_their_own_range(tmp_path: Path, top: int) -> None:
    values = np.linspace(300, top, RAMP.size).reshape(RAMP.shape).astype(np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(values))
    expected = np.linspace(0, 255, RAMP.size).reshape(RAMP.shape)
    assert close(decode_image(path, "grey")[0], expected)
    assert close(decode_image(path, "rgb")[2], expected)


def test_constant_sixteen_bit_images_are_black(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 1234, np.uint16)))
    assert decode_image(path).sum() == 0


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    wide = COLOUR.astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    (tmp_path / "a.png").write_bytes(data)
    assert close(decode_image(tmp_path / "a.png", "rgb"), COLOUR.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated camera: rotate by 90 degrees clockwise for display
    path = save(tmp_path / name, Image.fromarray(RAMP), exif=exif)
    assert close(decode_image(path)[0], np.rot90(RAMP, -1), 6)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RAMP, RAMP),
        (RAMP[:, :, None], RAMP),
        (RAMP > 100, (RAMP > 100) * 255.0),
        (RAMP.astype(np.uint16) * 16, RAMP * (255 / RAMP.max())),
        (RAMP.astype(np.float32) / 7 - 3, RAMP * (255 / RAMP.max())),
        (COLOUR, luma(COLOUR)),
    ],
)
def test_npy(tmp_path: Path, array: np.ndarray, expected: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    assert close(decode_image(tmp_path / "a.npy")[0], expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5), r"shape \[5\]"),
        (np.zeros((4, 4, 2)), r"shape \[4, 4, 2\]"),
        (np.zeros((0, 4)), r"shape \[0, 4\]"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), "a"), "<U1 values"),
        (np.full((4, 4), None), "object values"),
    ],
)
def test_npy_that_is_not_an_image_is_refused(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UndecodableImage, match=message):
        decode_image(tmp_path / "a.npy")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.npy"])
def test_truncated_files_are_errors(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
    path = tmp_path / name
    np.save(path, noise) if name == "a.npy" else save(path, Image.fromarray(noise))
    content = path.read_bytes()
    for share in (0.01, 0.3, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UndecodableImage, match=str(path)):
            decode_image(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", "is an empty file"),
        ("a.jpg", b"not an image", "not an image in a known format"),
        ("a.dcm", b"x", "not a DICOM file with an image"),
        ("a.png", b"\0" * 128 + b"DICM rest", "a.png"),
    ],
)
def test_invalid_contents_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UndecodableImage, match=message):
        decode_image(tmp_path / name)


def test_missing_files_and_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UndecodableImage, match=r"a\.png does not exist"):
        decode_image(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UndecodableImage, match=r"b\.png"):
        decode_image(tmp_path / "b.png")
