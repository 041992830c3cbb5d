"""Image gallery of the report page."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vilmedic.checkpoints.left_out import LeftOut, read_json
from vilmedic.checkpoints.run_directory import FIGURES
from vilmedic.drawing.images import webp
from vilmedic.evaluation.evaluations import FOLDER, shown_folders
from vilmedic.files import open_regular

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Representations", ("*_full_*.png", "*_sampled_*.png")),
    ("Generated images", ("**/*generat*.png", "**/*generat*/**/*.png")),
    ("Reconstructions", ("**/*reconstruct*.png", "**/*reconstruct*/**/*.png")),
    ("Codebook", ("**/*codebook*.png",)),
    ("Attention", ("**/*attention*.png",)),
    ("Other images", ("**/*.png",)),
)
"""Title and patterns of each kind; an image belongs to the first kind that fits."""

LEFT_OUT = ("curves.png",)
SHEET, SHEET_SETTINGS = "sheet.png", "settings.json"
MOST = 12  # images of a kind; of sheets all that fit
MOST_SHEETS = 4_000_000  # letters of all sheets together
WIDEST = 1500  # pixels
MOST_PIXELS = 2**27  # of an image that is made smaller, as of an image of a data set
QUALITY = 82
_CAPTIONS = ("caption", "prompt", "report", "text")


@dataclass
class Picture:
    """An image of the page.

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
    """Images that are shown together.

    Args:
        title: what they show.
        pictures: the first of them.
        left_out: how many more there are.
        wide: whether they are sheets, which take the whole width.
    """

    title: str
    pictures: list[Picture]
    left_out: int
    wide: bool = False


def read_gallery(run_dir: Path, left_out: LeftOut | None = None) -> list[Kind]:
    """The images of a run directory, made smaller for the page.

    Of its evaluations those of the newest results; the others stay in their folders. They stand
    before the images of the training, of which the latest step comes first.

    Args:
        run_dir: the directory.
        left_out: takes the images that cannot be read.
    """
    left_out = left_out or LeftOut(run_dir)
    taken = {run_dir / name for name in LEFT_OUT}
    folders = shown_folders(run_dir, left_out)
    every = [
        *(set(folder.rglob("*.png")) for folder in folders),
        {path for path in run_dir.rglob("*.png") if not _foreign(path, run_dir)},
    ]
    kinds = []
    for title, patterns in KINDS:
        found = [
            path
            for base, paths in zip([*folders, run_dir], every, strict=True)
            for path in _ordered(
                {one for pattern in patterns for one in base.glob(pattern)} & paths,
                run_dir / FIGURES,
            )
            if path not in taken
        ]
        taken.update(found)
        sheets = [path for path in found if path.name == SHEET]
        # What lies beside a sheet is on it.
        others = [p for p in found if p.name != SHEET and p.with_name(SHEET) not in sheets]
        pictures: list[Picture] = []
        left, waiting = MOST_SHEETS, iter(sheets)
        while left > 0 and (path := next(waiting, None)) is not None:
            picture = _read(path, run_dir, left_out)
            pictures += [picture] if picture else []
            left -= len(picture.data) if picture else 0
        more, waiting = len(list(waiting)), iter(others)
        shown = len(pictures)
        while len(pictures) < shown + MOST and (path := next(waiting, None)) is not None:
            picture = _read(path, run_dir, left_out)
            pictures += [picture] if picture else []
        if pictures:
            kinds.append(Kind(title, pictures, more + len(list(waiting)), wide=shown > 0))
    return kinds


def _ordered(paths: set[Path], training: Path) -> list[Path]:
    """Paths by their names and numbers (2 before 10); those of the training last, latest first."""
    of_training = {path for path in paths if training in path.parents}
    latest = sorted(sorted(of_training, key=_parts), key=lambda p: _parts(p.parent), reverse=True)
    return [*sorted(paths - of_training, key=_parts), *latest]


def _parts(path: Path) -> list[str | int]:
    pieces = re.split(r"([0-9]+)", path.as_posix())
    return [int(piece) if number % 2 else piece for number, piece in enumerate(pieces)]


def _foreign(path: Path, run_dir: Path) -> bool:
    """Return whether an image lies in a folder that a logger or an evaluation owns."""
    return path.relative_to(run_dir).parts[0] in ("wandb", "mlruns", "tensorboard", FOLDER)


def _read(path: Path, run_dir: Path, left_out: LeftOut) -> Picture | None:
    with left_out.damaged(path):
        # Of this format alone: Pillow knows others by their content, some of which start programs.
        with open_regular(path) as stream, Image.open(stream, formats=("PNG",)) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"its {width:,} x {height:,} pixels are more than {MOST_PIXELS:,}")
            image = opened.convert("RGB" if opened.mode not in ("L", "1") else "L")
        image.thumbnail((WIDEST, 2 * WIDEST), Image.Resampling.LANCZOS)
        data = base64.b64encode(webp(image, QUALITY)).decode("ascii")
        name = path.relative_to(run_dir).as_posix()
        beside = path.with_name(SHEET_SETTINGS) if path.name == SHEET else path.with_suffix(".json")
        caption = _caption(beside, left_out)
        return Picture(name, caption, f"data:image/webp;base64,{data}", *image.size)
    return None


def _caption(path: Path, left_out: LeftOut) -> str:
    """The caption of an image from a JSON file of the same name."""
    content = None
    if path.exists():
        with left_out.damaged(path):
            content = read_json(path)
    if not isinstance(content, dict):
        return ""
    return next((str(content[key]) for key in _CAPTIONS if content.get(key)), "")
