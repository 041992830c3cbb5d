from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vilmedic.datasets.decode import UndecodableImage, decode_image
from vilmedic.datasets.jpeg_data import DamagedJpeg, check_jpeg
from vilmedic.phantom.case import draw_case
from vilmedic.phantom.render import render

KINDS: list[dict[str, Any]] = [
    {"quality": 95},
    {"quality": 60, "optimize": True},
    {"quality": 90, "progressive": True},
    {"quality": 80, "restart_marker_blocks": 30},
    {"quality": 85, "subsampling": 0},
]


def jpeg(mode: str = "L", number: int = 0, **options: Any) -> bytes:
    pixels = render(draw_case(0, "train", number), 200).pixels
    image = Image.fromarray(pixels if mode == "L" else np.dstack([pixels, pixels.T, pixels]))
    stream = io.BytesIO()
    image.convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def data_start(content: bytes) -> int:
    return content.index(b"\xff\xda") + 20


def decoded(path: Path, content: bytes) -> torch.Tensor:
    path.write_bytes(content)
    return decode_image(path, thorough=True)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_valid_files_are_decoded_like_pillow(
    tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    content = jpeg(mode, **options)
    check_jpeg(content)
    with Image.open(io.BytesIO(content)) as image:
        colours = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    (tmp_path / "a.jpg").write_bytes(content)
    assert np.array_equal(decode_image(tmp_path / "a.jpg", "rgb"), colours)
    if mode != "CMYK":
        with Image.open(io.BytesIO(content)) as image:
            image.draft("L", image.size)
            grey = np.asarray(image.convert("L"))
        assert np.array_equal(decode_image(tmp_path / "a.jpg")[0], grey)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (17, 33), (200, 3)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_sizes_that_are_not_multiples_of_a_block(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    random = np.random.default_rng(0)
    for shape in (size, (*size, 3)):
        stream = io.BytesIO()
        image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
        image.save(stream, "JPEG", **options)
        check_jpeg(stream.getvalue())


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_progressive_files_truncated_between_scans_are_found(tmp_path: Path, mode: str) -> None:
    """The rest decodes without a decoder error to a coarse image."""
    content = jpeg(mode, quality=90, progressive=True)
    whole = decoded(tmp_path / "whole.jpg", content)
    starts = [match.start() for match in re.finditer(rb"\xff\xda", content)]
    # A scan begins with its code table, at the end of the previous scan.
    tables = [content.rindex(b"\xff\xc4", 0, start) for start in starts[1:]]
    assert len(starts) >= 5
    for end in [*starts[1:], *tables]:
        (tmp_path / "cut.jpg").write_bytes(content[:end])
        for thorough in (False, True):
            with pytest.raises(UndecodableImage, match=r"end before the last|end too early"):
                decode_image(tmp_path / "cut.jpg", thorough=thorough)
    for cut in (1, 2):  # bytes of the end marker only
        assert torch.equal(decoded(tmp_path / "cut.jpg", content[:-cut]), whole)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("filling", ["zeros", "garbage"])
def test_overwritten_data_are_found(
    tmp_path: Path, mode: str, options: dict[str, Any], filling: str
) -> None:
    """Also where a decoder resynchronises and reports nothing."""
    random = np.random.default_rng(1)
    path = tmp_path / "a.jpg"
    visible = missed = 0
    for number in range(12):
        content = jpeg(mode, number % 4, **options)
        whole = decoded(path, content).int()
        place = int(random.integers(data_start(content), len(content) - 400))
        garbage = bytes(300) if filling == "zeros" else random.bytes(300)
        try:
            found = decoded(path, content[:place] + garbage + content[place + 300 :]).int()
        except UndecodableImage:
            visible += 1
            continue
        missed += int(found.shape != whole.shape or (found - whole).abs().max() > 40)
    assert missed == 0
    assert visible >= 9  # changes that are hardly visible may be accepted


def test_damage_not_reported_by_the_decoder_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    silent = 0
    for number in range(24):
        content = jpeg("RGB", number % 4, quality=95, subsampling=0)
        start = data_start(content) + 2000 + 37 * number
        path.write_bytes(content[:start] + bytes(150) + content[start + 150 :])
        try:
            decode_image(path)
        except UndecodableImage:
            continue
        silent += 1
        with pytest.raises(UndecodableImage, match="its compressed data are damaged"):
            decode_image(path, thorough=True)
    assert silent > 0


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("extra", [b"\0", bytes(50), b"\x12\x34" * 20, b"\xff" * 5, b"end of it"])
def test_extra_bytes_before_the_end_marker_are_accepted(
    tmp_path: Path, options: dict[str, Any], extra: bytes
) -> None:
    content = jpeg(**options)
    whole = decoded(tmp_path / "a.jpg", content)
    for changed in (content[:-2] + extra + content[-2:], content + extra, content[:-2]):
        assert torch.equal(decoded(tmp_path / "a.jpg", changed), whole)


def test_excess_blocks_are_an_error(tmp_path: Path) -> None:
    """A height that is too small leaves rows of blocks after the last one."""
    content = jpeg(quality=90)
    at = content.index(b"\xff\xc0") + 5
    shorter = content[:at] + (120).to_bytes(2, "big") + content[at + 2 :]
    with pytest.raises(DamagedJpeg, match="data are damaged"):
        check_jpeg(shorter)
    with pytest.raises(UndecodableImage, match="data are damaged"):
        decoded(tmp_path / "a.jpg", shorter)


@pytest.mark.parametrize("options", KINDS)
def test_truncated_data_are_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    content = jpeg(**options)
    for share in (0.3, 0.7, 0.97):
        cut = content[: int(len(content) * share)]
        for changed in (cut, cut + b"\xff\xd9"):
            with pytest.raises(UndecodableImage):
                decoded(tmp_path / "a.jpg", changed)


def test_too_many_scans_are_refused(tmp_path: Path) -> None:
    content = jpeg(progressive=True)
    scan = b"\xff\xda\0\x08\1\1\0\0\0\0"
    with pytest.raises(UndecodableImage, match="more than 500 scans"):
        decoded(tmp_path / "a.jpg", content[:-2] + scan * 600 + b"\xff\xd9")
