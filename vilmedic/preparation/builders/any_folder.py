"""Builder for any folder of images with CSV, JSON or DICOM headers.

    python data/make_folder.py --images scans --table reports.csv --image-column file \\
        --report-column report --label-columns diagnosis --group-column patient --split 0.8,0.1,0.1

Columns of DICOM headers are the standard's keywords, such as `PatientID` or `ImageComments`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import brief, listed
from vilmedic.encodings import known_encoding
from vilmedic.errors import DataError, nearest
from vilmedic.log import counted
from vilmedic.preparation import command
from vilmedic.preparation.builders.chexpert import NO_FINDING
from vilmedic.preparation.builders.folder_headers import read_headers
from vilmedic.preparation.builders.folder_images import (
    COPIES,
    FoundImage,
    ImageFolder,
    connected,
    copies,
    name_differences,
    repeated_images,
    same_content,
    settled,
)
from vilmedic.preparation.builders.folder_table import UNCERTAIN_CELLS, LabelColumns, Row, read_rows
from vilmedic.preparation.folder import Build, Dropped, Origin, Sample, split_by_patient
from vilmedic.preparation.splitting import SPLIT_NAMES, SPLITS, group_key, parse_shares
from vilmedic.script import argument_parser
from vilmedic.tables import Missing, encoding_of

SCRIPT = "make_folder"
SPLIT = "0.8,0.1,0.1"
_WORD = re.compile(r"\w")
_GROUP = "group "
# Reasons for leaving out an image of a row, for rows with one image and with several.
_ABSENT = {
    "missing": (
        "rows whose image is not in the folder",
        "images of a list that are not in the folder",
    ),
    "ambiguous": (
        "rows whose image could be several files by its name",
        "images of a list that could be several files by their names",
    ),
}


@dataclass(frozen=True)
class Kept:
    """A row that becomes a line."""

    row: Row
    sample: Sample
    split: str


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
    images: Sequence[Sequence[FoundImage]],
    missing: Missing,
    dropped: Dropped,
) -> Build:
    """Make the samples of all splits.

    Args:
        given: the options.
        folder: where the images are.
        rows: of the table or of the headers.
        images: that each row names.
        missing: which values are missing, with counts.
        dropped: what was left out so far; receives the rest.
    """
    labels = LabelColumns(given.label_columns, rows, missing, given.uncertain, given.no_label)
    kept = _kept(given, folder, rows, images, labels, dropped)
    notes: dict[str, Any] = {
        f"images found under a name that differs in {how}": number
        for how, number in name_differences(images).items()
    }
    notes |= labels.notes | _character_sets(rows)
    same = same_content(folder.root, [path for one in kept for path in one.sample.images])
    own = own_splits(given, rows)
    if own and given.leaks == "leave-out":
        kept = _without_leaks(kept, same, dropped)
    kept, together = _together(given, kept, same, own, notes)
    if own:
        notes["splits"] = "those of the table"
        samples = {name: [one.sample for one in kept if one.split == name] for name in SPLITS}
        if not kept:
            samples = {}
    elif kept:
        shares = given.split or parse_shares(SPLIT)
        try:
            samples = split_by_patient([one.sample for one in kept], shares, given.seed, together)
        except DataError as error:
            held = f" {listed(copies(same), 'image')} of the same content stay together."
            raise DataError(f"{error}{held if same else ''}") from None
    else:
        samples = {}
    _note_shared(samples, same, notes)
    if same:
        notes[COPIES] = copies(same)
    return Build(samples, dropped, notes, missing=missing.counts)


def own_splits(given: argparse.Namespace, rows: Sequence[Row]) -> bool:
    """Return whether the splits are those of the table rather than random ones."""
    return bool(given.split_column) or (given.split is None and any(row.split for row in rows))


def _kept(
    given: argparse.Namespace,
    folder: ImageFolder,
    rows: Sequence[Row],
    images: Sequence[Sequence[FoundImage]],
    labels: LabelColumns,
    dropped: Dropped,
) -> list[Kept]:
    """The rows that become lines."""
    own = own_splits(given, rows)
    kept: list[Kept] = []
    for row, found in zip(rows, images, strict=True):
        present = tuple(one.path for one in found if one.state == "there")
        absent = [one for one in found if one.state != "there"]
        report, group = row.text(given.report_column), row.text(given.group_column)
        named = labels.of(row)
        split = _split_name(given, row) if own else ""
        if not found:
            reason = "rows without an image"
        elif not present:
            reason = _ABSENT[absent[0].state][0]
        elif any("\n" in path or not _is_text(path) for path in present):
            reason = "rows whose image has a name with a line end or bytes that are not UTF-8"
        elif given.report_column and not _WORD.search(report):
            reason = "rows without a report"
        elif given.label_columns and not named:
            reason = "rows without labels"
        elif given.group_column and not group:
            reason = "rows without a group"
        elif own and not split:
            reason = "rows without a split"
        else:
            reason = ""
            kept.append(Kept(row, Sample(present, report, named, group), split))
        if reason:
            dropped.add(reason, ", ".join(one.name for one in found), where=row.place)
        elif absent:
            reason = _ABSENT[absent[0].state][1]
            for one in absent:
                dropped.add(_ABSENT[one.state][1], one.name, where=row.place)
        if absent and reason in _ABSENT[absent[0].state] and reason not in dropped.hints:
            dropped.hints[reason] = folder.hint(absent[0])
    return kept


def _together(
    given: argparse.Namespace,
    kept: Sequence[Kept],
    same: dict[str, str],
    own: bool,
    notes: dict[str, Any],
) -> tuple[list[Kept], list[str]]:
    """Return the rows with their groups, and for each the name of the unit kept in one split."""
    keys = [_keys(one, same) for one in kept]
    units = connected(keys)
    if not given.group_column:
        repeated = repeated_images([one.sample.images for one in kept])
        if not own:
            notes["splits"] = "by row, as no --group-column says which rows are of one patient"
        if repeated and not own:
            notes["images in several rows, which stay together"] = repeated
        names: dict[str, str] = {}
        for one, unit in zip(kept, units, strict=True):
            names.setdefault(unit, one.sample.images[0])
        grouped = [
            replace(one, sample=replace(one.sample, patient=names[unit]))
            for one, unit in zip(kept, units, strict=True)
        ]
        return grouped, [names[unit] for unit in units]
    members: dict[str, dict[str, None]] = defaultdict(dict)
    for one, unit in zip(kept, units, strict=True):
        members[unit][one.sample.patient] = None
    joined = [
        " and ".join(f"'{brief(name)}'" for name in names)
        for names in members.values()
        if len(names) > 1
    ]
    if joined and not own:
        notes["groups that stay together, being one number or sharing an image"] = joined
    # A unit is named by its first group, so that units of one group are split as before.
    return list(kept), [next(iter(members[unit])) for unit in units]


def _without_leaks(kept: Sequence[Kept], same: dict[str, str], dropped: Dropped) -> list[Kept]:
    """The rows that share neither a group nor an image with a later split, in the table's splits.

    A row of the training data goes rather than one of validation, and that rather than one of test.
    """
    last: dict[str, int] = {}
    for one in kept:
        for key in _keys(one, same):
            last[key] = max(last.get(key, 0), SPLITS.index(one.split))
    clean = []
    for one in kept:
        later = [key for key in _keys(one, same) if last[key] > SPLITS.index(one.split)]
        if not later:
            clean.append(one)
            continue
        what = "group" if later[0].startswith(_GROUP) else "image"
        dropped.add(
            f"rows whose {what} is in a later split as well",
            ", ".join(one.sample.images),
            where=one.row.place,
            hint="--leaks keep keeps them in both.",
        )
    return clean


def _keys(one: Kept, same: dict[str, str]) -> list[str]:
    """Return the values that rows of different splits must not share."""
    group = [f"{_GROUP}{group_key(one.sample.patient)}"] if one.sample.patient else []
    images = [f"image {path}" for path in one.sample.images]
    contents = [f"content {same[path]}" for path in one.sample.images if path in same]
    return [*group, *images, *contents]


def _character_sets(rows: Sequence[Row]) -> dict[str, Any]:
    """Note headers without a character set, and those for which it is doubtful."""
    notes: dict[str, Any] = {}
    found = Counter(row.encoding for row in rows if row.encoding and not row.doubtful)
    for name, number in sorted(found.items()):
        notes[f"headers in {name}, which they do not declare"] = number
    doubtful = {row.path: row.encoding for row in rows if row.doubtful}
    if doubtful:
        notes["headers in a doubtful character set, which --encoding sets"] = len(doubtful)
        notes["the doubtful ones, and what they were read as"] = doubtful
    return notes


def _run(given: argparse.Namespace) -> int:
    if not given.images.is_dir():
        raise DataError(f"There is no folder {given.images} (given with --images).")
    given.encoding = known_encoding(given.encoding) if given.encoding else ""
    if given.table is not None and not given.table.is_file():
        raise DataError(f"There is no file {given.table} (given with --table).")
    missing, dropped = Missing(given.missing), Dropped()
    folder = ImageFolder(given.images, given.ext)
    rows = _rows(given, missing, dropped)
    if given.table is None:
        source = "DICOM headers"
        images = [[folder.find(row.path)] for row in rows]
        content = json.dumps([[row.path, row.values] for row in rows]).encode()
        inputs = {"headers": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}}
    else:
        source = given.table.name
        images = _images(folder, rows, given.image_column)
        inputs = command.input_facts({source: given.table})
    inputs["list of images"] = folder.facts(images)
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
            "encoding",
            "uncertain",
            "leaks",
        )
    }
    options["missing"] = missing.markers
    if not own_splits(given, rows):
        options |= {"split": given.split or parse_shares(SPLIT), "seed": given.seed}

    def make() -> Build:
        made = build(given, folder, rows, images, missing, dropped)
        if given.table is not None:
            encoding = encoding_of(given.table, given.encoding)
            if not encoding.startswith("utf-8"):
                made.notes["encoding of the table"] = encoding
        return made

    origin = Origin(SCRIPT, source, "any folder of images", options, inputs)
    then = command.Next(images=given.images)
    command.make(given.root, origin, make, force=given.force, then=then)
    return 0


def _rows(given: argparse.Namespace, missing: Missing, dropped: Dropped) -> list[Row]:
    wanted = [given.image_column, given.report_column, *given.label_columns]
    wanted += [given.group_column, given.split_column]
    columns = list(dict.fromkeys(name for name in wanted if name))
    if given.table is None:
        return read_headers(given.images, columns, missing, dropped, given.workers, given.encoding)
    return read_rows(given.table, columns, missing, given.encoding)


def _images(folder: ImageFolder, rows: Sequence[Row], column: str) -> list[list[FoundImage]]:
    """The images of all rows; all problems are reported together."""
    found: list[list[FoundImage]] = []
    faults: list[str] = []
    for row in rows:
        try:
            found.append(folder.images(row.values[column], row.where))
        except DataError as error:
            faults.append(str(error))
    if faults:
        more = (
            f" (and {counted(len(faults) - 1, 'more row')} of this kind)" if len(faults) > 1 else ""
        )
        raise DataError(f"{faults[0]}{more}")
    return settled(found)


def _is_text(path: str) -> bool:
    """Return whether a path can be written as UTF-8; file systems allow any bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split_name(given: argparse.Namespace, row: Row) -> str:
    """The split of a row; empty when its cell is missing."""
    value = row.text(given.split_column) if given.split_column else row.split
    if value and value.lower() not in SPLIT_NAMES:
        raise DataError(
            f"{row.where}: the column '{given.split_column}' says '{brief(value)}'; allowed are "
            f"{', '.join(SPLIT_NAMES)}.{nearest(value, SPLIT_NAMES)}"
        )
    return SPLIT_NAMES[value.lower()] if value else ""


def _note_shared(
    samples: dict[str, list[Sample]], same: dict[str, str], notes: dict[str, Any]
) -> None:
    """Note groups and images shared between the table's own splits, if they are kept."""
    of_group: dict[str, set[str]] = defaultdict(set)
    of_image: dict[str, set[str]] = defaultdict(set)
    named: dict[str, str] = {}
    for split, lines in samples.items():
        for sample in lines:
            if sample.patient:
                of_group[group_key(sample.patient)].add(split)
            for path in sample.images:
                named.setdefault(same.get(path, path), path)
                of_image[named[same.get(path, path)]].add(split)
    for what, splits in (("groups", of_group), ("images", of_image)):
        shared = [name for name, inside in splits.items() if len(inside) > 1]
        if shared:
            notes[f"{what} that are in several splits"] = len(shared)
            notes[f"{what} that are in several splits, by name"] = shared


def _extension(text: str) -> str:
    return f".{text.removeprefix('.')}" if text else ""


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(
        "Builds a folder to train on from any folder of images with a table or DICOM headers."
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder to build")
    add("--images", type=Path, required=True, help="folder of the images")
    add("--table", type=Path, help="CSV, JSON or JSONL file (.gz is fine), one row per sample")
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
        type=command.name_list,
        default="",
        metavar="NAME,...",
        help="columns of names (separated by , ; or |), or of 0 and 1 whose names are the labels",
    )
    add(
        "--uncertain",
        choices=UNCERTAIN_CELLS,
        default="uncertain",
        help="what -1 in a column of 0 and 1 counts as: a label of its own such as 'uncertain "
        "edema', absent, or an error",
    )
    add(
        "--encoding",
        default="",
        metavar="NAME",
        help="character set of the table, or of texts in DICOM headers outside ASCII whatever the "
        "headers declare, such as gb18030 (none: found from the texts)",
    )
    add("--no-label", default=NO_FINDING, help="label of a row with 0 in all label columns")
    add("--group-column", default="", help="column of the patient, who is kept in one split")
    add("--split-column", default="", help="the split, where the table has one")
    add(
        "--leaks",
        choices=["leave-out", "keep"],
        default="leave-out",
        help="rows of the table's own splits whose group or image is in a later split as well",
    )
    command.add_missing(parser)
    command.add_split(parser)
    parser.set_defaults(split=None)
    command.add_workers(parser)
    add("--force", action="store_const", const="all", help="replace an existing build")
    return parser
