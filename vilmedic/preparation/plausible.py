"""Images that can be decoded and yet are hardly what they should be, found by their pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

DARK, BRIGHT = 24, 231
"""Grey levels that the bulk of an image is below or above when it is near-black or near-white."""
_BULK = 0.95
_STRAY = 1000  # one pixel in so many may be hot
_FLAT = 4  # times that the range shrinks without them
_GRID = 16  # cells a side of a thumbnail
_FEWEST = 8  # images that tell what the set is like
_ALIKE, _OPPOSITE = 0.35, -0.5  # correlation of the usual image, and of a negative, with the set
_SIDE = 512  # rows and columns that are looked at for tears
_JUMP = 5  # times the usual difference of neighbouring rows
_LEAST_JUMP = 8.0  # grey levels
_LIVELY = 8.0  # standard deviation of a row with something on it
_SAME = 0.9  # correlation of two rows that were shifted back
_GAIN = 0.25  # by which that is more than as they are


def brightness_faults(image: np.ndarray) -> list[str]:
    """What is wrong with the grey levels of an image.

    Args:
        image: uint8 [H, W].

    Returns:
        Some of `near-black`, `near-white` and `flattened by single pixels`.
    """
    counts = np.array(Image.fromarray(image).histogram())
    total = counts.sum()
    reached = np.cumsum(counts)
    few = max(1, total // _STRAY)
    low, high = (int(np.searchsorted(reached, count)) for count in (few + 1, total - few))
    levels = np.flatnonzero(counts)
    lowest, highest = int(levels[0]), int(levels[-1])
    if lowest == highest:
        return []
    if highest - lowest >= 64 and _FLAT * max(0, high - low) <= highest - lowest:
        return ["flattened by single pixels"]
    if reached[DARK] >= _BULK * total:
        return ["near-black"]
    if reached[BRIGHT - 1] <= (1 - _BULK) * total:
        return ["near-white"]
    return []


def is_torn(image: np.ndarray) -> bool:
    """Whether rows are shifted against those above them, or empty in the midst of the image.

    At a tear the difference of two neighbouring rows is far above what is usual in the image, both
    have something on them, and they fit when one of them is shifted. Borders and collimation do
    not count: one side of those is empty or they do not fit.

    Args:
        image: uint8 [H, W].
    """
    height, width = image.shape
    if min(height, width) < 2 * _GRID:
        return False
    image = image[:, :: max(1, width // _SIDE)].astype(np.int16)
    if _has_grey_band(image):
        return True
    jumps = np.abs(np.diff(image, axis=0)).mean(axis=1)
    limit = max(_LEAST_JUMP, _JUMP * float(np.median(jumps)))
    return any(_fits_shifted(image, row + 1) for row in np.flatnonzero(jumps > limit)[:64])


def _has_grey_band(image: np.ndarray) -> bool:
    """Whether a part of the rows holds one grey value, as decoders fill up what is missing."""
    same = (image.max(axis=1) - image.min(axis=1) <= 1) & (image[:, 0] > DARK)
    same &= image[:, 0] < BRIGHT
    longest = current = 0
    for flag in same.tolist():
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return max(8, len(image) // 50) <= longest < len(image)


def _fits_shifted(image: np.ndarray, row: int) -> bool:
    """Whether the rows from `row` on continue those above it at another place."""
    above, below = (_standard(image[at].astype(float)) for at in (row - 1, row))
    if above is None or below is None:
        return False
    fit = np.fft.irfft(np.fft.rfft(above) * np.conj(np.fft.rfft(below)), len(above)) / len(above)
    return bool(fit.max() >= _SAME and fit.max() - fit[0] >= _GAIN)


def _standard(values: np.ndarray) -> np.ndarray | None:
    spread = values.std()
    return (values - values.mean()) / spread if spread >= _LIVELY else None


def thumbnail(image: np.ndarray) -> np.ndarray:
    """A small image with mean 0 and spread 1, float32 [256]; zeros for one of a single value."""
    small = Image.fromarray(image).resize((_GRID, _GRID), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1 else np.zeros_like(values)


def negatives(thumbnails: Sequence[np.ndarray]) -> list[int]:
    """Which images are negatives of what most of the others look like.

    Args:
        thumbnails: of all images, as `thumbnail` makes them.

    Returns:
        Their numbers; none where the images of the set do not resemble each other.
    """
    if len(thumbnails) < _FEWEST:
        return []
    every = np.stack(thumbnails)
    usual = np.median(every, axis=0)
    spread = usual.std()
    if spread == 0:
        return []
    fits = every @ ((usual - usual.mean()) / spread) / every.shape[1]
    if np.median(fits) < _ALIKE:
        return []
    return np.flatnonzero(fits < _OPPOSITE).tolist()
