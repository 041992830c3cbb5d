"""Builder for PadChest.

Written for `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` (or `.csv.gz`) of BIMCV: one row
an image, with the Spanish report as published (lower case, stemmed) and its labels. The images are
16-bit PNG; those that `data/download.py padchest-images-512` makes of them have 8 bits.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilmedic.datasets.report_text import gloria_clean_report_chexpert
from vilmedic.errors import nearest
from vilmedic.preparation import command
from vilmedic.preparation.builders.folder_images import patients_together
from vilmedic.preparation.folder import Build, Dropped, Origin, Sample, split_by_patient
from vilmedic.preparation.splitting import plain_number
from vilmedic.tables import Missing, find_table, read_numbered

SCRIPT = "make_padchest"
ROOT = "data/SELFSUP/padchest"
TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
PROJECTIONS = ("PA", "L", "AP", "AP_horizontal", "COSTAL", "EXCLUDE")
KEPT = PROJECTIONS[:-1]  # the release marks images that are of no use as EXCLUDE
COLUMNS = ["ImageID", "ImageDir", "PatientID", "Projection", "Report", "Labels", "MethodLabel"]
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    return command.guarded(SCRIPT, lambda: _run(given))


def parse_labels(text: str) -> tuple[str, ...]:
    """The names in a text such as `['pneumonia', ' pleural effusion']`, without repetitions."""
    found = (first or second for first, second in _QUOTED.findall(text))
    cleaned = (" ".join(name.replace(",", " ").split()) for name in found)
    return tuple(dict.fromkeys(filter(None, cleaned)))


def build(given: argparse.Namespace, table: Path) -> Build:
    """Make the samples of all splits, one line per image."""
    dropped, missing = Dropped(), Missing(given.missing)
    listed: dict[Path, set[str]] = {}
    kept: list[Sample] = []
    for line, row in read_numbered(table, COLUMNS, missing):
        image, place, patient, projection, report, names, method = row
        # The release has folders 0 to 54; without a folder to look into, one folder is assumed.
        either = [image, f"{place}/{image}"] if given.images else [image]
        present = command.only_present(either, given.images, listed)
        labels = parse_labels(names)
        text = " ".join(report.split())
        reason = ""
        if not image:
            reason = "rows without an image"
        elif projection not in given.projection:
            reason = f"images of the projection {projection or '(blank)'}"
        elif given.physician and method != "Physician":
            reason = "images whose labels no physician gave"
        elif not text:
            reason = "images without a report"
        elif not gloria_clean_report_chexpert(text):
            reason = "images whose report has no sentence of two words"
        elif not labels:
            reason = "images without labels"
        elif not patient:
            reason = "images without a patient"
        elif not present:
            reason = "images that are not in the folder of images"
        else:
            kept.append(Sample((present[0],), text, labels, plain_number(patient)))
        if reason:
            dropped.add(reason, image, where=f"{table.name}:{line}")
    notes: dict[str, Any] = {}
    together = patients_together(kept, given.images, notes)
    samples = split_by_patient(kept, given.split, given.seed, together) if kept else {}
    return Build(samples, dropped, notes, missing=missing.counts)


def _run(given: argparse.Namespace) -> int:
    table = given.table if given.table.is_file() else find_table(given.table, TABLE)
    options = {
        name: getattr(given, name)
        for name in ("projection", "physician", "split", "seed", "missing")
    }
    inputs = command.input_facts({table.name: table}) | command.images_facts(given.images)
    origin = Origin(SCRIPT, "PadChest", "table of 160K images, 01.02.19", options, inputs)
    then = command.Next("config/SELFSUP/convirt-padchest.yml", ROOT, given.images)
    command.make(given.root, origin, lambda: build(given, table), force=given.force, then=then)
    return 0


def _projections(text: str) -> tuple[str, ...]:
    known = {name.lower(): name for name in PROJECTIONS}
    chosen = []
    for name in command.name_list(text):
        if name.lower() not in known:
            raise argparse.ArgumentTypeError(
                f"'{name}' is no projection; allowed are {', '.join(PROJECTIONS)}."
                f"{nearest(name, PROJECTIONS)}"
            )
        chosen.append(known[name.lower()])
    return tuple(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__ or "", ROOT)
    parser.add_argument(
        "--table", type=Path, default=Path("data/raw/padchest"), help="the table, or its folder"
    )
    parser.add_argument(
        "--projection",
        type=_projections,
        default=",".join(KEPT),
        metavar="PA,L,...",
        help="projections to keep",
    )
    parser.add_argument(
        "--physician", action="store_true", help="only images whose labels a physician gave"
    )
    command.add_split(parser)
    return parser
