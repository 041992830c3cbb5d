"""Builds the folder that the MIMIC-CXR configurations train on from the published archives.

Written for the reports of MIMIC-CXR 2.1.0 (`mimic-cxr-reports.zip`, or its folder `files`) and the
tables of MIMIC-CXR-JPG 2.1.0 (`mimic-cxr-2.0.0-split`, `-metadata` and `-chexpert`, `.csv.gz` or
`.csv`; their names still say 2.0.0 in that release).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vilmedic.datasets.report_cleaning import r2gen_clean_report
from vilmedic.errors import DataError, nearest
from vilmedic.preparation import command
from vilmedic.preparation.folder import Build, Origin, Sample, gather
from vilmedic.preparation.labels import CHEXPERT_LABELS, present_labels
from vilmedic.preparation.report_files import Reports, locate_reports, read_reports
from vilmedic.preparation.splitting import (
    SPLITS,
    label_shares,
    stratified_split,
    unevenness,
)
from vilmedic.preparation.tables import find_table, read_table

SCRIPT = "make_mimic_cxr"
ROOTS = {
    ("both", False): "data/SELFSUP/mimic-cxr",
    ("both", True): "data/SELFSUP/mimic-cxr-balanced",
    ("impression", False): "data/CLIP/mimic-cxr",
}
TABLES = {kind: f"mimic-cxr-2.0.0-{kind}.csv" for kind in ("split", "metadata", "chexpert")}
_LETTER = re.compile("[A-Za-z]")  # cleaning keeps these, so most reports need not be cleaned here
# Frontal views first: a model of one image sees the first one of a study.
VIEWS = (
    "PA",
    "AP",
    "LATERAL",
    "LL",
    "AP AXIAL",
    "AP LLD",
    "AP RLD",
    "PA RLD",
    "PA LLD",
    "LAO",
    "RAO",
    "LPO",
    "XTABLE LATERAL",
    "SWIMMERS",
    "",
)
GROUPS = {"frontal": ("PA", "AP"), "lateral": ("LATERAL", "LL"), "all": VIEWS}


@dataclass(frozen=True)
class Study:
    """A study as the tables have it."""

    study: str
    patient: str
    split: str
    images: tuple[str, ...]
    labels: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    return command.guarded(SCRIPT, lambda: _run(given))


def image_path(patient: str, study: str, dicom: str) -> str:
    """Where the release keeps an image: `files/p10/p10000032/s50414267/<dicom>.jpg`."""
    return f"files/p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg"


def report_path(patient: str, study: str) -> str:
    """Where the release keeps a report, below `files`: `p10/p10000032/s50414267.txt`."""
    return f"p{patient[:2]}/p{patient}/s{study}.txt"


def build(given: argparse.Namespace, tables: dict[str, Path], reports: Reports) -> Build:
    """Make the samples of all splits."""
    dropped: Counter[str] = Counter()
    studies = list(_studies(given, tables, dropped))
    paths = [report_path(study.patient, study.study) for study in studies]
    texts = read_reports(
        reports, paths, section=given.section, unheaded=given.unheaded, workers=given.workers
    )
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    unheaded = 0
    for study, found in zip(studies, texts, strict=True):
        if found.missing:
            dropped["studies without a report file"] += 1
        elif not found.text:
            dropped[f"studies whose report has no {_section_name(given.section)}"] += 1
        elif not _LETTER.search(found.text) and not r2gen_clean_report(found.text):
            dropped["studies whose report is empty after cleaning"] += 1
        else:
            unheaded += found.unheaded
            lines = [study.images] if given.line == "study" else [(one,) for one in study.images]
            samples[study.split].extend(
                Sample(images, found.text, study.labels, study.patient) for images in lines
            )
    made = Build(samples, dropped)
    if given.section == "both" and given.unheaded:
        made.notes["reports without headings, taken from their text"] = unheaded
    return _balance(made, given) if given.balanced else made


def _run(given: argparse.Namespace) -> int:
    tables = {kind: find_table(given.tables, name) for kind, name in TABLES.items()}
    reports = locate_reports(given.reports)
    options = {
        name: getattr(given, name) for name in ("section", "views", "line", "uncertain", "unheaded")
    }
    if given.balanced:
        options |= {"balanced": True, "split": given.split, "seed": given.seed}
    inputs = command.input_facts({path.name: path for path in tables.values()})
    inputs |= reports.facts() | command.images_facts(given.images)
    origin = Origin(
        SCRIPT, "MIMIC-CXR", "reports of 2.1.0, tables of MIMIC-CXR-JPG 2.1.0", options, inputs
    )
    root = given.root or Path(
        ROOTS.get((given.section, given.balanced), f"data/SELFSUP/mimic-cxr-{given.section}")
    )
    command.make(
        root,
        origin,
        lambda: build(given, tables, reports),
        force=given.force,
        report_file=command.REPORT_FILES[given.section],
    )
    return 0


def _studies(given: argparse.Namespace, tables: dict[str, Path], dropped: Counter[str]) -> Any:
    rank = {view: number for number, view in enumerate(given.views)}
    every = set(VIEWS) <= rank.keys()  # then also those that the list does not know, as the last
    rows = read_table(tables["metadata"], ["dicom_id", "ViewPosition"])
    views = {dicom: view for dicom, view in rows}  # noqa: C416  (dict() loses the types)
    labels = _labels(tables["chexpert"], given.uncertain)
    members: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    columns = ["subject_id", "study_id", "split", "dicom_id"]
    for patient, study, split, dicom in read_table(tables["split"], columns):
        if split not in SPLITS:
            raise DataError(
                f"{tables['split']}: study {study} is in the split '{split}'; allowed are "
                f"{', '.join(SPLITS)}.{nearest(split, SPLITS)}"
            )
        members[patient, study, split].append(dicom)
    listed: dict[Path, set[str]] = {}
    for (patient, study, split), dicoms in members.items():
        seen = [dicom for dicom in dicoms if every or views.get(dicom, "") in rank]
        dropped["images of other views"] += len(dicoms) - len(seen)
        seen.sort(key=lambda dicom: rank.get(views.get(dicom, ""), len(rank)))
        paths = [image_path(patient, study, dicom) for dicom in seen]
        present = command.only_present(paths, given.images, listed)
        dropped["images that are not in the folder of images"] += len(paths) - len(present)
        if not present:
            dropped["studies without an image"] += 1
        elif study not in labels:
            dropped["studies without labels"] += 1
        elif labels[study] is None:
            dropped["studies with uncertain labels"] += 1
        else:
            yield Study(study, patient, split, tuple(present), labels[study] or ())
    for reason in [reason for reason, number in dropped.items() if not number]:
        del dropped[reason]


def _labels(table: Path, uncertain: str) -> dict[str, tuple[str, ...] | None]:
    labels = {}
    for study, *values in read_table(table, ["study_id", *CHEXPERT_LABELS]):
        try:
            labels[study] = present_labels(values, CHEXPERT_LABELS, uncertain)
        except ValueError as error:
            raise DataError(f"{table}: study {study}: {error}.") from None
    return labels


def _balance(made: Build, given: argparse.Namespace) -> Build:
    """Deal the patients out anew, with an even distribution of labels."""
    everything = [sample for samples in made.samples.values() for sample in samples]
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: Counter[str] = Counter()
    for sample in everything:
        labels[sample.patient].update(sample.labels)
        sizes[sample.patient] += 1
    split = stratified_split(labels, sizes, given.split, given.seed)
    balanced = replace(made, samples=gather(everything, split))
    for when, builds in (("before", made), ("after", balanced)):
        rows = {s: [sample.labels for sample in lines] for s, lines in builds.samples.items()}
        share = label_shares(rows)
        balanced.notes[f"label shares {when}"] = {
            name: {label: round(value, 5) for label, value in of.items()}
            for name, of in share.items()
        }
        balanced.notes[f"largest difference of a label's share between splits, {when}"] = round(
            unevenness(share), 5
        )
        balanced.tables += _table(f"share of the lines with a label, {when} balancing", share)
    return balanced


def _table(title: str, share: dict[str, dict[str, float]]) -> list[str]:
    splits = list(share)
    width = max(len(name) for name in CHEXPERT_LABELS)
    lines = [f"{title:<{width + 2}}", " " * (width + 2) + "".join(f"{s:>10}" for s in splits)]
    for name in sorted({name for of in share.values() for name in of}):
        values = "".join(f"{share[s].get(name, 0):>10.2%}" for s in splits)
        lines.append(f"  {name:<{width}}{values}")
    return lines


def _section_name(section: str) -> str:
    return "findings or impression" if section == "both" else section


def _views(text: str) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in command.names(text):
        if name.lower() in GROUPS:
            chosen += GROUPS[name.lower()]
        elif name.upper() in VIEWS:
            chosen.append(name.upper())
        else:
            allowed = [*GROUPS, *filter(None, VIEWS)]
            raise argparse.ArgumentTypeError(
                f"'{name}' is no view; allowed are {', '.join(allowed)}.{nearest(name, allowed)}"
            )
    return tuple(dict.fromkeys(chosen))


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__ or "", "")
    parser.set_defaults(root=None)
    parser.epilog = "Folders built by default: " + "; ".join(
        f"{root} (--section {section}{' --balanced' if balanced else ''})"
        for (section, balanced), root in ROOTS.items()
    )
    raw = Path("data/raw/mimic-cxr")
    parser.add_argument(
        "--reports", type=Path, default=raw, help="mimic-cxr-reports.zip, or a folder that holds it"
    )
    parser.add_argument("--tables", type=Path, default=raw, help="folder of the three tables")
    command.add_section(parser)
    parser.add_argument(
        "--views",
        type=_views,
        default="all",
        metavar="VIEW,...",
        help="views to keep, in the order in which a line lists them: names of ViewPosition, "
        "frontal, lateral or all",
    )
    command.add_line(parser)
    command.add_uncertain(parser)
    parser.add_argument(
        "--headings-only",
        dest="unheaded",
        action="store_false",
        help="with --section both, leave out reports with neither heading instead of taking "
        "their text",
    )
    parser.add_argument(
        "--balanced",
        action="store_true",
        help="new splits by patient with an even distribution of labels",
    )
    command.add_split(parser)
    command.add_workers(parser)
    return parser
