"""From an image file to 8-bit grey or colour pixels.

Rules, the same for every format:

- Transparent pixels are laid over black, the background of an X-ray.
- The orientation in EXIF data is applied.
- Colour becomes grey by the luma weights of ITU-R 601 (what JPEG itself stores).
- 16-bit, 32-bit and floating-point values are mapped linearly from the image's own smallest and
  largest value to 0 and 255. Such files hold 10 to 16 bits in an unstated window, and dividing all
  of them by 65535 would turn 12-bit exports black. An image of one single value becomes black.
  (16-bit colour, which Pillow reduces itself, keeps its high byte.)
- DICOM files are shown as they say themselves (see `dicom`).
- Files that end too early are errors; they are never filled up with grey.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vilmedic.datasets.dicom import DICOM_SUFFIXES, UnreadableDicom, dicom_pixels, is_marked
from vilmedic.errors import DataError

Color = Literal["grey", "rgb"]
Image.preinit()  # the usual formats first: Pillow tries all in the order in which they were loaded
_NOT_READ = frozenset(  # what Pillow writes only, or opens with programs of others only
    {".pdf", ".palm", ".eps", ".ps", ".wmf", ".emf", ".bufr", ".grib", ".h5", ".hdf", ".mpg"}
    | {".mpeg"}
)
SUFFIXES = (frozenset(Image.registered_extensions()) - _NOT_READ) | DICOM_SUFFIXES | {".npy"}
_EXIF_ORIENTATION = 0x0112


class UndecodableImage(DataError):
    """An image file that is missing, truncated, corrupt or of an unknown format."""


def decode_image(path: str | Path, color: Color = "grey") -> torch.Tensor:
    """Read one image.

    Args:
        path: a PNG, JPEG or DICOM file, any other format that Pillow reads, or a `.npy` array of
            shape [H, W], [H, W, 1] or [H, W, 3].
        color: what the result holds: one grey channel or three colour channels.

    Returns:
        uint8 tensor [C, H, W]; C is 1 for `grey` and 3 for `rgb`.

    Raises:
        UndecodableImage: the file cannot be read; the message holds the path and the reason.
    """
    with open_image(path) as file:
        return decode_file(file, str(path), color)


def open_image(path: str | Path) -> IO[bytes]:
    """Open a file to read an image from.

    Raises:
        UndecodableImage: that cannot be done.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise UndecodableImage(f"{path} does not exist.") from None
    except OSError as error:
        raise UndecodableImage(f"{path} cannot be read: {error.strerror}.") from error


def decode_file(file: IO[bytes], name: str, color: Color = "grey") -> torch.Tensor:
    """Read one image from an open file; see `decode_image`.

    Args:
        file: open for reading and for moving in it.
        name: what messages call it; its suffix tells formats apart that their content does not.
        color: see `decode_image`.
    """
    suffix = Path(name).suffix.lower()
    try:
        file.seek(0)
        content = file.read()  # at once: decoders ask for many small pieces
        if not content:
            raise UndecodableImage(f"{name} is an empty file.")
        marked = is_marked(content)
        file = io.BytesIO(content)
        if suffix in DICOM_SUFFIXES or marked:
            pixels = _converted(Image.fromarray(dicom_pixels(file)), color)
        elif suffix == ".npy":
            pixels = _converted(_from_array(file, name), color)
        else:
            pixels = _open(file, name, color)
    except (MemoryError, UndecodableImage):
        raise
    except UnreadableDicom as error:
        raise UndecodableImage(f"{name}{'' if str(error)[0] == ':' else ' '}{error}") from None
    except UnidentifiedImageError:
        raise UndecodableImage(
            f"{name} is not an image in a known format, or its header is damaged."
        ) from None
    except Exception as error:  # decoders raise all sorts of things on corrupt files
        raise UndecodableImage(f"{name} cannot be decoded: {error}.") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if color == "grey" else tensor.permute(2, 0, 1).contiguous()


def _open(file: IO[bytes], name: str, color: Color) -> np.ndarray:
    """The upright, opaque 8-bit pixels in a file that Pillow reads."""
    with Image.open(file) as image:
        if color == "grey":
            image.draft("L", image.size)  # a colour JPEG decodes its luma only
        image.load()
        upright = image
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith(("I", "F")):
            return _converted(Image.fromarray(_to_bytes(np.asarray(upright), name)), color)
        if upright.has_transparency_data:
            upright = _over_black(upright)
        return _converted(upright, color)


def _converted(image: Image.Image, color: Color) -> np.ndarray:
    mode = "L" if color == "grey" else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))


def _over_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)


def _from_array(file: IO[bytes], name: str) -> Image.Image:
    array = np.load(file, allow_pickle=False)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or 0 in array.shape:
        raise UndecodableImage(
            f"{name} holds an array of shape {list(array.shape)}; an image is [H, W] or [H, W, 3]."
        )
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    if array.dtype != np.uint8:
        if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
            raise UndecodableImage(f"{name} holds {array.dtype} values, which are no image.")
        array = _to_bytes(array, name)
    return Image.fromarray(array)


def _to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Map the range of the values linearly to 0..255 (see the head of this file)."""
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise UndecodableImage(f"{name} holds values that are not finite numbers.")
    low, high = wide.min(), wide.max()
    if low == high:
        return np.zeros(values.shape, np.uint8)
    return np.rint((wide - low) * (255.0 / (high - low))).astype(np.uint8)
