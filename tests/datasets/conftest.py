from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPORTS = [
    "No pleural effusion. Heart size is normal.",
    "Small left pleural effusion. No pneumothorax.",
    "Moderate cardiomegaly. The lungs are clear. No effusion is seen.",
    "Right upper lobe pneumonia.",
]
LABELS = ["No Finding", "Pleural Effusion", "Cardiomegaly", "Pneumonia"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set with 8 training and 4 validation samples of grey 20 x 16 images."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, size in (("train", 8), ("validate", 4)):
        names = [f"{split}_{number}.png" for number in range(size)]
        for name in names:
            pixels = rng.integers(0, 256, (20, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
        rows = {"image": names, "report": REPORTS * 2, "label": LABELS * 2}
        for kind, lines in rows.items():
            (folder / f"{split}.{kind}.tok").write_text("\n".join(lines[:size]) + "\n")
    return folder


@pytest.fixture
def write(root: Path) -> Callable[[str, Sequence[str]], Path]:
    """Overwrite a line file of the data set."""

    def write_lines(name: str, lines: Sequence[str]) -> Path:
        path = root / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write_lines


@pytest.fixture
def runtime(root: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The runtime arguments of a data set, selected by name."""

    def arguments(*names: str, **changes: Any) -> dict[str, Any]:
        every = {"split": "train", "training": True, "seed": 1, "run_dir": tmp_path / "run"}
        every["root"] = str(root)
        return {name: every[name] for name in (*names, "split", "root")} | changes

    return arguments


@pytest.fixture
def image_args(runtime: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Arguments of an ImageDataset with tiny images."""

    def arguments(**changes: Any) -> dict[str, Any]:
        return runtime("training", "seed") | {"resize": 14, "crop": 12} | changes

    return arguments


@pytest.fixture
def text_args(runtime: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Arguments of a TextDataset."""

    def arguments(**changes: Any) -> dict[str, Any]:
        return runtime("training", "seed", "run_dir") | changes

    return arguments


@pytest.fixture
def label_args(runtime: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Arguments of a LabelDataset."""

    def arguments(**changes: Any) -> dict[str, Any]:
        return runtime("run_dir") | changes

    return arguments
