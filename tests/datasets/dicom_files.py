"""Write small DICOM files, and compute their display values by the standard (PS3.3 C.11)."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    generate_uid,
)


def make_dicom(
    path: Path, pixels: np.ndarray, syntax: str = "", *, big_endian: bool = False, **elements: Any
) -> Path:
    """Write pixels [H, W] or [H, W, 3] as stored values, with any other elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["test"])
    meta.TransferSyntaxUID = ExplicitVRBigEndian if big_endian else ExplicitVRLittleEndian
    order = {"is_implicit_VR": False, "is_little_endian": not big_endian}
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128, **order)
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    for name, value in elements.items():
        setattr(data, name, value)
    if "HighBit" not in data:
        data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    if syntax:
        data.compress(syntax, generate_instance_uid=False)
    data.save_as(path, enforce_file_format=True)
    return path


def make_jpeg_dicom(path: Path, rgb: np.ndarray) -> Path:
    """Write a colour image in lossy JPEG, as in ultrasound and photographs."""
    content = io.BytesIO()
    Image.fromarray(rgb).save(content, "JPEG", quality=98, subsampling=0)
    make_dicom(path, rgb, PhotometricInterpretation="YBR_FULL_422")
    import pydicom

    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.PixelData = encapsulate([content.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.save_as(path, enforce_file_format=True)
    return path


def table(entries: list[int], first: int, bits: int) -> Dataset:
    """A lookup table item of a sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return item


def shown(stored: np.ndarray, **elements: Any) -> np.ndarray:
    """Display values of stored values in 0..255, by the formulas of the standard."""
    inverted = elements.get("PhotometricInterpretation") == "MONOCHROME1"
    padding = elements.get("PixelPaddingValue")
    limit = elements.get("PixelPaddingRangeLimit", padding)
    modality = [[_modality(int(v), elements) for v in row] for row in stored]
    padded = [[padding is not None and padding <= int(v) <= limit for v in row] for row in stored]
    seen = [
        value
        for values, flags in zip(modality, padded, strict=True)
        for value, flag in zip(values, flags, strict=True)
        if not flag
    ]
    result = np.zeros(stored.shape)
    for row, values in enumerate(modality):
        for column, value in enumerate(values):
            if padded[row][column]:
                continue
            grey = 255 * _voi(value, elements, min(seen), max(seen))
            result[row, column] = 255 - grey if inverted else grey
    return result


def _modality(stored: int, elements: dict[str, Any]) -> float:
    if "ModalityLUTSequence" in elements:
        return _entry(stored, elements["ModalityLUTSequence"][0])[0]
    return float(elements.get("RescaleSlope", 1)) * stored + float(
        elements.get("RescaleIntercept", 0)
    )


def _entry(value: float, item: Dataset) -> tuple[float, float]:
    count, first, bits = item.LUTDescriptor
    entries = list(item.LUTData)
    place = 0 if value <= first else count - 1 if value >= first + count else int(value) - first
    return float(entries[place]), 2.0**bits - 1


def _voi(x: float, elements: dict[str, Any], low: float, high: float) -> float:
    if "VOILUTSequence" in elements:
        output, top = _entry(x, elements["VOILUTSequence"][0])
        return output / top
    if "WindowCenter" not in elements:
        return (x - low) / (high - low) if high > low else 0.0
    centres, widths = elements["WindowCenter"], elements["WindowWidth"]
    c = float(centres[0] if isinstance(centres, list) else centres)
    w = float(widths[0] if isinstance(widths, list) else widths)
    function = elements.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + math.exp(-4 * (x - c) / w))
    if function == "LINEAR_EXACT":
        if x <= c - w / 2:
            return 0.0
        return 1.0 if x > c + w / 2 else (x - c) / w + 0.5
    if x <= c - 0.5 - (w - 1) / 2:
        return 0.0
    if x > c - 0.5 + (w - 1) / 2:
        return 1.0
    return (x - (c - 0.5)) / (w - 1) + 0.5
