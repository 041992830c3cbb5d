"""Images made smaller, once, on disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from vilmedic.datasets.decode import MAX_PIXELS, decode_file, open_image
from vilmedic.errors import DataError, nearest

JPEG_SIDE = 65500  # pixels of the longest side that a JPEG file can have
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def resize_short_side_file(
    source: str | Path,
    target: str | Path,
    short_side: int,
    quality: int = 95,
    *,
    max_pixels: int = MAX_PIXELS,
    notes: list[str] | None = None,
) -> None:
    """Write an image again with a short side of `short_side` pixels, its aspect kept.

    The image is decoded as in training (see `vilmedic.datasets.decode`), and its compressed data
    are read a second time for damage. The result is upright and has 8 bits; it is grey when all its
    pixels are. An image that is small already keeps its size. The file appears when it is complete,
    and an interrupted call leaves nothing under its name.

    Args:
        source: the image, in any format that training reads.
        target: where to write it; the suffix, .jpg or .png, says the format.
        short_side: pixels.
        quality: of a JPEG, 1 to 100.
        max_pixels: height times width of the largest image that is read.
        notes: gets what contradicts the header of `source`.

    Raises:
        UndecodableImage: `source` cannot be decoded.
        DataError: `target` has another suffix, or cannot hold the image.
        OSError: `target` cannot be written.
    """
    target = Path(target)
    form = FORMATS.get(target.suffix.lower())
    if form is None:
        raise DataError(
            f"{target}: images are written as {', '.join(FORMATS)}, not as '{target.suffix}'."
            f"{nearest(target.suffix, FORMATS)}"
        )
    image = _shrink(_read(source, max_pixels, notes), short_side)
    options: dict[str, Any] = {}
    if form == "JPEG":
        if max(image.size) > JPEG_SIDE:
            raise DataError(f"{source} is too long for JPEG, {max(image.size)} pixels. Write PNG.")
        options = {"quality": quality, "subsampling": 0, "optimize": True}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        image.save(draft, format=form, **options)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _read(source: str | Path, max_pixels: int, notes: list[str] | None) -> Image.Image:
    given: Any = {"max_pixels": max_pixels, "thorough": True, "notes": notes}
    with open_image(source) as file:
        pixels = decode_file(file, str(source), "rgb", **given)
    red, green, blue = pixels
    if bool((red == green).all()) and bool((red == blue).all()):
        return Image.fromarray(red.numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    short = min(image.size)
    if short <= short_side:
        return image
    # Rounded half up in integers, so that the size does not depend on floating point.
    size = [(2 * side * short_side + short) // (2 * short) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
