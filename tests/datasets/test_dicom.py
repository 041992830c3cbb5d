from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import (
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from tests.datasets.dicom_files import make_dicom, make_jpeg_dicom, shown, table
from vilmedic.datasets import decode
from vilmedic.datasets.decode import UndecodableImage, decode_file, decode_image

REAL = Path(
    os.environ.get("VILMEDIC_REAL_DATA", Path(__file__).parents[3] / "shared" / "data")
).resolve()
RAMP = np.add.outer(np.arange(12) * 90, np.arange(16) * 130).astype(np.uint16)  # up to 2940
SIGNED = RAMP.astype(np.int16) - 1500
BYTES = (RAMP // 12).astype(np.uint8)
CURVE = [int(4095 * (n / 3000) ** 2) for n in range(3000)]


@pytest.mark.parametrize(
    ("pixels", "elements"),
    [
        (RAMP, {}),
        (BYTES, {}),
        (SIGNED, {}),
        (BYTES.astype(np.int8), {}),
        (RAMP, {"BitsStored": 12}),
        (RAMP, {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"}),
        (RAMP, {"RescaleSlope": 2.5, "RescaleIntercept": -1024}),
        (RAMP, {"WindowCenter": 1500, "WindowWidth": 2000}),
        (RAMP, {"WindowCenter": [1200, 2000], "WindowWidth": [900, 100]}),
        (RAMP, {"WindowCenter": 1500, "WindowWidth": 1}),
        (RAMP, {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "SIGMOID"}),
        (RAMP, {"WindowCenter": 1500, "WindowWidth": 800, "VOILUTFunction": "LINEAR_EXACT"}),
        (SIGNED, {"WindowCenter": -200, "WindowWidth": 1100}),
        (SIGNED, {"BitsStored": 12, "RescaleSlope": 0.5, "RescaleIntercept": 10}),
        (
            SIGNED,
            {
                "RescaleSlope": -1,
                "RescaleIntercept": 100,
                "WindowCenter": 300.5,
                "WindowWidth": 900.25,
                "PhotometricInterpretation": "MONOCHROME1",
            },
        ),
        (RAMP, {"VOILUTSequence": [table(CURVE, 0, 12), table([0, 1], 0, 8)]}),
        (RAMP, {"VOILUTSequence": [table(CURVE[2000:], 500, 12)]}),
        (SIGNED, {"VOILUTSequence": [table(CURVE, -1400, 12)]}),
        (RAMP, {"ModalityLUTSequence": [table(CURVE, 0, 16)]}),
        (
            RAMP,
            {
                "ModalityLUTSequence": [table(CURVE[::-1], 0, 16)],
                "WindowCenter": 2000,
                "WindowWidth": 3000,
                "PhotometricInterpretation": "MONOCHROME1",
            },
        ),
        (RAMP, {"PixelPaddingValue": 0}),
        (RAMP, {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 700}),
        (RAMP, {"PixelPaddingValue": 2940, "PhotometricInterpretation": "MONOCHROME1"}),
    ],
)
def test_grey_values_follow_the_standard(
    tmp_path: Path, pixels: np.ndarray, elements: dict[str, Any]
) -> None:
    path = make_dicom(tmp_path / "a.dcm", pixels, **elements)
    expected = shown(pixels, **elements)
    assert expected.max() > 200  # the image is not black
    grey = decode_image(path)[0].numpy().astype(float)
    assert np.abs(grey - expected).max() <= 0.5 + 1e-6
    rgb = decode_image(path, "rgb").numpy()
    assert all(np.array_equal(channel, grey) for channel in rgb)


@pytest.mark.parametrize("width", [0, -3, 0.5])
def test_invalid_window_is_ignored(tmp_path: Path, width: float) -> None:
    path = make_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=100, WindowWidth=width)
    assert np.abs(decode_image(path)[0].numpy() - shown(RAMP)).max() <= 0.5


def test_padding_uses_the_stored_bits(tmp_path: Path) -> None:
    """-56 stored as the unsigned byte 200."""
    pixels = np.array([[-56, -56, 0, 10], [-56, 20, 30, 40]], dtype=np.int8)
    path = make_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=0)
    data = pydicom.dcmread(path)
    data["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "US", 200)
    data.save_as(path)
    found = decode_image(path)[0].numpy()
    assert not found[pixels == -56].any()
    assert found[0].tolist()[2:] == [0, 64]  # a quarter of the range without padding


def test_padding_of_signed_pixels_written_as_unsigned(tmp_path: Path) -> None:
    pixels = SIGNED.copy()
    pixels[:, :3] = -2000
    path = make_dicom(tmp_path / "a.dcm", pixels, PixelPaddingValue=0)
    data = pydicom.dcmread(path)
    data["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "US", 63536)
    data.save_as(path)
    expected = shown(pixels, PixelPaddingValue=-2000)
    assert np.abs(decode_image(path)[0].numpy() - expected).max() <= 0.5


def raw_element(path: Path, name: str, value: bytes) -> None:
    """Write bytes that are not a number into an element of a file."""
    data = pydicom.dcmread(path)
    tag = pydicom.tag.Tag(name)
    data[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(value), value, 0, False, True)
    data.save_as(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["WindowCenter", "WindowWidth", "RescaleSlope"])
@pytest.mark.parametrize("value", [b"1,5 ", b"nan ", b"auto"])
def test_non_numeric_values_are_ignored(tmp_path: Path, name: str, value: bytes) -> None:
    elements = {"WindowCenter": 900, "WindowWidth": 700, "RescaleSlope": 2}
    path = make_dicom(tmp_path / "a.dcm", RAMP, **elements)
    raw_element(path, name, value)
    if name == "RescaleSlope":
        del elements[name]
    else:
        del elements["WindowCenter"], elements["WindowWidth"]
    assert np.abs(decode_image(path)[0].numpy() - shown(RAMP, **elements)).max() <= 0.5


@pytest.mark.parametrize("lacking", ["LUTData", "LUTDescriptor", "half"])
def test_a_table_without_data_falls_back_to_the_window(tmp_path: Path, lacking: str) -> None:
    window = {"WindowCenter": 900, "WindowWidth": 700}
    item = table(CURVE, 0, 12)
    if lacking == "half":
        item.LUTData = CURVE[:100]
    else:
        delattr(item, lacking)
    path = make_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[item], **window)
    notes: list[str] = []
    with open(path, "rb") as file:
        found = decode_file(file, str(path), notes=notes)[0].numpy()
    assert np.abs(found - shown(RAMP, **window)).max() <= 0.5
    assert notes == ["its VOI table cannot be read and does not count"]


def test_constant_image_is_black(tmp_path: Path) -> None:
    assert decode_image(make_dicom(tmp_path / "a.dcm", RAMP * 0 + 900)).sum() == 0
    path = make_dicom(tmp_path / "b.dcm", RAMP * 0 + 900, PixelPaddingValue=900)
    assert decode_image(path).sum() == 0


def test_bits_outside_the_stored_ones_are_ignored(tmp_path: Path) -> None:
    for pixels, low in ((RAMP, RAMP), (SIGNED, SIGNED & 0x0FFF)):
        overlaid = (low.astype(np.uint16) & 0x0FFF) | np.uint16(0x8000)
        stored = overlaid.astype(pixels.dtype)
        path = make_dicom(tmp_path / "a.dcm", stored, BitsStored=12)
        assert np.abs(decode_image(path)[0].numpy() - shown(pixels)).max() <= 0.5


def test_table_of_bytes(tmp_path: Path) -> None:
    entries = [int(255 * (n / 255) ** 2) for n in range(256)]
    item = table(entries, 0, 8)
    packed = np.array(entries, np.uint8).view("<u2")
    packed_item = table(packed.tolist(), 0, 8)
    packed_item.LUTDescriptor = [256, 0, 8]
    expected = shown(BYTES, VOILUTSequence=[item])
    for one in (item, packed_item):
        path = make_dicom(tmp_path / "a.dcm", BYTES, VOILUTSequence=[one])
        assert np.abs(decode_image(path)[0].numpy() - expected).max() <= 0.5


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("pixels", [RAMP, SIGNED, BYTES])
def test_compressed_files_decode_the_same(tmp_path: Path, syntax: str, pixels: np.ndarray) -> None:
    elements = {"WindowCenter": 300, "WindowWidth": 2000}
    pixels = np.tile(pixels, (4, 4))
    path = make_dicom(tmp_path / "a.dcm", pixels, syntax, **elements)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    expected = shown(pixels, **elements)
    assert np.abs(decode_image(path)[0].numpy() - expected).max() <= 0.5


def test_lossless_jpeg_of_older_archives(tmp_path: Path) -> None:
    gdcm = pytest.importorskip("gdcm")
    plain = make_dicom(tmp_path / "a.dcm", RAMP, WindowCenter=1500, WindowWidth=2000)
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(tmp_path / "b.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(tmp_path / "b.dcm").file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert np.array_equal(decode_image(tmp_path / "b.dcm", thorough=True), decode_image(plain))


def test_big_endian(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", RAMP.astype(">u2"), big_endian=True)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == ExplicitVRBigEndian
    assert np.abs(decode_image(path)[0].numpy() - shown(RAMP)).max() <= 0.5


COLOUR = np.dstack([BYTES, BYTES[::-1], 255 - BYTES])


def test_colour(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", COLOUR)
    assert np.array_equal(decode_image(path, "rgb"), COLOUR.transpose(2, 0, 1))
    luma = COLOUR.astype(float) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode_image(path)[0].numpy() - luma).max() <= 1
    planes = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).reshape(12, 16, 3)
    path = make_dicom(tmp_path / "b.dcm", planes, PlanarConfiguration=1)
    assert np.array_equal(decode_image(path, "rgb"), COLOUR.transpose(2, 0, 1))
    wide = make_dicom(tmp_path / "c.dcm", COLOUR.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(wide, "rgb"), COLOUR.transpose(2, 0, 1))


def test_colour_as_luma_and_chroma(tmp_path: Path) -> None:
    ycc = np.array(Image.fromarray(COLOUR).convert("YCbCr"))
    path = make_dicom(tmp_path / "a.dcm", ycc, PhotometricInterpretation="YBR_FULL")
    expected = COLOUR.transpose(2, 0, 1).astype(float)
    assert np.abs(decode_image(path, "rgb").numpy() - expected).max() <= 3
    smooth = np.array(Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.BICUBIC))
    path = make_jpeg_dicom(tmp_path / "b.dcm", smooth)
    difference = decode_image(path, "rgb").numpy() - smooth.transpose(2, 0, 1).astype(float)
    assert np.abs(difference).mean() < 2


def test_palette(tmp_path: Path) -> None:
    names = ["Red", "Green", "Blue"]
    tables = {
        name: np.arange(256, dtype=np.uint16)[:: 1 - 2 * (name == "Blue")] * 257 for name in names
    }
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in tables.items():
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = entries.astype("<u2").tobytes()
    path = make_dicom(tmp_path / "a.dcm", BYTES, **elements)
    expected = np.stack([BYTES, BYTES, 255 - BYTES])
    assert np.array_equal(decode_image(path, "rgb"), expected)


def test_first_of_several_frames(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(path)
    data.NumberOfFrames = 2
    data.PixelData = RAMP.tobytes() + RAMP[::-1].tobytes()
    data.save_as(tmp_path / "b.dcm")
    assert np.array_equal(decode_image(tmp_path / "b.dcm"), decode_image(path))


def test_file_without_preamble_and_with_another_suffix(tmp_path: Path) -> None:
    path = make_dicom(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(path)
    bare = pydicom.Dataset()
    bare.update({element.tag: element for element in data})
    bare.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True)
    assert np.array_equal(decode_image(tmp_path / "b.dcm"), decode_image(path))
    path.rename(tmp_path / "1.2.840.77")
    assert np.array_equal(decode_image(tmp_path / "1.2.840.77"), decode_image(tmp_path / "b.dcm"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("syntax", ["", RLELossless, JPEG2000Lossless])
def test_truncated_files_are_errors(tmp_path: Path, syntax: str) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (64, 64)).astype(np.uint16)
    path = make_dicom(tmp_path / "a.dcm", noise, syntax)
    content = path.read_bytes()
    for share in (0.05, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UndecodableImage, match=str(path)):
            decode_image(path)


def test_files_without_an_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"x" * 300)
    with pytest.raises(UndecodableImage, match=r"a\.dcm"):
        decode_image(tmp_path / "a.dcm")
    data = pydicom.dcmread(make_dicom(tmp_path / "b.dcm", RAMP))
    del data.PixelData
    data.save_as(tmp_path / "b.dcm")
    with pytest.raises(UndecodableImage, match="not a DICOM file with an image"):
        decode_image(tmp_path / "b.dcm")


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_dicom(tmp_path / "a.dcm", RAMP)
    monkeypatch.setattr(decode, "dicom_available", lambda: False)
    with pytest.raises(UndecodableImage, match=r"a\.dcm: DICOM files need pydicom.*pip install"):
        decode_image(path)


def test_real_radiograph_shows_dense_tissue_bright() -> None:
    path = REAL / "dicom" / "RG1_J2KI.dcm"
    if not path.is_file():
        pytest.skip(f"no real data in {path} (set VILMEDIC_REAL_DATA)")
    image = decode_image(path)[0].float()
    assert image.shape == (1955, 1841)
    spine = image[1000:1200, 880:960].mean()
    lung = image[560:640, 500:600].mean()
    air = image[110:170, 30:120].mean()
    assert spine > lung + 40
    assert spine > air + 80
