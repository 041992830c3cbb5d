"""Small pictures for the page: WebP, as text."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

FORMS = ((144, 60), (128, 60), (112, 60), (96, 60), (80, 55), (64, 50), (64, 30), (48, 25))
"""Pixels of the long side and WebP quality, the best first."""
EACH = 1500  # bytes a thumbnail may take where there are many
AT_LEAST = 1_500_000  # bytes that all of a split may take in any case
PILOT = 32

Picture = Callable[[int], Any]
"""From a sample's number to its picture, uint8 [C, H, W]."""


def thumbnails(picture: Picture, indices: Sequence[int]) -> list[str]:
    """The pictures of samples as base64 WebP, as large as the page can bear.

    Args:
        picture: gives the picture of a sample.
        indices: the samples.

    Returns:
        One text a sample, empty where the picture cannot be read.
    """
    if not indices:
        return []
    stride = max(1, len(indices) // PILOT)
    pilot = [_read(picture, index, FORMS[0][0]) for index in indices[::stride][:PILOT]]
    side, quality = _fitting([image for image in pilot if image is not None], len(indices))

    def encoded(index: int) -> str:
        image = _read(picture, index, side)
        return "" if image is None else base64.b64encode(webp(image, quality)).decode("ascii")

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(encoded, indices))


def webp(image: Image.Image, quality: int) -> bytes:
    """An image as WebP bytes."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return stream.getvalue()


def _read(picture: Picture, index: int, side: int) -> Image.Image | None:
    """The grey picture of a sample with its long side at most `side`."""
    try:
        pixels = picture(index)
    except Exception:
        # a picture that cannot be read was said to be so when the data set was made
        return None
    image = Image.fromarray(pixels.float().mean(dim=0).byte().numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return image


def _fitting(pilot: Sequence[Image.Image], count: int) -> tuple[int, int]:
    """The best form in which all pictures fit, judged by some of them."""
    budget = max(EACH, AT_LEAST / count)
    for side, quality in FORMS:
        sizes = []
        for image in pilot:
            small = image.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            sizes.append(len(webp(small, quality)))
        if not sizes or sum(sizes) / len(sizes) <= budget:
            return side, quality
    return FORMS[-1]
