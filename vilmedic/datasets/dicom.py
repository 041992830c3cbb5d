"""Decoding of DICOM files to the 8-bit image that a viewer would display.

Grey values follow the pipeline of the standard (PS3.3 C.11, C.7.6.3.1.2): stored values, the
modality table or rescale slope and intercept, the VOI table or the first window, and inversion of
MONOCHROME1, so that bones are bright on dark. A file without a readable table or window shows its
whole range of values. Padding around the image is black. Of several frames the first one is taken.

Headers of tables are often wrong. The contents of a table take precedence (see `_Table` and
`_white`): if its descriptor states other bits, or another sign of its first value or entries, the
image is displayed by the entries, with a note.

pydicom and the decoders of compressed files are the optional dependency `dicom`.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np


class UnreadableDicom(Exception):
    """Reason why a DICOM file cannot be read, as a phrase after its name."""


class NoDecoder(UnreadableDicom):
    """Compression of a file for which no decoder is installed."""


def dicom_pixels(
    content: bytes, *, max_pixels: int, thorough: bool = False, notes: list[str]
) -> np.ndarray:
    """Read the image in a DICOM file.

    Args:
        content: the file.
        max_pixels: rows times columns of the largest image that is decoded.
        thorough: read the data of lossy JPEG a second time for damage.
        notes: gets header values that the content contradicts.

    Returns:
        uint8 [H, W] for grey images, [H, W, 3] (red, green, blue) for coloured ones.

    Raises:
        UnreadableDicom: a decoder is missing, or the file holds no image.
        Exception: other errors of the decoders on damaged files.
    """
    data = _read(content, max_pixels)
    values = _stored_values(data, max_pixels, thorough)
    interpretation = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    if interpretation == "PALETTE COLOR":
        return _palette_colour(values, data, notes)
    if values.ndim == 3:
        return _high_byte(values, int(data.BitsStored))
    grey = _Grey(data, notes)
    if not np.issubdtype(values.dtype, np.integer) or int(data.BitsStored) > 16:
        return grey.shown(values.astype(np.float64), np.ones(values.shape, bool))
    lowest = int(values.min())  # from here on per grey value rather than per pixel
    counts = np.bincount((values - lowest).ravel())
    levels = np.arange(lowest, lowest + len(counts), dtype=np.float64)
    return grey.shown(levels, counts > 0)[values - lowest]


def _read(content: bytes, max_pixels: int) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import ImplicitVRLittleEndian

    file = io.BytesIO(content)
    _check_inflated(file, max_pixels)
    try:
        data = pydicom.dcmread(file)
    except InvalidDicomError:  # some archives hold files without their first 132 bytes
        file.seek(0)
        data = pydicom.dcmread(file, force=True)
    if "Rows" not in data or not any(
        name in data for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    ):
        raise UnreadableDicom("is not a DICOM file with an image, or is cut short.")
    if "TransferSyntaxUID" not in data.file_meta:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    _check_size(int(data.Rows), int(data.Columns), max_pixels)
    return data


def _check_size(rows: int, columns: int, max_pixels: int) -> None:
    if rows * columns > max_pixels:
        raise UnreadableDicom(f"has {rows} x {columns} pixels, more than max_pixels={max_pixels}.")


def _check_inflated(file: io.BytesIO, max_pixels: int) -> None:
    """Refuse a deflated file that becomes far larger than an image, before pydicom inflates it."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if read_preamble(file, force=True) is not None:
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            most, inflated = 6 * max_pixels + 2**26, 0  # 16-bit colour, and the header
            stream, rest = zlib.decompressobj(-zlib.MAX_WBITS), file.read()
            while rest and not stream.eof:
                inflated += len(stream.decompress(rest, 2**24))
                rest = stream.unconsumed_tail
                if inflated > most:
                    raise UnreadableDicom(f"inflates to more than {most} bytes.")
    file.seek(0)


def _stored_values(data: Any, max_pixels: int, thorough: bool) -> np.ndarray:
    """The pixels of the first frame: [H, W] (integers of 16 bits as int32) or RGB [H, W, 3]."""
    from pydicom.encaps import get_frame
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        decoder = get_decoder(syntax)
        if not decoder.is_available:
            raise NoDecoder(f"is compressed as {syntax.name}.")
        frame = get_frame(data.PixelData, 0, number_of_frames=int(data.get("NumberOfFrames") or 1))
        _check_size(*_frame_size(frame), max_pixels)
        if thorough and frame.startswith(b"\xff\xd8"):
            from vilmedic.datasets.jpeg_data import check_jpeg

            check_jpeg(frame)
    values = np.asarray(pixel_array(data, index=0))
    if values.ndim == 2 and np.issubdtype(values.dtype, np.integer) and values.itemsize <= 2:
        return values.astype(np.int32)
    return values


def _frame_size(frame: bytes) -> tuple[int, int]:
    """Rows and columns that the head of a JPEG, JPEG-LS or JPEG 2000 stream states; else 0."""
    if frame.startswith(b"\xff\x4f\xff\x51"):
        right, bottom, left, top = (
            int.from_bytes(frame[at : at + 4], "big") for at in range(8, 24, 4)
        )
        return bottom - top, right - left
    place = 2
    while frame.startswith(b"\xff\xd8") and place + 9 <= len(frame):
        kind = frame[place + 1]
        if frame[place] != 0xFF or kind == 0xDA:
            break
        if kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):
            return tuple(int.from_bytes(frame[at : at + 2], "big") for at in (place + 5, place + 7))  # type: ignore[return-value]
        place += 1 if kind == 0xFF else 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return 0, 0


def _high_byte(values: np.ndarray, bits: int) -> np.ndarray:
    shift = bits - 8
    shifted = values >> shift if shift >= 0 else values << -shift
    return shifted.astype(np.uint8)


class _Grey:
    """Grey-value transformation of one DICOM file."""

    def __init__(self, data: Any, notes: list[str]) -> None:
        self.data, self.notes = data, notes

    def shown(self, stored: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Stored values as uint8.

        Args:
            stored: float64 values of any shape.
            present: which of them occur in the image; they set the range without a window.
        """
        padding = self._padding(stored)
        counted = present & ~padding
        values = self._modality(stored, counted)
        share = self._voi(values, counted)
        if share is None:
            share = _range_share(values, counted)
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

    def _modality(self, stored: np.ndarray, counted: np.ndarray) -> np.ndarray:
        tables = self.data.get("ModalityLUTSequence")
        if tables:
            table = _Table.of_item(tables[0], self.data)
            signed = bool(self.data.get("PixelRepresentation", 0))
            output = table.looked_up(stored, stored[counted], signed, self._signed_bits())
            self._note("modality", table)
            return output
        slope = self._number("RescaleSlope") or 1.0
        return stored * slope + (self._number("RescaleIntercept") or 0.0)

    def _voi(self, values: np.ndarray, counted: np.ndarray) -> np.ndarray | None:
        """Return values as shares of white; None if the file does not say how to display them."""
        for item in self.data.get("VOILUTSequence") or ():
            try:
                table = _Table.of_item(item, self.data)
                signed = bool(values.size and values.min() < 0)
                output = table.looked_up(values, values[counted], signed, self._signed_bits())
                share = table.share(output)
            except Exception:  # an item without data, or with too little of it
                self.notes.append("its VOI table cannot be read and does not count")
                continue
            self._note("VOI", table)
            return share
        centre, width = self._number("WindowCenter"), self._number("WindowWidth")
        function = str(self.data.get("VOILUTFunction") or "LINEAR")
        if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
            return None  # such windows occur, although the standard forbids them
        if function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
        if function == "LINEAR_EXACT":
            return np.clip((values - centre) / width + 0.5, 0, 1)
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)

    def _signed_bits(self) -> int:
        """Bits of a negative number in pixel width, as some headers write it."""
        return int(self.data.get("BitsStored", 16)) if self.data.get("PixelRepresentation") else 16

    def _note(self, kind: str, table: _Table) -> None:
        self.notes += [f"its {kind} table {text}" for text in table.notes]

    def _stored(self, name: str) -> float | None:
        """Read an element that is a stored value, often written with the wrong sign.

        Negative values may have the width of the stored bits, as in the pixels, or of the element.
        """
        value = self._number(name)
        if value is None:
            return None
        allocated = int(self.data.get("BitsAllocated", 16))
        stored = int(self.data.get("BitsStored", allocated))
        if not self.data.get("PixelRepresentation", 0):
            return value + 2**allocated if value < 0 else value
        bits = stored if value < 2**stored else allocated
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


class _Table:
    """A lookup table by its contents, even if its descriptor contradicts them.

    Args:
        descriptor: number of entries, value that the first one is for, bits of the entries.
        content: the entries as bytes or numbers.
        little_endian: order of the bytes.
    """

    def __init__(self, descriptor: Sequence[Any], content: Any, little_endian: bool) -> None:
        entries, first, bits = (int(number) for number in descriptor)
        entries = entries % 2**16 or 2**16  # the field has 16 bits, and is written signed at times
        word = np.dtype("<u2" if little_endian else ">u2")
        if isinstance(content, bytes):
            output = np.frombuffer(content, "u1" if len(content) < 2 * entries else word)
        else:
            output = np.atleast_1d(np.asarray(content, dtype=np.int64))
            if 2 * len(output) == entries + entries % 2:  # two entries of 8 bits in each number
                output = output.astype(word).view("u1")
        if len(output) < entries:
            raise UnreadableDicom(f"has a table of {len(output)} instead of {entries} entries.")
        self.first, self.bits, self.notes = first, bits, list[str]()
        self.entries = self._signed(output[:entries].astype(np.int64))

    @classmethod
    def of_item(cls, item: Any, data: Any) -> _Table:
        """Read the table in an item of a sequence."""
        return cls(
            item.LUTDescriptor, item.LUTData, data.file_meta.TransferSyntaxUID.is_little_endian
        )

    def _signed(self, entries: np.ndarray) -> np.ndarray:
        """Return the entries with the sign that avoids jumps between the ends of 16 bits."""
        if entries.max() < 2**15 and entries.min() >= 0:
            return entries
        unsigned = entries & 0xFFFF
        signed = (unsigned ^ 0x8000) - 0x8000
        # Steep tables have few entries in between; only one that passes through many is conclusive.
        many = len(np.unique(unsigned)) > 16
        negative = many and _variation(signed) < _variation(unsigned)
        if negative != bool(entries.min() < 0):
            self.notes.append(f"holds {'' if negative else 'un'}signed entries, written otherwise")
        return signed if negative else unsigned

    def looked_up(
        self, values: np.ndarray, seen: np.ndarray, signed: bool, bits: int = 16
    ) -> np.ndarray:
        """The entries for some values.

        Args:
            values: float64 values to look up.
            seen: values in the image, which show the sign of the table's first value.
            signed: whether that value is signed by the standard.
            bits: bits of a negative value, if not 16.
        """
        first = self.first - 2**16 if signed and self.first >= 2**15 else self.first
        others = [self.first - 2**16 if first > 0 else self.first % 2**16]
        if 2 ** (bits - 1) <= self.first < 2**bits:
            others.append(self.first - 2**bits)
        other = max(others, key=lambda value: self._covers(value, seen))
        if self._covers(other, seen) > self._covers(first, seen):
            self.notes.append(f"begins at {other}, not at {first}")
            first = other
        places = np.clip(np.rint(values) - first, 0, len(self.entries) - 1).astype(np.int64)
        return self.entries[places].astype(np.float64)

    def _covers(self, first: int, seen: np.ndarray) -> int:
        return int(((seen >= first) & (seen < first + len(self.entries))).sum())

    def share(self, output: np.ndarray) -> np.ndarray:
        """Entries as shares of white."""
        if self.entries.min() < 0:
            half = 2 ** (max(8, int(max(self.entries.max(), ~self.entries.min())).bit_length()))
            return (output + half) / (2 * half - 1)
        bits = _white(int(self.entries.max()), self.bits)
        if bits != self.bits:
            self.notes.append(f"states {self.bits} bits and holds {bits}")
        return np.clip(output / (2**bits - 1), 0, 1)


def _white(largest: int, stated: int) -> int:
    """Return the bit depth of white in a table.

    These are the bits in its descriptor, unless they are impossible, far too few for the entries,
    or would display all of them in the darkest quarter. Then it is the smallest of 8, 10, 12, 14
    and 16 bits, as devices have them, that holds the largest entry, so that images of one device
    look alike. A table that slightly exceeds its stated bits is clipped.
    """
    if 8 <= stated <= 16 and 2 ** (stated - 2) <= largest < 9 * 2 ** (stated - 3):
        return stated
    needed = largest.bit_length()
    return max(8, needed + needed % 2)


def _variation(entries: np.ndarray) -> int:
    return int(np.abs(np.diff(entries)).sum())


def _palette_colour(values: np.ndarray, data: Any, notes: list[str]) -> np.ndarray:
    """The colours of indices, uint8 [H, W, 3]."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    if any(f"{name}Data" not in data for name in names):
        from pydicom.pixels.processing import apply_color_lut  # expands segmented tables

        unfolded = np.asarray(apply_color_lut(values, data))[..., :3]
        colours, stated = unfolded.astype(np.float64), 8 * unfolded.itemsize
        largest = int(colours.max())
    else:
        little = data.file_meta.TransferSyntaxUID.is_little_endian
        tables = [
            _Table(data[f"{n}Descriptor"].value, data[f"{n}Data"].value, little) for n in names
        ]
        seen, signed = values.astype(np.float64), bool(data.get("PixelRepresentation", 0))
        colours = np.stack([table.looked_up(seen, seen, signed) for table in tables], axis=-1)
        stated, largest = tables[0].bits, max(int(table.entries.max()) for table in tables)
        texts = dict.fromkeys(text for table in tables for text in table.notes)
        notes += [f"its palette {text}" for text in texts]
    bits = _white(largest, stated)
    if bits != stated:
        notes.append(f"its palette states {stated} bits and holds {bits}")
    return _high_byte(np.clip(colours, 0, 2**bits - 1).astype(np.int64), bits)


def _first(value: Any) -> float | None:
    """The first of several values of an element, or its only one."""
    if value is None or value == "":
        return None
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return float(value)
    return float(value[0]) if len(value) else None
