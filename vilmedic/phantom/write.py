"""Writing of a phantom data set to disk, and a preview sheet."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vilmedic.errors import DataError
from vilmedic.files import core_count, sha256_of
from vilmedic.log import Progress
from vilmedic.phantom import FINDINGS, NO_FINDING, SPLITS, VERSION
from vilmedic.phantom.case import Case, draw_case
from vilmedic.phantom.render import Place, render
from vilmedic.phantom.report import impression_text, report_text

GENERATOR = "vilmedic.phantom"
CARD = "card.json"
SIZES = (32, 1024)
COLUMNS = ROWS = 5
TILE, CAPTION, GAP = 160, 40, 6


@dataclass(frozen=True)
class Plan:
    """Settings of a phantom data set; the same plan gives the same data set.

    Attributes:
        train: number of training samples.
        validate: number of validation samples.
        test: number of test samples.
        size: pixels a side.
        seed: seed of all that is drawn.
    """

    train: int = 4000
    validate: int = 500
    test: int = 500
    size: int = 128
    seed: int = 0

    def count(self, split: str) -> int:
        """The number of samples in a split."""
        return int(getattr(self, split))


@dataclass(frozen=True)
class SampleLines:
    """The line of one sample in each of its split's files."""

    image: str
    report: str
    impression: str
    labels: str
    finding: str


def build(root: Path, plan: Plan, *, force: bool = False, workers: int = 0) -> bool:
    """Builds a data set in `root`, unless the very same is there already.

    It is built in a folder beside `root` that is renamed when all is written, so that an
    interrupted run leaves nothing that looks complete.

    Args:
        root: folder of the data set; must not exist, be empty, or hold a phantom data set.
        plan: what to build.
        force: replace the phantom data set in `root`, whatever it was made from.
        workers: processes to use, 0 for one per core; the result does not depend on it.

    Returns:
        Whether anything was built.

    Raises:
        DataError: `root` holds something else.
    """
    if not _is_free(root, plan, force):
        return False
    partial_root = root.with_name(f".{root.name}.partial-{os.getpid()}")
    try:
        total = sum(map(plan.count, SPLITS))
        with Progress(f"Building {root}", total, "samples") as shown:
            rows = {
                split: _write_split(partial_root, split, plan, workers, shown) for split in SPLITS
            }
        text = json.dumps(_card(partial_root, plan, rows), indent=2)
        (partial_root / CARD).write_text(text + "\n", encoding="utf-8")
        if root.exists():
            shutil.rmtree(root)
        partial_root.rename(root)
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    return True


def make_row(root: Path, split: str, plan: Plan, index: int) -> SampleLines:
    """Writes the image of one sample and returns its lines."""
    case = draw_case(plan.seed, split, index)
    drawn = render(case, plan.size)
    name = f"{split}/{index:05d}.png"
    Image.fromarray(drawn.pixels).save(root / "images" / name, compress_level=4)
    labels = ",".join(label_names(case))
    texts = report_text(case), impression_text(case)
    return SampleLines(name, *texts, labels, finding_record(case, drawn.places))


def label_names(case: Case) -> tuple[str, ...]:
    """The labels of a case: its findings, or the one that says there is none."""
    return tuple(finding.name for finding in case.findings) or (NO_FINDING,)


def finding_record(case: Case, places: dict[str, list[Place]]) -> str:
    """One line of JSON: of each finding its side, severity and places in the image."""
    record = {
        finding.name: {
            "side": finding.side or None,
            "severity": finding.severity,
            "zone": finding.parts[0].zone or None,
            "parts": [
                {
                    "side": place.side or None,
                    "box": [round(value, 4) for value in place.box],
                    "centre": [round(value, 4) for value in place.centre],
                }
                for place in places[finding.name]
            ],
        }
        for finding in case.findings
    }
    return json.dumps(record)


def write_sheet(path: Path, seed: int) -> None:
    """Draws the first 25 training cases of a seed.

    Args:
        path: PNG file to write; its folder is made.
        seed: seed of the data set.
    """
    cell = (TILE + GAP, TILE + CAPTION + GAP)
    sheet = Image.new("L", (COLUMNS * cell[0] + GAP, ROWS * cell[1] + GAP), 255)
    pen = ImageDraw.Draw(sheet)
    for index in range(COLUMNS * ROWS):
        case = draw_case(seed, "train", index)
        left = GAP + index % COLUMNS * cell[0]
        top = GAP + index // COLUMNS * cell[1]
        sheet.paste(Image.fromarray(render(case, TILE).pixels), (left, top))
        pen.multiline_text((left, top + TILE + 2), caption(case), fill=0, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def caption(case: Case) -> str:
    """The findings of a case, one per line."""
    lines = [
        " ".join(word for word in (finding.severity, finding.side, finding.name.lower()) if word)
        for finding in case.findings
    ]
    return "\n".join(lines) or "no finding"


def _is_free(root: Path, plan: Plan, force: bool) -> bool:
    """Return whether to build in `root`: False when it holds this plan's data set already."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return True
    card = _read_card(root)
    if card.get("generator") != GENERATOR:
        raise DataError(
            f"{root}: is not empty and not a phantom data set, so it is left alone. "
            "Give another folder with --root."
        )
    if force:
        return True
    made_from = {**card.get("arguments", {}), "version": card.get("version")}
    wanted = {**asdict(plan), "version": VERSION}
    differs = [key for key, value in wanted.items() if made_from.get(key) != value]
    if differs:
        listed = ", ".join(
            f"{key} {made_from.get(key)} instead of {wanted[key]}" for key in differs
        )
        raise DataError(
            f"{root}: holds a phantom data set made with {listed}. "
            "Replace it with --force or give another folder with --root."
        )
    if not _is_complete(root, plan, card):
        raise DataError(f"{root}: files are missing or were changed. Build it again with --force.")
    return False


def _read_card(root: Path) -> dict[str, Any]:
    try:
        card = json.loads((root / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _is_complete(root: Path, plan: Plan, card: dict[str, Any]) -> bool:
    for name, digest in card.get("sha256", {}).items():
        path = root / name
        if not path.is_file() or sha256_of(path) != digest:
            return False
    for split in SPLITS:
        folder = root / "images" / split
        found = len(list(folder.glob("*.png"))) if folder.is_dir() else 0
        if found != plan.count(split):
            return False
    return True


def _write_split(
    root: Path, split: str, plan: Plan, workers: int, shown: Progress
) -> list[SampleLines]:
    (root / "images" / split).mkdir(parents=True)
    rows = []
    for row in _make_rows(root, split, plan, workers):
        rows.append(row)
        shown.update()
    for name, lines in (
        ("image.tok", [row.image for row in rows]),
        ("report.tok", [row.report for row in rows]),
        ("impression.tok", [row.impression for row in rows]),
        ("label.tok", [row.labels for row in rows]),
        ("finding.jsonl", [row.finding for row in rows]),
    ):
        text = "".join(f"{line}\n" for line in lines)
        (root / f"{split}.{name}").write_text(text, encoding="utf-8", newline="\n")
    return rows


def _make_rows(root: Path, split: str, plan: Plan, workers: int) -> Iterator[SampleLines]:
    make = partial(make_row, root, split, plan)
    workers = min(workers or core_count(), max(1, plan.count(split) // 50))
    if workers == 1:
        yield from map(make, range(plan.count(split)))
        return
    # Fresh processes rather than forks: the caller may be running threads.
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(make, range(plan.count(split)), chunksize=25)


def _card(root: Path, plan: Plan, rows: dict[str, list[SampleLines]]) -> dict[str, Any]:
    counts = {}
    for split, lines in rows.items():
        seen = Counter(label for row in lines for label in row.labels.split(","))
        counts[split] = {name: seen[name] for name in (*FINDINGS, NO_FINDING)}
    files = sorted(path for path in root.iterdir() if path.suffix in (".tok", ".jsonl"))
    return {
        "generator": GENERATOR,
        "version": VERSION,
        "arguments": asdict(plan),
        "sides": "the patient's; the patient's right is on the left of the image",
        "counts": counts,
        "sha256": {path.name: sha256_of(path) for path in files},
    }
