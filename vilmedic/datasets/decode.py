"""Decoding of image files to 8-bit grey or colour pixels.

Rules, the same for every format:

- Transparent pixels are laid over black, the background of an X-ray.
- The orientation in EXIF data is applied.
- Colour becomes grey by the luma weights of ITU-R 601 (what JPEG itself stores).
- 16-bit, 32-bit and floating-point values are mapped linearly from the image's own smallest and
  largest value to 0 and 255, colours by the range of all channels together. Such files hold 10 to
  16 bits in an unstated window, and dividing by 65535 would turn 12-bit exports black. An image of
  a single value becomes black.
- DICOM files are displayed as their headers prescribe (see `dicom`).
- Files that end too early or are damaged are errors; they are never filled up with grey.
- Only JPEG, PNG, TIFF, BMP, WebP, JPEG 2000, DICOM and `.npy` are decoded, by their content. Pillow
  knows further formats, some of which start other programs.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vilmedic.errors import DataError
from vilmedic.files import open_regular

Color = Literal["grey", "rgb"]

Image.preinit()  # usual formats first: Pillow tries formats in the order of loading
Image.MAX_IMAGE_PIXELS = None  # replaced by the option `max_pixels`, for all formats
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "JPEG2000")
"""Pillow's names of the formats that Pillow decodes here."""
DICOM_SUFFIXES = frozenset({".dcm", ".dicom"})
HEAD = 132
"""Bytes at the start of a file that identify its format."""
DICOM_REMEDY = "DICOM files need pydicom and its decoders: pip install '.[dicom]' in the clone."
_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
_JPEG_2000_SUFFIXES = {".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"}
_OTHER_SUFFIXES = {".png", ".tif", ".tiff", ".bmp", ".webp", ".npy"}
SUFFIXES = frozenset(_JPEG_SUFFIXES | _JPEG_2000_SUFFIXES | _OTHER_SUFFIXES) | DICOM_SUFFIXES
MAX_PIXELS = 2**27
_MOST_SCANS = 500  # of a progressive JPEG; encoders write ten
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_TIFF_TILE = (322, 323)
_PNG_MARK = b"\x89PNG\r\n\x1a\n"
_MARKS = {
    b"\xff\xd8\xff": ".jpg",
    _PNG_MARK: ".png",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
    b"II+\0": ".tif",
    b"MM\0+": ".tif",
    b"\0\0\0\x0cjP  ": ".jp2",
    b"\xff\x4f\xff\x51": ".j2k",
    b"\x93NUMPY": ".npy",
}
# Warnings of libjpeg for files whose image may still be complete.
_HARMLESS = re.compile(r"extraneous bytes|end of JPEG file|JFIF revision|Adobe color|ICC")


class UndecodableImage(DataError):
    """An image file that is missing, truncated, corrupt or of an unknown format."""


def decode_image(
    path: str | Path, color: Color = "grey", *, max_pixels: int = MAX_PIXELS, thorough: bool = False
) -> torch.Tensor:
    """Read one image.

    Args:
        path: a JPEG, PNG, TIFF, BMP, WebP, JPEG 2000 or DICOM file, or a `.npy` array of shape
            [H, W], [H, W, 1] or [H, W, 3].
        color: `grey` for one channel or `rgb` for three.
        max_pixels: see `decode_file`.
        thorough: see `decode_file`.

    Returns:
        uint8 tensor [C, H, W]; C is 1 for `grey` and 3 for `rgb`.

    Raises:
        UndecodableImage: the file cannot be read; the message holds the path and the reason.
    """
    with open_image(path) as file:
        return decode_file(file, str(path), color, max_pixels=max_pixels, thorough=thorough)


def open_image(path: str | Path) -> IO[bytes]:
    """Open an image file.

    Raises:
        UndecodableImage: it cannot be opened or is not a regular file.
    """
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise UndecodableImage(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UndecodableImage(f"{path} cannot be read: {reason}.") from error


def decode_file(
    file: IO[bytes],
    name: str,
    color: Color = "grey",
    *,
    max_pixels: int = MAX_PIXELS,
    thorough: bool = False,
    notes: list[str] | None = None,
) -> torch.Tensor:
    """Read one image from an open file; see `decode_image`.

    Args:
        file: seekable file, open for reading.
        name: its name for messages; the suffix distinguishes formats whose content does not.
        color: see `decode_image`.
        max_pixels: height times width of the largest image that is decoded.
        thorough: read the compressed data of JPEG files a second time for damage that the decoder
            does not notice, which takes as long as decoding.
        notes: gets notes about a readable file, such as a table that contradicts its header.
    """
    suffix = os.path.splitext(name)[1].lower()
    notes = [] if notes is None else notes
    try:
        file.seek(0)
        content = file.read()  # at once: decoders read many small pieces
        if not content:
            raise UndecodableImage(f"{name} is an empty file.")
        if suffix in DICOM_SUFFIXES or is_marked(content):
            shown = _dicom_pixels(content, name, max_pixels, thorough, notes)
            pixels = _converted(Image.fromarray(shown), color)
        elif suffix == ".npy" or suffix_by_content(content[:HEAD]) == ".npy":
            pixels = _converted(_from_array(content, name, max_pixels), color)
        else:
            pixels = _open(content, name, color, max_pixels, thorough)
    except UndecodableImage:
        raise
    except UnidentifiedImageError:
        if suffix_by_content(content[:HEAD]) == ".tif":
            raise UndecodableImage(
                f"{name} is a TIFF file of a kind that is not read here, or a damaged one. Save it "
                "as a PNG of 8 or 16 bits or as an array (.npy)."
            ) from None
        raise UndecodableImage(
            f"{name} is not an image in a known format (JPEG, PNG, TIFF, BMP, WebP, JPEG 2000, "
            "DICOM or .npy), or its header is damaged."
        ) from None
    except MemoryError:
        raise UndecodableImage(f"{name} needs more memory than there is.") from None
    except Exception as error:  # decoders raise many kinds on corrupt files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImage(f"{name} cannot be decoded: {reason}.") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if color == "grey" else tensor.permute(2, 0, 1).contiguous()


def is_marked(head: bytes) -> bool:
    """Return whether the first `HEAD` bytes of a file are those of a DICOM file."""
    return head[128:HEAD] == b"DICM"


def is_dicom(path: str | Path) -> bool:
    """Return whether a file is DICOM by its name or content; many have no or a numeric suffix.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.splitext(path)[1].lower() in DICOM_SUFFIXES:
        return True
    with open_regular(path) as file:
        return is_marked(file.read(HEAD))


def dicom_available() -> bool:
    """Return whether DICOM files can be read here."""
    return find_spec("pydicom") is not None


def suffix_by_content(head: bytes) -> str | None:
    """Return the usual suffix of a file by its first `HEAD` bytes; None for unsupported formats."""
    if is_marked(head):
        return ".dcm"
    marks = [suffix for mark, suffix in _MARKS.items() if head.startswith(mark)]
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        marks.append(".webp")
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # a table may begin with BMI
        marks.append(".bmp")
    return marks[0] if marks else None


def check_size(height: int, width: int, max_pixels: int, name: str) -> None:
    """Raise an `UndecodableImage` if an image is too large, before allocating memory for it."""
    if height * width > max_pixels:
        raise UndecodableImage(
            f"{name} has {height} x {width} pixels, more than max_pixels={max_pixels}."
        )


def _open(content: bytes, name: str, color: Color, max_pixels: int, thorough: bool) -> np.ndarray:
    """The upright, opaque 8-bit pixels in a file of one of the `FORMATS`."""
    if content.startswith(_PNG_MARK):
        _check_png(content)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        check_size(image.height, image.width, max_pixels, name)
        wide = _wide_values(image, content, max_pixels, name)
        if wide is not None:
            upright = Image.fromarray(wide)
        elif content.startswith(b"\xff\xd8"):
            pixels = _jpeg_pixels(image, content, color, thorough)
            if pixels.ndim == (2 if color == "grey" else 3) and _orientation(image) == 1:
                return pixels
            upright = Image.fromarray(pixels)
        else:
            image.load()
            upright = image
            if _is_signed(image):
                upright = Image.fromarray(np.asarray(image) ^ np.uint8(0x80))
        turn = _orientation(image)
        if turn != 1:
            upright.getexif()[_EXIF_ORIENTATION] = turn
            upright = ImageOps.exif_transpose(upright)
        if upright.has_transparency_data:
            upright = _over_black(upright)
        return _converted(upright, color)


def _dicom_pixels(
    content: bytes, name: str, max_pixels: int, thorough: bool, notes: list[str]
) -> np.ndarray:
    if not dicom_available():
        raise UndecodableImage(f"{name}: {DICOM_REMEDY}")
    # imported here: most folders have no such files
    from vilmedic.datasets.dicom import NoDecoder, UnreadableDicom, dicom_pixels

    try:
        return dicom_pixels(content, max_pixels=max_pixels, thorough=thorough, notes=notes)
    except NoDecoder as error:
        raise UndecodableImage(f"{name} {error} {DICOM_REMEDY}") from None
    except UnreadableDicom as error:
        raise UndecodableImage(f"{name}{'' if str(error)[0] == ':' else ' '}{error}") from None


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_EXIF_ORIENTATION, 1))


def _jpeg_pixels(image: Image.Image, content: bytes, color: Color, thorough: bool) -> np.ndarray:
    """[H, W] or [H, W, 3] of a JPEG file, to the bit as Pillow decodes it.

    Pillow does not pass on what libjpeg says of damaged files.
    """
    codes = np.frombuffer(content, np.uint8)  # `count` of bytes takes five times as long
    if np.count_nonzero((codes[:-1] == 0xFF) & (codes[1:] == 0xDA)) > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS} scans")
    plain = image.mode in ("L", "RGB")
    space = ("GRAY" if color == "grey" or image.mode == "L" else "RGB") if plain else "CMYK"
    try:
        pixels = simplejpeg.decode_jpeg(content, colorspace=space)
    except ValueError as error:
        if not _HARMLESS.search(str(error)):
            raise
        whole = content if b"end of JPEG file" not in str(error).encode() else content + b"\xff\xd9"
        _check_jpeg(content)
        pixels = simplejpeg.decode_jpeg(whole, colorspace=space, strict=False)
    else:
        if thorough:
            _check_jpeg(content)
    if plain:
        return pixels[:, :, 0] if space == "GRAY" else pixels
    image.load()
    return np.array(image.convert("RGB"))


def _check_jpeg(content: bytes) -> None:
    from vilmedic.datasets.jpeg_data import check_jpeg  # loads a compiler

    check_jpeg(content)


def _check_png(content: bytes) -> None:
    """Verify the checksums of the image chunks, which Pillow does not do for its data."""
    view, place = memoryview(content), len(_PNG_MARK)
    while place + 12 <= len(content):
        length, kind = (
            int.from_bytes(view[place : place + 4], "big"),
            content[place + 4 : place + 8],
        )
        end = place + 8 + length
        needed = not kind[0] & 0x20
        if needed and zlib.crc32(view[place + 4 : end]).to_bytes(4, "big") != view[end : end + 4]:
            raise ValueError(
                "it is damaged or cut short, fetch it again "
                f"(the check sum of its chunk {kind.decode('latin-1')!r} is wrong)"
            )
        place = end + 4
        if kind == b"IEND":
            return


def _wide_values(
    image: Image.Image, content: bytes, max_pixels: int, name: str
) -> np.ndarray | None:
    """Values of more than 8 bits mapped to uint8 [H, W] or [H, W, 3]; None for images of 8 bits.

    Raises:
        UndecodableImage: no decoder here keeps the bits of such a file.
    """
    if image.format == "PNG":
        depth = content[24]
        return _wide_png(content, image.info.get("transparency"), name) if depth == 16 else None
    single = image.mode.startswith(("I", "F"))
    tags: Any = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    bits = tags.get(_TIFF_BITS, (1,))
    check_size(tags.get(_TIFF_TILE[1], 1), tags.get(_TIFF_TILE[0], 1), max_pixels, name)
    if image.format == "JPEG2000":
        bits = _jpeg2000_bits(content)
    if not single and max(bits) > 8:
        raise UndecodableImage(
            f"{name} is a {image.format} file in colour with {max(bits)} bits, of which 8 would be "
            "lost. Save it as a PNG of 16 bits or as an array (.npy)."
        )
    if not single:
        return None
    values = _tiff_values(image) if image.format == "TIFF" else np.asarray(image)
    if image.mode == "I" and bits[0] == 32 and tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)
    shown = _to_bytes(values, name)
    return 255 - shown if tags.get(_TIFF_PHOTOMETRIC, 0 if tags else 1) == 0 else shown


def _tiff_values(image: Image.Image) -> np.ndarray:
    """The values of a grey TIFF file of many bits.

    libtiff gives them in the order of this machine, and Pillow swaps the bytes of compressed
    big-endian files of some kinds a second time.
    """
    decoder, _, _, settings = image.tile[0]  # type: ignore[attr-defined]
    values = np.asarray(image)
    if decoder != "libtiff" or settings[0] not in ("I;16BS", "I;32BS", "F;32BF"):
        return values
    return (values.astype(np.int16) if settings[0] == "I;16BS" else values).byteswap()


def _wide_png(content: bytes, key: Any, name: str) -> np.ndarray:
    """Read a 16-bit PNG with colour or alpha, of which Pillow keeps only the high byte."""
    from vilmedic.datasets.wide_png import read_wide_png  # loads a compiler

    planes = read_wide_png(content)
    values = planes[0] if len(planes) < 3 else planes[:3].transpose(1, 2, 0)
    if len(planes) in (2, 4):
        opaque = planes[-1] / 65535
    elif key is not None:
        opaque = (planes != np.reshape(key, (-1, 1, 1))).any(axis=0).astype(np.float64)
    else:
        return _to_bytes(values, name)
    shown = _to_bytes(values, name, opaque > 0)
    return np.rint(shown * (opaque if values.ndim == 2 else opaque[:, :, None])).astype(np.uint8)


def _jpeg2000_bits(content: bytes) -> list[int]:
    """Bits of each channel, from the head of the code stream (ITU-T T.800, A.5.1)."""
    start = content.index(b"\xff\x4f\xff\x51") + 2
    channels = int.from_bytes(content[start + 38 : start + 40], "big")
    return [(value & 0x7F) + 1 for value in content[start + 40 : start + 40 + 3 * channels : 3]]


def _is_signed(image: Image.Image) -> bool:
    """Return whether a TIFF holds signed bytes, which Pillow does not convert."""
    tags: Any = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    return image.mode == "L" and tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0] == 2


def _converted(image: Image.Image, color: Color) -> np.ndarray:
    mode = "L" if color == "grey" else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def _over_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)


def _from_array(content: bytes, name: str, max_pixels: int) -> Image.Image:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UndecodableImage(f"{name} is an array file of version {version}, which is no image.")
    first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = read(file)
    if len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3) or min(shape) < 1:
        raise UndecodableImage(
            f"{name} holds an array of shape {list(shape)}; an image is [H, W] or [H, W, 3]."
        )
    if not (
        kind == np.bool_ or np.issubdtype(kind, np.integer) or np.issubdtype(kind, np.floating)
    ):
        raise UndecodableImage(f"{name} holds {kind} values, which are no image.")
    check_size(shape[0], shape[1], max_pixels, name)
    count, start = int(np.prod(shape)), file.tell()
    if len(content) - start < count * kind.itemsize:
        raise UndecodableImage(f"{name} ends too early: its header says an array of {list(shape)}.")
    array = np.frombuffer(content, kind, count, start)
    array = array.reshape(shape, order="F" if by_columns else "C")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if array.dtype != np.uint8:
        array = _to_bytes(array, name)
    return Image.fromarray(np.ascontiguousarray(array))


def _to_bytes(values: np.ndarray, name: str, visible: np.ndarray | None = None) -> np.ndarray:
    """Map the range of the values linearly to 0..255 (see the head of this file).

    Args:
        values: of any shape.
        name: of the file.
        visible: which pixels count for the range; None counts all.
    """
    counted = values if visible is None else values[visible]
    if not np.isfinite(counted).all():
        raise UndecodableImage(f"{name} holds values that are not finite numbers.")
    if not counted.size or counted.min() == counted.max():
        return np.zeros(values.shape, np.uint8)
    if np.issubdtype(values.dtype, np.integer) and values.itemsize <= 2:
        low, high = int(counted.min()), int(counted.max())  # once for each level, not each pixel
        levels = np.rint(np.arange(high - low + 1) * (255.0 / (high - low))).astype(np.uint8)
        return levels[np.clip(values, low, high).astype(np.int32) - low]
    wide = values.astype(np.float64)
    lowest, highest = float(counted.min()), float(counted.max())
    scale = 255.0 / (highest - lowest) if np.isfinite(highest - lowest) else 0.0
    if not 0 < scale < np.inf:
        raise UndecodableImage(
            f"{name} holds values from {lowest} to {highest}, which is no image."
        )
    return np.rint((np.clip(wide, lowest, highest) - lowest) * scale).astype(np.uint8)
