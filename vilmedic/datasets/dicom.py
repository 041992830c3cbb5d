"""From a DICOM file to the 8-bit picture that a radiologist is shown.

Grey values take the way that the standard prescribes (PS3.3 C.11, C.7.6.3.1.2): stored values, the
modality table or rescale slope and intercept, the VOI table or the first window, and inversion of
MONOCHROME1, so that bones are bright on dark. A file with neither table nor window shows its whole
range of values, and so does one whose table or window cannot be read. Padding around the picture is
black. Of several frames the first one is taken.

pydicom and the decoders of compressed files are the optional dependency `dicom`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
HEAD = 132
"""Bytes at the start of a file that hold the mark of the format."""
DICOM_REMEDY = "DICOM files need pydicom and its decoders: pip install '.[dicom]' in the clone."


class UnreadableDicom(Exception):
    """What a DICOM file lacks, in words that follow its name."""


def is_marked(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file bear the mark of the format."""
    return head[128:HEAD] == b"DICM"


def is_dicom(path: str | Path) -> bool:
    """Whether a file is named as DICOM or marked so: many have no suffix, or a number for one.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.splitext(path)[1].lower() in DICOM_SUFFIXES:
        return True
    with open(path, "rb") as file:
        return is_marked(file.read(HEAD))


def dicom_available() -> bool:
    """Whether DICOM files can be read here."""
    return find_spec("pydicom") is not None


def dicom_pixels(file: IO[bytes]) -> np.ndarray:
    """Read the picture in an open DICOM file.

    Returns:
        uint8 [H, W] for grey pictures, [H, W, 3] (red, green, blue) for coloured ones.

    Raises:
        UnreadableDicom: pydicom or a decoder is missing, or the file holds no picture.
        Exception: whatever else the decoders raise on damaged files.
    """
    if not dicom_available():
        raise UnreadableDicom(f": {DICOM_REMEDY}")
    data = _read(file)
    values = _stored_values(data)
    interpretation = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    if interpretation == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        values = np.asarray(apply_color_lut(values, data))
        return _high_byte(values, 8 * values.dtype.itemsize)[..., :3]
    if values.ndim == 3:
        return _high_byte(values, int(data.BitsStored))
    if not np.issubdtype(values.dtype, np.integer) or int(data.BitsStored) > 16:
        return _Grey(data).shown(values.astype(np.float64), np.ones(values.shape, bool))
    lowest = int(values.min())  # from here on once for each grey value rather than for each pixel
    counts = np.bincount((values - lowest).ravel())
    levels = np.arange(lowest, lowest + len(counts), dtype=np.float64)
    return _Grey(data).shown(levels, counts > 0)[values - lowest]


def _read(file: IO[bytes]) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import ImplicitVRLittleEndian

    try:
        data = pydicom.dcmread(file)
    except InvalidDicomError:  # some archives hold files without their first 132 bytes
        file.seek(0)
        data = pydicom.dcmread(file, force=True)
    if "Rows" not in data or not any(
        name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    ):
        raise UnreadableDicom("is no DICOM file with a picture in it, or ends too early.")
    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return data


def _stored_values(data: Any) -> np.ndarray:
    """The pixels of the first frame: [H, W] (integers of 16 bits as int32) or RGB [H, W, 3]."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise UnreadableDicom(f"is compressed as {syntax.name}. {DICOM_REMEDY}")
    values = np.asarray(pixel_array(data, index=0))
    if values.ndim == 2 and np.issubdtype(values.dtype, np.integer) and values.itemsize <= 2:
        return values.astype(np.int32)
    return values


def _high_byte(values: np.ndarray, bits: int) -> np.ndarray:
    shift = bits - 8
    shifted = values >> shift if shift >= 0 else values << -shift
    return shifted.astype(np.uint8)


class _Grey:
    """How the grey values of one file are shown."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def shown(self, stored: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Stored values as uint8.

        Args:
            stored: float64 values of any shape.
            present: which of them the picture has; the range of a file without a window is theirs.
        """
        padding = self._padding(stored)
        values = self._modality(stored)
        share = self._voi(values)
        if share is None:
            share = _range_share(values, present & ~padding)
        if str(self.data.get("PhotometricInterpretation", "")) == "MONOCHROME1":
            share = 1 - share
        share[padding] = 0
        return np.rint(share * 255).astype(np.uint8)

    def _padding(self, stored: np.ndarray) -> np.ndarray:
        first = self._stored("PixelPaddingValue")
        if first is None:
            return np.zeros(stored.shape, bool)
        last = self._stored("PixelPaddingRangeLimit")
        last = first if last is None else last
        return (stored >= min(first, last)) & (stored <= max(first, last))

    def _modality(self, stored: np.ndarray) -> np.ndarray:
        tables = self.data.get("ModalityLUTSequence")
        if tables:
            signed = bool(self.data.get("PixelRepresentation", 0))
            return _looked_up(stored, tables[0], signed)[0]
        slope = self._number("RescaleSlope") or 1.0
        return stored * slope + (self._number("RescaleIntercept") or 0.0)

    def _voi(self, values: np.ndarray) -> np.ndarray | None:
        """Values as shares of white; None when the file does not say how to show them."""
        for table in self.data.get("VOILUTSequence") or ():
            try:
                output, top = _looked_up(values, table, bool(values.size and values.min() < 0))
            except Exception:  # an item without data, or with too little of it
                continue
            return output / top
        centre, width = self._number("WindowCenter"), self._number("WindowWidth")
        function = str(self.data.get("VOILUTFunction") or "LINEAR")
        if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
            return None  # such windows occur, and the standard forbids them
        if function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
        if function == "LINEAR_EXACT":
            return np.clip((values - centre) / width + 0.5, 0, 1)
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)

    def _stored(self, name: str) -> float | None:
        """An element that is a stored value; those of signed pixels are often written unsigned."""
        value = self._number(name)
        if value is None or not self.data.get("PixelRepresentation", 0):
            return value
        bits = int(self.data.get("BitsAllocated", 16))
        return value - 2**bits if value >= 2 ** (bits - 1) else value

    def _number(self, name: str) -> float | None:
        """The first number of an element; None without one that can be read."""
        try:
            value = _first(self.data.get(name))
        except Exception:  # pydicom decodes an element when it is asked for
            return None
        return value if value is not None and np.isfinite(value) else None


def _range_share(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UnreadableDicom("holds values that are not finite numbers.")
    if not counted.any():
        return np.zeros(values.shape)
    low, high = values[counted].min(), values[counted].max()
    if low == high:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0, 1)


def _looked_up(values: np.ndarray, table: Any, signed: bool) -> tuple[np.ndarray, int]:
    """The entries of a table for some values, and the largest entry that it could have."""
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = entries or 2**16  # the field has 16 bits only
    if signed and first >= 2**15:
        first -= 2**16
    content = table.LUTData
    if isinstance(content, bytes):
        entry = np.dtype("u1") if len(content) < 2 * entries else np.dtype("<u2")
        output = np.frombuffer(content, entry)
    else:
        output = np.atleast_1d(np.asarray(content, dtype=np.int64))
        if 2 * len(output) == entries + entries % 2:  # two entries of 8 bits in each number
            output = output.astype("<u2").view("u1")
    if len(output) < entries:
        raise UnreadableDicom(f"has a table of {len(output)} instead of {entries} entries.")
    places = np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)
    return output[places].astype(np.float64), 2**bits - 1


def _first(value: Any) -> float | None:
    """The first of several values of an element, or its only one."""
    if value is None or value == "":
        return None
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return float(value)
    return float(value[0]) if len(value) else None
