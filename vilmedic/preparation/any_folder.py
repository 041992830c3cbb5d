"""Builds a folder to train on from any folder of images with a CSV, a JSONL or DICOM headers.

    python data/make_folder.py --images scans --table reports.csv --image-column file \\
        --report-column report --label-columns diagnosis --group-column patient --split 0.8,0.1,0.1

Columns of DICOM headers are the standard's keywords, such as `PatientID` or `ImageComments`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vilmedic.errors import DataError, nearest
from vilmedic.preparation import command
from vilmedic.preparation.folder import Build, Origin, Sample, split_by_patient
from vilmedic.preparation.folder_images import ImageFolder, groups_of_images, repeated_images
from vilmedic.preparation.folder_table import (
    NO_PICTURE,
    UNREADABLE,
    Row,
    columns_of,
    read_headers,
    read_rows,
)
from vilmedic.preparation.labels import NO_FINDING
from vilmedic.preparation.splitting import SPLITS

SCRIPT = "make_folder"
_TRUE = frozenset({"1", "1.0", "true", "yes", "y"})
_FALSE = frozenset({"0", "0.0", "-1", "-1.0", "false", "no", "n", ""})
_BETWEEN = re.compile(r"[,;|]")
_WORD = re.compile(r"\w")
# Names of splits as tables have them.
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validate": "validate",
    "validation": "validate",
    "valid": "validate",
    "val": "validate",
    "dev": "validate",
    "test": "test",
    "testing": "test",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if (given.table is None) == (not given.dicom):
        parser.error("give either --table or --dicom")
    if given.table is not None and not given.image_column:
        parser.error("a table needs --image-column")
    return command.guarded(SCRIPT, lambda: _run(given))


def build(
    given: argparse.Namespace,
    folder: ImageFolder,
    rows: Sequence[Row],
    images: Sequence[Sequence[str]],
) -> Build:
    """Make the samples of all splits.

    Args:
        given: the options.
        folder: where the images are.
        rows: of the table or of the headers.
        images: paths that each row names.
    """
    dropped: Counter[str] = Counter()
    binary = _binary_columns(given.label_columns, rows)
    kept: list[tuple[Sample, str]] = []
    for row, paths in zip(rows, images, strict=True):
        report = " ".join(row[given.report_column]) if given.report_column else ""
        labels = _labels(given, row, binary)
        group = " ".join(row[given.group_column]) if given.group_column else ""
        present = [path for path in paths if folder.holds(path)]
        if UNREADABLE in row:
            dropped["DICOM files that cannot be read"] += 1
        elif NO_PICTURE in row:
            dropped["DICOM files without a picture"] += 1
        elif not paths:
            dropped["rows without an image"] += 1
        elif not present and any(folder.holds_in_other_case(path) for path in paths):
            dropped["rows whose image has a name in other small and capital letters"] += 1
        elif not present:
            dropped["rows whose image is not in the folder"] += 1
        elif given.report_column and not _WORD.search(report):
            dropped["rows without a report"] += 1
        elif given.label_columns and not labels:
            dropped["rows without labels"] += 1
        elif given.group_column and not group:
            dropped["rows without a group"] += 1
        else:
            dropped["images that are not in the folder"] += len(paths) - len(present)
            split = _split_name(given, row) if given.split_column else ""
            kept.append((Sample(tuple(present), report, labels, group), split))
    if not given.group_column:
        groups = groups_of_images([sample.images for sample, _ in kept])
        kept = [
            (replace(sample, patient=group), split)
            for (sample, split), group in zip(kept, groups, strict=True)
        ]
    if given.split_column:
        samples = {name: [s for s, split in kept if split == name] for name in SPLITS}
    elif kept:
        samples = split_by_patient([sample for sample, _ in kept], given.split, given.seed)
    else:
        samples = {}
    return Build(samples, +dropped, _notes(given, samples))


def _run(given: argparse.Namespace) -> int:
    if not given.images.is_dir():
        raise DataError(f"There is no folder {given.images} (given with --images).")
    options: dict[str, Any] = {
        name: getattr(given, name)
        for name in (
            "image_column",
            "ext",
            "report_column",
            "label_columns",
            "group_column",
            "split_column",
            "no_label",
        )
    }
    if not given.split_column:
        options |= {"split": given.split, "seed": given.seed}
    if given.table is not None and not given.table.is_file():
        raise DataError(f"There is no file {given.table} (given with --table).")
    folder = ImageFolder(given.images, given.ext)
    rows = list(_rows(given))
    if given.table is None:
        source = "DICOM headers"
        images = [row[""] for row in rows]
        content = json.dumps(rows).encode()
        inputs = {"headers": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    else:
        source = given.table.name
        images = [folder.paths(row[given.image_column]) for row in rows]
        inputs = command.input_facts({source: given.table})
    inputs["list of images"] = folder.facts(images)
    origin = Origin(SCRIPT, source, "any folder of images", options, inputs)
    command.make(given.root, origin, lambda: build(given, folder, rows, images), force=given.force)
    return 0


def _rows(given: argparse.Namespace) -> Iterator[Row]:
    wanted = [given.image_column, given.report_column, *given.label_columns]
    wanted += [given.group_column, given.split_column]
    columns = list(dict.fromkeys(name for name in wanted if name))
    if given.table is None:
        yield from read_headers(given.images, columns, given.workers)
        return
    known = columns_of(given.table)
    missing = [name for name in columns if name not in known]
    if missing:
        raise DataError(
            f"{given.table} has no column '{missing[0]}'. It has {', '.join(known)}."
            f"{nearest(missing[0], known)}"
        )
    yield from read_rows(given.table, columns)


def _binary_columns(columns: Sequence[str], rows: Sequence[Row]) -> set[str]:
    """Columns that hold yes or no; their names are the labels."""
    binary = set()
    for name in columns:
        values = {value.lower() for row in rows for value in row[name] or [""]}
        if values != {""} and values <= _TRUE | _FALSE:
            binary.add(name)
    return binary


def _labels(given: argparse.Namespace, row: Row, binary: set[str]) -> tuple[str, ...]:
    found = []
    for name in given.label_columns:
        if name in binary:
            if any(value.lower() in _TRUE for value in row[name]):
                found.append(_BETWEEN.sub(" ", name))
        else:
            found += [part.strip() for value in row[name] for part in _BETWEEN.split(value)]
    unique = tuple(dict.fromkeys(filter(None, found)))
    if not unique and binary and binary == set(given.label_columns):
        return (given.no_label,)
    return unique


def _split_name(given: argparse.Namespace, row: Row) -> str:
    value = " ".join(row[given.split_column])
    if value.lower() not in _SPLIT_NAMES:
        raise DataError(
            f"The column '{given.split_column}' says '{value}'; allowed are "
            f"{', '.join(_SPLIT_NAMES)}.{nearest(value, _SPLIT_NAMES)}"
        )
    return _SPLIT_NAMES[value.lower()]


def _notes(given: argparse.Namespace, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    if not given.group_column:
        notes["splits"] = "by row, as no --group-column says which rows are of one patient"
        rows = [sample.images for lines in samples.values() for sample in lines]
        if repeated := repeated_images(rows):
            notes["images in several rows, which stay together"] = repeated
    of_split = {split: {sample.patient for sample in lines} for split, lines in samples.items()}
    seen = Counter(patient for patients in of_split.values() for patient in patients)
    shared = sum(number > 1 for number in seen.values())
    if shared:
        notes["groups that are in several splits"] = shared
    return notes


def _extension(text: str) -> str:
    return f".{text.removeprefix('.')}" if text else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Builds a folder to train on from any folder of images with a table or DICOM "
        "headers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder to build")
    add("--images", type=Path, required=True, help="folder of the images")
    add("--table", type=Path, help="CSV or JSONL file (.gz is fine), one row a sample")
    add("--dicom", action="store_true", help="take the columns from the headers of DICOM files")
    add("--image-column", default="", help="path of the image in --images, several with commas")
    add(
        "--ext",
        type=_extension,
        default="",
        help="extension of paths that are written without, such as .png",
    )
    add("--report-column", default="", help="the report")
    add(
        "--label-columns",
        type=command.names,
        default="",
        metavar="NAME,...",
        help="columns of names (separated by , ; or |), or of 0 and 1 whose names are the labels",
    )
    add("--no-label", default=NO_FINDING, help="label of a row with 0 in all label columns")
    add("--group-column", default="", help="what must not be in two splits: the patient")
    add("--split-column", default="", help="the split, where the table has one")
    command.add_split(parser)
    command.add_workers(parser)
    add("--force", action="store_const", const="all", help="replace the build that is there")
    return parser
