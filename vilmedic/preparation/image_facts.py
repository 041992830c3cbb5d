"""Image statistics and problems of a split, found by decoding its images.

Images that can be decoded may still be wrong: near-black, torn or negatives, which their pixels
show.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from vilmedic.datasets.decode import DICOM_SUFFIXES, FORMATS
from vilmedic.datasets.image_source import ImageSource
from vilmedic.errors import VilmedicError
from vilmedic.files import core_count
from vilmedic.log import progress

SAMPLE_SIDE = 320  # pixels of the long side of a sample
TORN = "torn or empty rows"
DARK, BRIGHT = 24, 231
"""Grey levels that the bulk of an image is below or above when it is near-black or near-white."""
_BULK = 0.95
_STRAY = 1000  # one pixel in so many may be hot
_FLAT = 4  # times that the range shrinks without them
_GRID = 16  # cells a side of a thumbnail
_FEWEST = 8  # images needed to know what the set looks like
_ALIKE, _OPPOSITE = 0.35, -0.5  # correlation of the usual image, and of a negative, with the set
_SIDE = 512  # rows and columns that are looked at for tears
_JUMP = 5  # times the usual difference of neighbouring rows
_LEAST_JUMP = 8.0  # grey levels
_LIVELY = 8.0  # standard deviation of a row with something on it
_SAME = 0.9  # correlation of two rows that were shifted back
_GAIN = 0.25  # by which that is more than as they are


@dataclass(frozen=True)
class SampleImage:
    """A small image with its line.

    Attributes:
        line: number of the line.
        place: path of the image.
        pixels: uint8 [H, W].
    """

    line: int
    place: str
    pixels: np.ndarray


@dataclass
class ImageFacts:
    """The images of a split.

    Attributes:
        looked_at: how many were decoded.
        unreadable: `file:line: path: reason` of each that cannot be decoded.
        blank: `file:line: path` of each whose pixels all have one value.
        doubtful: `file:line: path` of each with a fault that its pixels show, by fault.
        noted: `file:line: path: note` of each whose content contradicts its header.
        places: `file:line: path` of each one decoded.
        thumbnails: a `thumbnail` of each one decoded.
        samples: a few of them, evenly over the split.
        sizes: height and width of each one decoded.
        means: mean grey level of each one decoded.
        modes: how many are of each format and mode, such as `JPEG L`.
        contents: a digest of the pixels of each that is not blank, by its path.
    """

    looked_at: int = 0
    unreadable: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    doubtful: dict[str, list[str]] = field(default_factory=dict)
    noted: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)
    samples: list[SampleImage] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    contents: dict[str, str] = field(default_factory=dict)


def examine_images(
    source: ImageSource,
    skipped: set[int],
    *,
    most: int | None,
    workers: int,
    title: str,
    samples: int = 0,
) -> ImageFacts:
    """Decode the images of a split.

    Args:
        source: where they are.
        skipped: lines to leave out, as images of theirs are missing.
        most: images to look at, evenly over the split; None takes all.
        workers: threads, 0 for one per core.
        title: what the progress bar says.
        samples: how many small images to keep.
    """
    jobs = [
        (line, number)
        for line in range(len(source.texts))
        if line not in skipped
        for number in range(len(source.names(line)))
    ]
    if most is not None and most < len(jobs):
        jobs = [jobs[place] for place in _evenly(len(jobs), most)]
    kept = {jobs[place] for place in _evenly(len(jobs), samples)}
    facts = ImageFacts(looked_at=len(jobs))
    with ThreadPoolExecutor(workers or core_count()) as pool:
        looks = pool.map(lambda job: _look(source, *job, sample=job in kept), jobs)
        bar = progress(looks, title, "images", len(jobs))
        for (line, number), look in zip(jobs, bar, strict=True):
            where = source.texts.where(line)
            if look.reason:
                facts.unreadable.append(f"{where}: {look.reason}")
                continue
            place = source.places(line)[number]
            named = f"{where}: {place}"
            facts.modes[look.mode] += 1
            facts.sizes.append(look.size)
            facts.means.append(look.mean)
            facts.places.append(named)
            facts.thumbnails.append(look.small)
            facts.noted += [f"{named}: {note}" for note in look.notes]
            if look.content:
                facts.contents[place] = look.content
            if look.blank:
                facts.blank.append(named)
            for fault in look.faults:
                facts.doubtful.setdefault(fault, []).append(named)
            if look.sample is not None:
                facts.samples.append(SampleImage(line, place, look.sample))
    return facts


def negatives_by_split(splits: dict[str, ImageFacts]) -> dict[str, list[str]]:
    """`file:line: path` of images that are negatives of most of the others of all splits."""
    found = set(negatives([small for facts in splits.values() for small in facts.thumbnails]))
    named: dict[str, list[str]] = {}
    start = 0
    for name, facts in splits.items():
        named[name] = [place for n, place in enumerate(facts.places, start) if n in found]
        start += len(facts.places)
    return named


def brightness_faults(image: np.ndarray) -> list[str]:
    """Problems with the grey levels of an image.

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
    """Return whether rows are shifted against those above them, or empty in the midst of the image.

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


@dataclass(frozen=True)
class _Look:
    reason: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    mean: float = 0.0
    blank: bool = False
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()
    small: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    sample: np.ndarray | None = None
    content: str = ""


def _evenly(count: int, wanted: int) -> list[int]:
    """Some of the numbers below `count`, from the first to the last."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist() if count else []


def _look(source: ImageSource, line: int, number: int, *, sample: bool) -> _Look:
    name = source.places(line)[number]
    notes: list[str] = []
    try:
        grey = source.decode(line, number, thorough=True, notes=notes)[0].numpy()
        with source.open(line, number) as file:
            mode = _mode(file, name)
        blank = bool(grey.min() == grey.max())
        faults = [] if blank else brightness_faults(grey)
        if not faults and not blank and is_torn(grey):
            faults = [TORN]
        return _Look(
            mode=mode,
            size=(grey.shape[0], grey.shape[1]),
            mean=float(grey.mean()),
            blank=blank,
            content="" if blank else _digest(grey),
            faults=faults,
            notes=notes,
            small=thumbnail(grey),
            sample=_small(grey) if sample else None,
        )
    except VilmedicError as error:
        return _Look(reason=str(error))
    except Exception as error:  # one file must not stop the check of the others
        return _Look(reason=f"{name} cannot be read: {error or type(error).__name__}")


def _small(grey: np.ndarray) -> np.ndarray:
    image = Image.fromarray(grey)
    image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    return np.asarray(image)


def _digest(image: np.ndarray) -> str:
    """The same text for the same pixels, in whatever format a file holds them."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _mode(file: IO[bytes], name: str) -> str:
    """Format and kind of pixels of a file that has been decoded."""
    suffix = Path(name).suffix.lower()
    if suffix == ".npy":
        return "NPY"
    try:
        with Image.open(file, formats=FORMATS) as image:
            return f"{image.format} {image.mode}"
    except Exception:  # Pillow does not know DICOM, which is the one format left
        return "DICOM" if suffix in DICOM_SUFFIXES else "DICOM (other suffix)"


def _has_grey_band(image: np.ndarray) -> bool:
    """Return whether some rows hold one grey value, as decoders fill in missing data."""
    same = (image.max(axis=1) - image.min(axis=1) <= 1) & (image[:, 0] > DARK)
    same &= image[:, 0] < BRIGHT
    longest = current = 0
    for flag in same.tolist():
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return max(8, len(image) // 50) <= longest < len(image)


def _fits_shifted(image: np.ndarray, row: int) -> bool:
    """Return whether the rows from `row` on continue those above it at another place."""
    above, below = (_standard(image[at].astype(float)) for at in (row - 1, row))
    if above is None or below is None:
        return False
    fit = np.fft.irfft(np.fft.rfft(above) * np.conj(np.fft.rfft(below)), len(above)) / len(above)
    return bool(fit.max() >= _SAME and fit.max() - fit[0] >= _GAIN)


def _standard(values: np.ndarray) -> np.ndarray | None:
    spread = values.std()
    return (values - values.mean()) / spread if spread >= _LIVELY else None
