"""Decoding of all bit depths, colour types, photometric interpretations and transfer syntaxes.

Files are written by other libraries than the ones that read them: TIFF by tifffile, PNG directly.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.datasets.dicom_files import make_dicom, shown
from tests.datasets.png_files import chunk, make_png
from vilmedic.datasets.decode import UndecodableImage, decode_image

RAMP = np.add.outer(np.arange(24) * 40, np.arange(32) * 100).astype(np.uint16)  # 0 to 4020
EXPECTED = RAMP * (255 / RAMP.max())


def differs(path: Path, expected: np.ndarray) -> float:
    """The largest difference, also if the data are read a second time to find damage."""
    pixels = decode_image(path)
    assert np.array_equal(decode_image(path, thorough=True), pixels)
    return float(np.abs(pixels[0].numpy() - expected).max())


BLACK = {("<", "minisblack"), (">", "minisblack")}
WHITE = {("<", "miniswhite"), (">", "miniswhite")}
READ = {"i2": BLACK, "i4": BLACK, "f4": BLACK | WHITE, "u2": BLACK | {("<", "miniswhite")}}
READ["u4"] = {("<", "minisblack")}  # others are refused


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["u2", "i2", "u4", "i4", "f4"])
def test_tiff_of_many_bits(
    tmp_path: Path, kind: str, compression: str | None, photometric: str
) -> None:
    values = RAMP.astype(kind)
    if kind == "u4":
        values = values * np.uint32(2**20)  # beyond the signed range
    if kind in ("i2", "i4", "f4"):
        values = values - values.dtype.type(2000)
    for byteorder in ("<", ">"):
        path = tmp_path / "a.tif"
        settings: dict[str, Any] = {"photometric": photometric, "compression": compression}
        tifffile.imwrite(path, values, byteorder=byteorder, **settings)
        if (byteorder, photometric) in READ[kind]:
            expected = EXPECTED if photometric == "minisblack" else 255 - EXPECTED
            assert differs(path, expected) <= 1
        else:
            with pytest.raises(UndecodableImage, match=r"a TIFF file of a kind that.*\.npy"):
                decode_image(path)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_tiff_of_eight_bits(tmp_path: Path, photometric: str) -> None:
    values = (RAMP // 16).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric)
    expected = values.astype(float)
    assert (
        differs(tmp_path / "a.tif", expected if photometric == "minisblack" else 255 - expected)
        == 0
    )
    signed = (values.astype(int) - 128).astype(np.int8)
    tifffile.imwrite(tmp_path / "b.tif", signed, photometric="minisblack")
    assert differs(tmp_path / "b.tif", expected) == 0


def test_tiff_of_twelve_bits(tmp_path: Path) -> None:
    packed = np.zeros((24, 48), np.uint8)
    packed[:, 0::3] = RAMP[:, 0::2] >> 4
    packed[:, 1::3] = (RAMP[:, 0::2] & 15) << 4 | RAMP[:, 1::2] >> 8
    packed[:, 2::3] = RAMP[:, 1::2] & 255
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(packed, photometric="minisblack")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as opened:
        tags = opened.pages[0].tags
        for name, value in (("BitsPerSample", 12), ("ImageWidth", 32)):
            place = tags[name].valueoffset
            content[place : place + 2] = value.to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(bytes(content))
    assert differs(tmp_path / "a.tif", EXPECTED) <= 1


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_tiff_is_refused(tmp_path: Path, channels: int) -> None:
    values = np.dstack([RAMP] * channels)
    extra: dict[str, Any] = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", **extra)
    with pytest.raises(UndecodableImage, match=r"TIFF file in colour with 16 bits.*\.npy"):
        decode_image(tmp_path / "a.tif")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", ["grey", "grey_alpha", "rgb", "rgba"])
def test_png_of_sixteen_bits(tmp_path: Path, colour: str, interlaced: bool) -> None:
    opaque = np.full_like(RAMP, 65535)
    planes = [RAMP] * (3 if "rgb" in colour else 1) + [opaque] * ("a" in colour[3:])
    path = tmp_path / "a.png"
    for filters in ((0,), (1, 2), (3,), (4, 0, 1, 2, 3, 4)):
        path.write_bytes(
            make_png(np.dstack(planes), colour, filters=filters, interlaced=interlaced)
        )
        assert differs(path, EXPECTED) <= 1
        assert np.abs(decode_image(path, "rgb")[1].numpy() - EXPECTED).max() <= 1


def test_sixteen_bit_colour_channels_share_their_range(tmp_path: Path) -> None:
    pixels = np.dstack([RAMP, RAMP // 2, 4020 - RAMP])
    (tmp_path / "a.png").write_bytes(make_png(pixels, "rgb", filters=(4,)))
    expected = pixels.transpose(2, 0, 1) * (255 / 4020)
    assert np.abs(decode_image(tmp_path / "a.png", "rgb").numpy() - expected).max() <= 1
    luma = np.array([0.299, 0.587, 0.114]) @ expected.reshape(3, -1)
    assert differs(tmp_path / "a.png", luma.reshape(RAMP.shape)) <= 1.5


def test_sixteen_bit_transparency_is_composited_over_black(tmp_path: Path) -> None:
    alpha = np.full_like(RAMP, 65535)
    alpha[:, :8], alpha[:, 8:16] = 0, 32768
    values = RAMP.copy()
    values[:, :8] = 60000  # transparent pixels, which do not count for the range
    seen = values[:, 8:]
    weights = np.array(alpha / 65535)
    expected = (values.clip(seen.min(), seen.max()) - seen.min()) * (255 / np.ptp(seen)) * weights
    for colour, planes in (("grey_alpha", [values]), ("rgba", [values] * 3)):
        path = tmp_path / "a.png"
        path.write_bytes(make_png(np.dstack([*planes, alpha]), colour))
        assert differs(path, expected) <= 1
    key = int(RAMP[3, 4])
    for colour, count in (("grey", 1), ("rgb", 3)):
        extra = chunk(b"tRNS", key.to_bytes(2, "big") * count)
        path.write_bytes(make_png(np.dstack([RAMP] * count), colour, extra=extra))
        found = decode_image(path)[0].numpy()
        transparent = np.equal(RAMP, key)
        assert not found[transparent].any()
        assert np.abs(found - EXPECTED)[~transparent].max() <= 1


def test_changed_bytes_of_a_png_are_found(tmp_path: Path) -> None:
    """With uncompressed data the decoder would show them."""
    content = make_png(np.random.default_rng(0).integers(0, 256, (40, 40, 1)), "grey", depth=8)
    (tmp_path / "a.png").write_bytes(content)
    assert decode_image(tmp_path / "a.png").shape == (1, 40, 40)
    place = len(content) // 2
    (tmp_path / "a.png").write_bytes(content[:place] + b"\x55\xaa" + content[place + 2 :])
    with pytest.raises(
        UndecodableImage, match=r"cut short.*check sum of its chunk 'IDAT' is wrong"
    ):
        decode_image(tmp_path / "a.png")


def test_array_files_in_any_layout(tmp_path: Path) -> None:
    for order, kind in product("CF", ("<u2", ">u2", ">i4", "<f8", "<f2")):
        np.save(tmp_path / "a.npy", np.array(RAMP // 2, dtype=kind, order=order))  # type: ignore[call-overload]
        assert differs(tmp_path / "a.npy", EXPECTED) <= 1.2
    (tmp_path / "a.npy").rename(tmp_path / "a")
    assert differs(tmp_path / "a", EXPECTED) <= 1.2


SYNTAXES = ["", RLELossless, JPEG2000Lossless, JPEGLSLossless]


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, False), (12, True)])
def test_dicom(tmp_path: Path, syntax: str, bits: int, signed: bool, interpretation: str) -> None:
    stored = np.tile(RAMP // 16 if bits == 8 else RAMP, (3, 3))
    pixels = stored.astype(np.uint8 if bits == 8 else np.uint16)
    if signed:
        pixels = pixels.astype(np.int16) - np.int16(2000)
    elements: dict[str, Any] = {"PhotometricInterpretation": interpretation}
    path = make_dicom(tmp_path / "a.dcm", pixels, syntax, BitsStored=bits, **elements)
    assert differs(path, shown(pixels, **elements)) <= 0.5 + 1e-6
