"""Predictions of each protocol for every sample, as an npz file.

`predictions_<split>.npz` is an archive of arrays without pickled objects: `numpy.load` reads it.
docs/evaluation.md lists the arrays.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vilmedic.errors import DataError

VERSION = 1
"""Of the arrays and their names."""


def predictions_name(split: str) -> str:
    """The name of the file of a split."""
    return f"predictions_{split}.npz"


def pack_predictions(
    samples: Mapping[str, NDArray[Any]], protocols: Mapping[str, Mapping[str, NDArray[Any]]]
) -> bytes:
    """The content of the file.

    Args:
        samples: what is known of the samples whatever the protocol: lines, paths, labels.
        protocols: what each protocol recorded, by its name in the results.
    """
    arrays: dict[str, NDArray[Any]] = {"version": np.array(VERSION), **samples}
    for name, recorded in protocols.items():
        arrays |= {f"{name}/{key}": value for key, value in recorded.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_predictions(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a file that an evaluation wrote, by name.

    Raises:
        DataError: there is no such file, it is damaged, or a later version wrote it.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        version = int(arrays["version"])
    except Exception as error:  # zip, zlib and numpy each raise their own
        raise DataError(
            f"{path}: holds no predictions ({type(error).__name__}: {error})."
        ) from None
    if version > VERSION:
        raise DataError(f"{path}: is of version {version}; this program reads up to {VERSION}.")
    return arrays
