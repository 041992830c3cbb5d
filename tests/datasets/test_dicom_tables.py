"""DICOM lookup tables whose descriptor contradicts their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_voi_lut

from tests.datasets.dicom_files import make_dicom, shown
from vilmedic.datasets.decode import decode_file, decode_image

RAMP = np.add.outer(np.arange(12) * 90, np.arange(16) * 130).astype(np.uint16)  # up to 2940
SIGNED = RAMP.astype(np.int16) - 1500


def curve(bits: int, count: int = 3000) -> list[int]:
    """A table from black to white with the given bits."""
    return [int((2**bits - 1) * (n / (count - 1)) ** 2) for n in range(count)]


def table(entries: list[int], first: int, bits: int, kind: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    item.add_new("LUTData", kind, entries)
    return item


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    with open(path, "rb") as file:
        return decode_file(file, str(path), notes=notes)[0].numpy().astype(float), notes


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("holds", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("says", [8, 10, 12, 14, 16])
def test_the_bits_of_the_data_override_the_descriptor(
    tmp_path: Path, says: int, holds: int, interpretation: str
) -> None:
    elements: dict[str, Any] = {"PhotometricInterpretation": interpretation}
    path = tmp_path / "a.dcm"
    make_dicom(path, RAMP, VOILUTSequence=[table(curve(holds), 0, says)], **elements)
    found, notes = read(path)
    elements["VOILUTSequence"] = [table(curve(holds), 0, holds)]
    assert np.abs(found - shown(RAMP, **elements)).max() <= 0.5 + 1e-6
    expected = [] if says == holds else [f"its VOI table states {says} bits and holds {holds}"]
    assert notes == expected
    if says == holds > 8:  # pydicom reads 16-bit entries of an 8-bit table as bytes
        pydicoms = apply_voi_lut(RAMP, pydicom.dcmread(path)) * (255 / (2**holds - 1))
        if interpretation == "MONOCHROME1":
            pydicoms = 255 - pydicoms
        assert np.abs(found - pydicoms).max() <= 0.5 + 1e-6


def test_a_nearly_filled_bit_range_is_accepted(tmp_path: Path) -> None:
    """A dark table stays dark, and an excess entry is cut off."""
    for factor, top in ((0.3, 4095), (1.0, 4096)):
        entries = [int(top * factor * n / 2999) for n in range(3000)]
        path = make_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[table(entries, 0, 12)])
        found, notes = read(path)
        expected = np.clip(np.array(entries)[RAMP] * (255 / 4095), 0, 255)
        assert np.abs(found - expected).max() <= 0.5 + 1e-6
        assert notes == []


def test_first_value_written_in_the_stored_bits(tmp_path: Path) -> None:
    """-2048 written as 2048, its representation in twelve signed bits."""
    pixels, stored = RAMP.astype(np.int16) - 2048, {"BitsStored": 12, "HighBit": 11}
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        right = make_dicom(tmp_path / "a.dcm", pixels, **{name: [table(curve(12), -2048, 12)]})
        given = {name: [table(curve(12), 2048, 12)]}
        found, notes = read(make_dicom(tmp_path / "b.dcm", pixels, **given, **stored))
        assert np.array_equal(found, read(right)[0])
        assert found.min() == 0
        assert found.max() > 200
        assert [note.partition(" table ")[2] for note in notes] == ["begins at -2048, not at 2048"]


@pytest.mark.parametrize("first", [-1400, 64136])
def test_sign_of_the_first_value(tmp_path: Path, first: int) -> None:
    """-1400 written signed or unsigned, for signed and unsigned pixels."""
    right = {"VOILUTSequence": [table(curve(12), -1400, 12)]}
    given = {"VOILUTSequence": [table(curve(12), first, 12)]}
    path = make_dicom(tmp_path / "a.dcm", SIGNED, **given)
    assert np.abs(read(path)[0] - shown(SIGNED, **right)).max() <= 0.5 + 1e-6
    shifted = {"RescaleIntercept": -1500, "RescaleSlope": 1}
    path = make_dicom(tmp_path / "b.dcm", RAMP, **given, **shifted)
    assert np.abs(read(path)[0] - shown(SIGNED, **right)).max() <= 0.5 + 1e-6


def test_first_value_of_large_pixels_written_as_negative(tmp_path: Path) -> None:
    pixels = RAMP + np.uint16(40000)
    path = make_dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=[table(curve(12), -25536, 12)])
    found, notes = read(path)
    expected = shown(RAMP, VOILUTSequence=[table(curve(12), 0, 12)])
    assert np.abs(found - expected).max() <= 0.5 + 1e-6
    assert notes == ["its VOI table begins at 40000, not at -25536"]


def test_entries_written_as_negative(tmp_path: Path) -> None:
    entries = [value if value < 2**15 else value - 2**16 for value in curve(16)]
    given = table(entries, 0, 16, "SS")
    path = make_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[given])
    found, notes = read(path)
    expected = shown(RAMP, VOILUTSequence=[table(curve(16), 0, 16)])
    assert np.abs(found - expected).max() <= 0.5 + 1e-6
    assert notes == ["its VOI table holds unsigned entries, written otherwise"]


def test_modality_table_of_negative_values_written_as_unsigned(tmp_path: Path) -> None:
    """-1024 to 2000: if read as unsigned, air would be brighter than bone."""
    values = np.linspace(-1024, 2000, 3000).astype(int)
    window = {"WindowCenter": 400, "WindowWidth": 2000}
    for kind, entries in (("US", values & 0xFFFF), ("SS", values)):
        item = table(entries.tolist(), 0, 16, kind)
        path = make_dicom(tmp_path / "a.dcm", RAMP, ModalityLUTSequence=[item], **window)
        found, notes = read(path)
        share = np.clip((values[RAMP] - 399.5) / 1999 + 0.5, 0, 1)
        assert np.abs(found - share * 255).max() <= 0.5 + 1e-6
        assert bool(notes) == (kind == "US")


def test_a_steep_table_is_not_read_as_negative(tmp_path: Path) -> None:
    entries = [0] * 1500 + [65535] * 1500
    path = make_dicom(tmp_path / "a.dcm", RAMP, VOILUTSequence=[table(entries, 0, 16)])
    found, notes = read(path)
    assert np.array_equal(found, np.where(RAMP >= 1500, 255, 0))
    assert notes == []


def test_number_of_entries_written_as_negative(tmp_path: Path) -> None:
    entries = curve(12, 40000)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [40000, 0, 12])
    item.add_new("LUTData", "OW", np.array(entries, "<u2").tobytes())
    path = make_dicom(tmp_path / "a.dcm", RAMP * 13, VOILUTSequence=[item])
    head = b"\x28\x00\x02\x30"
    path.write_bytes(path.read_bytes().replace(head + b"US", head + b"SS"))
    expected = np.array(entries)[RAMP.astype(int) * 13] * (255 / 4095)
    assert np.abs(read(path)[0] - expected).max() <= 0.5 + 1e-6


def test_table_in_a_big_endian_file(tmp_path: Path) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [3000, 0, 12])
    item.add_new("LUTData", "OW", np.array(curve(12), ">u2").tobytes())
    path = make_dicom(
        tmp_path / "a.dcm", RAMP.astype(">u2"), big_endian=True, VOILUTSequence=[item]
    )
    expected = shown(RAMP, VOILUTSequence=[table(curve(12), 0, 12)])
    assert np.abs(read(path)[0] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("says", [8, 16])
@pytest.mark.parametrize("holds", [8, 16])
def test_palette(tmp_path: Path, says: int, holds: int) -> None:
    pixels = (RAMP // 12).astype(np.uint8)
    tops = {"Red": 1.0, "Green": 0.5, "Blue": 0.25}
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, share in tops.items():
        entries = np.linspace(0, (2**holds - 1) * share, 256).astype("<u2")
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, says]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    path = make_dicom(tmp_path / "a.dcm", pixels, **elements)
    found = decode_image(path, "rgb").numpy().astype(float)
    for plane, share in zip(found, tops.values(), strict=True):
        assert np.abs(plane - pixels * share).max() <= 1.01
    assert bool(read(path)[1]) == (says != holds)


@pytest.mark.parametrize("written", [63536, 2096, -2000])
def test_padding_of_signed_pixels_of_twelve_bits(tmp_path: Path, written: int) -> None:
    """-2000 with the bits of the element, with the stored bits, and signed."""
    pixels = SIGNED.copy()
    pixels[:, :3] = -2000
    path = make_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, PixelPaddingValue=0)
    data = pydicom.dcmread(path)
    kind = "SS" if written < 0 else "US"
    data["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", kind, written)
    data.save_as(path)
    assert np.abs(read(path)[0] - shown(pixels, PixelPaddingValue=-2000)).max() <= 0.5 + 1e-6


def test_sizes_are_checked_before_decoding(tmp_path: Path) -> None:
    from vilmedic.datasets.decode import UndecodableImage

    path = make_dicom(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(path)
    data.Rows = data.Columns = 65535
    data.save_as(path)
    with pytest.raises(UndecodableImage, match=r"65535 x 65535 pixels, more than max_pixels=1342"):
        decode_image(path)
    path = make_dicom(tmp_path / "b.dcm", np.tile(RAMP, (4, 4)), pydicom.uid.JPEG2000Lossless)
    with pytest.raises(UndecodableImage, match=r"48 x 64 pixels, more than max_pixels=3000"):
        decode_image(path, max_pixels=3000)
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\x4f\xff\x51") + 8
    content[at : at + 8] = (10**6).to_bytes(4, "big") * 2
    path.write_bytes(content)
    with pytest.raises(UndecodableImage, match="1000000 x 1000000 pixels, more than max_pixels"):
        decode_image(path)
