"""The pictures of a run directory, by kind."""

from __future__ import annotations

import base64
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vilmedic.executors.evaluations import FOLDER, shown_folders
from vilmedic.report.thumbnails import webp

logger = logging.getLogger(__name__)

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Representations", ("*_full_*.png", "*_sampled_*.png")),
    ("Generated images", ("**/*generat*.png", "**/*generat*/**/*.png")),
    ("Reconstructions", ("**/*reconstruct*.png", "**/*reconstruct*/**/*.png")),
    ("Codebook", ("**/*codebook*.png",)),
    ("Attention", ("**/*attention*.png",)),
    ("Other pictures", ("**/*.png",)),
)
"""Title and patterns of each kind; a picture belongs to the first kind that fits."""

LEFT_OUT = ("curves.png",)
MOST = 12  # pictures of a kind
WIDEST = 1500  # pixels
QUALITY = 82
_CAPTIONS = ("caption", "prompt", "report", "text")


@dataclass
class Picture:
    """A picture of the page.

    Args:
        name: its path in the run directory.
        caption: words that belong to it; may be empty.
        data: a data URI.
        width: pixels across, for its place to be kept free.
        height: pixels down.
    """

    name: str
    caption: str
    data: str
    width: int
    height: int


@dataclass
class Kind:
    """Pictures that are shown together.

    Args:
        title: what they show.
        pictures: the first of them.
        left_out: how many more there are.
    """

    title: str
    pictures: list[Picture]
    left_out: int


def read_gallery(run_dir: Path) -> list[Kind]:
    """The pictures of a run directory, made smaller for the page.

    Of its evaluations those of the newest results; the others stay in their folders.
    """
    taken = {run_dir / name for name in LEFT_OUT}
    folders = shown_folders(run_dir)
    every = [
        {path for path in run_dir.rglob("*.png") if not _foreign(path, run_dir)},
        *(set(folder.rglob("*.png")) for folder in folders),
    ]
    kinds = []
    for title, patterns in KINDS:
        found = [
            path
            for base, paths in zip([run_dir, *folders], every, strict=True)
            for path in sorted({one for pattern in patterns for one in base.glob(pattern)} & paths)
            if path not in taken and path.is_file()
        ]
        taken.update(found)
        pictures = [picture for path in found[:MOST] if (picture := _read(path, run_dir))]
        if pictures:
            kinds.append(Kind(title, pictures, max(0, len(found) - MOST)))
    return kinds


def _foreign(path: Path, run_dir: Path) -> bool:
    """Whether a picture lies in a folder that a logger or an evaluation owns."""
    return path.relative_to(run_dir).parts[0] in ("wandb", "mlruns", "tensorboard", FOLDER)


def _read(path: Path, run_dir: Path) -> Picture | None:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if opened.mode not in ("L", "1") else "L")
        image.thumbnail((WIDEST, 2 * WIDEST), Image.Resampling.LANCZOS)
        data = base64.b64encode(webp(image, QUALITY)).decode("ascii")
    except (OSError, ValueError) as error:
        logger.warning("%s is left out of the report: %s", path, error)
        return None
    name = path.relative_to(run_dir).as_posix()
    return Picture(name, _caption(path), f"data:image/webp;base64,{data}", *image.size)


def _caption(path: Path) -> str:
    """What a JSON file of the same name says of a picture."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict):
        return ""
    return next((str(content[key]) for key in _CAPTIONS if content.get(key)), "")
