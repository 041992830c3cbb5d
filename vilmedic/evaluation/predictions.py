"""`predictions_<split>.npz`: what each number of an evaluation is made of, sample by sample.

The array `samples` names the samples, text [N]. Of each metric, under its name in the results:

- `<metric>/scores`: float32 [N, C], larger for the class; `<metric>/labels`: bool [N, C];
  `<metric>/classes`: text [C]. Where a label may be unknown, `<metric>/known`: bool [N, C].
- or `<metric>/values`: float32 [N, M], and `<metric>/numbers`: text [M], the numbers of the results
  that are the mean of these values, or their median where the name ends in `median_rank`.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.files import open_regular, replacing

logger = logging.getLogger(__name__)

MOST_VALUES = 50_000_000  # of a metric, 200 MB; with 100,000 classes there would be far more
SAMPLES = "samples"

Arrays = dict[str, NDArray[Any]]


def predictions_name(split: str) -> str:
    """The name of the file of a split."""
    return f"predictions_{split}.npz"


class Predictions:
    """Takes what metrics know of single samples, and writes it.

    Attributes:
        metric: the metric whose turn it is, under its name in the results.
        arrays: what was taken so far.
    """

    def __init__(self) -> None:
        self.metric = ""
        self.arrays: Arrays = {}

    def take(self, **arrays: NDArray[Any] | Sequence[str]) -> None:
        """Keep arrays of the metric whose turn it is; see the head of this module.

        Args:
            arrays: `scores`, `labels`, `classes` and so on. Numbers are kept as float32.
        """
        made = {name: _plain(np.asarray(value)) for name, value in arrays.items()}
        if (largest := max(value.size for value in made.values())) > MOST_VALUES:
            logger.warning(
                "%s: %d scores of single samples are too many to be written.", self.metric, largest
            )
            return
        self.arrays |= {f"{self.metric}/{name}": value for name, value in made.items()}

    def write(self, folder: Path, split: str, samples: Sequence[str]) -> Path | None:
        """Write `predictions_<split>.npz`, whole or not at all; nothing when nothing was taken.

        Args:
            folder: where to.
            split: name of the split.
            samples: a name for each sample that is the same on every machine.
        """
        path = folder / predictions_name(split)
        if not self.arrays:
            path.unlink(missing_ok=True)  # of an earlier evaluation, whose numbers are replaced
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, open(draft, "wb") as file:
            content: dict[str, Any] = {SAMPLES: np.array(samples, dtype=np.str_), **self.arrays}
            np.savez_compressed(file, **content)
        return path


def read_predictions(path: Path) -> Arrays:
    """The arrays of a file; none where there is no file.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ValueError(f"{path}: not a file of predictions: {error}") from None
    if SAMPLES not in arrays or any(
        len(value) != len(arrays[SAMPLES])
        for name, value in arrays.items()
        if name.rpartition("/")[2] in ("scores", "labels", "known", "values")
    ):
        raise ValueError(f"{path}: its arrays are not of one length, or it names no samples")
    for name, value in arrays.items():
        metric, _, kind = name.rpartition("/")
        beside = {"scores": "classes", "values": "numbers"}.get(kind)
        if beside and (
            value.ndim != 2 or len(arrays.get(f"{metric}/{beside}", ())) != len(value.T)
        ):
            raise ValueError(f"{path}: {name} and {metric}/{beside} do not belong together")
        if (
            kind == "scores"
            and arrays.get(f"{metric}/labels", arrays[SAMPLES]).shape != value.shape
        ):
            raise ValueError(f"{path}: {name} and {metric}/labels do not belong together")
    return arrays


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype.kind == "f" else array
