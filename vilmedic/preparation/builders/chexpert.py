"""Builder for CheXpert and the 5 x 200 evaluation set.

Written for `train.csv` and `valid.csv` of CheXpert-v1.0 (or -small), whose paths start with the
name of the release, and for `df_chexpert_plus_240401.csv` of CheXpert Plus, which has the reports
of the training images. The published test set is not given out with them, so `valid.csv` becomes
the test split, and training patients become the validation split.

CheXpert 5 x 200 (Huang et al. 2021, GLoRIA): frontal training images of which exactly one of five
findings is certainly present and no other finding present or uncertain, 200 of each. The original
draw was not published, so every such set is another one; this one depends on --draw-seed and on the
images that are there alone. Its patients are kept out of the other splits.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vilmedic.datasets.label import UNKNOWN
from vilmedic.datasets.lines import brief
from vilmedic.datasets.report_text import gloria_clean_report_chexpert
from vilmedic.errors import DataError
from vilmedic.log import counted
from vilmedic.preparation import command
from vilmedic.preparation.builders.folder_images import patients_together
from vilmedic.preparation.folder import Build, Dropped, Origin, Sample, split_by_patient
from vilmedic.preparation.sections import Sections, choose_text
from vilmedic.script import count
from vilmedic.tables import Missing, find_table, read_numbered

SCRIPT = "make_chexpert"
PLUS = "df_chexpert_plus_240401.csv"
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FIVE_ROOT = "data/SELFSUP/chexpert-5x200"
_PATIENT = re.compile(r"patient\d+")
_NO_PATH = "rows without the path of an image"
NO_FINDING = "No Finding"
CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    NO_FINDING,
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
UNCERTAIN = ("negative", "positive", "mixed", "unknown", "drop")
# Of the five competition labels, those that GLoRIA counts as present, after Irvin et al. 2019.
MIXED_POSITIVE = frozenset({"Atelectasis", "Edema", "Pleural Effusion"})
_NUMBERS = {"": 0, "1.0": 1, "1": 1, "0.0": 0, "0": 0, "-1.0": -1, "-1": -1}


@dataclass(frozen=True)
class Image:
    """A row of a label table; the path starts from the folder that holds `train` and `valid`."""

    path: str
    patient: str
    view: str
    values: tuple[str, ...]
    where: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    return command.guarded(SCRIPT, lambda: _run(given))


def read_labelled(table: Path, missing: Missing, dropped: Dropped) -> list[Image]:
    """The rows of `train.csv` or `valid.csv` that have a path.

    Args:
        table: the file.
        missing: which cells have no value; counts them.
        dropped: receives the rows without a path.

    Raises:
        DataError: a path names no patient, or a label is neither 1, 0, -1 nor missing.
    """
    images = []
    columns = ["Path", "Frontal/Lateral", *CHEXPERT_LABELS]
    for line, (path, view, *values) in read_numbered(table, columns, missing):
        where = f"{table.name}:{line}"
        if not path:
            dropped.add(_NO_PATH, "", where=where)
            continue
        found = _PATIENT.search(path)
        if found is None:
            raise DataError(
                f"{table}:{line}: the path '{brief(path)}' names no patient such as patient00001."
            )
        for name, value in zip(CHEXPERT_LABELS, values, strict=True):
            try:
                label_number(value)
            except ValueError as error:
                raise DataError(f"{table}:{line}: {name}: {error}.") from None
        images.append(Image(_below_release(path), found[0], view, tuple(values), where))
    return images


def five_by_200(images: Iterable[Image], each: int, seed: int) -> dict[str, list[Image]]:
    """Draw the images of the 5 x 200 set, of each of the five findings.

    Raises:
        DataError: there are fewer than `each` of a finding.
    """
    candidates: dict[str, list[Image]] = defaultdict(list)
    for image in images:
        if image.view == "Frontal":
            stated = {
                name: label_number(value)
                for name, value in zip(CHEXPERT_LABELS, image.values, strict=True)
                if name != NO_FINDING and label_number(value) != 0
            }
            if len(stated) == 1:
                [(name, value)] = stated.items()
                if value == 1 and name in FIVE:
                    candidates[name].append(image)
    chosen = {}
    for name in FIVE:
        if len(candidates[name]) < each:
            raise DataError(
                f"Only "
                f"{counted(len(candidates[name]), 'training image has', 'training images have')} "
                f"{name} alone; needed: {each}. Are train.csv and the folder of images complete? "
                "--each takes fewer; "
                "--keep-5x200 builds the training data without such a set."
            )
        ranked = sorted(candidates[name], key=lambda image: _rank(image.path, seed))
        chosen[name] = sorted(ranked[:each], key=lambda image: image.path)
    return chosen


def build(
    given: argparse.Namespace,
    tables: dict[str, Path],
    texts: dict[str, str],
    missing: Missing,
    dropped: Dropped,
) -> Build:
    """Make the samples of training, validation and test, or of the 5 x 200 set.

    Args:
        given: the options.
        tables: `train` and `valid`.
        texts: report of each image by path without extension; empty for a set without reports.
        missing: which cells have no value, with counts.
        dropped: what was left out so far; receives the rest.
    """
    train = read_labelled(tables["train"], missing, dropped)
    listed: dict[Path, set[str]] = {}
    with_reports = given.reports is not None
    taken: set[str] = set()
    if given.five_by_200 or not given.keep_5x200:
        # Independent of reports and --seed: each build must draw the same set.
        usable = (
            image for image in train if command.only_present([image.path], given.images, listed)
        )
        drawn = five_by_200(usable, given.each, given.draw_seed)
        if given.five_by_200:
            samples = [
                Sample((image.path,), texts.get(_stem(image.path), ""), (name,), image.patient)
                for name in FIVE
                for image in drawn[name]
            ]
            kept = [sample for sample in samples if sample.report or not with_reports]
            silent = [sample.images[0] for sample in samples if with_reports and not sample.report]
            dropped.add("images without a report", *silent)
            return Build({"test": kept}, dropped, missing=missing.counts)
        taken = {image.patient for images in drawn.values() for image in images}
    pool = _samples(given, train, texts, dropped, listed)
    inside = [sample.images[0] for sample in pool if sample.patient in taken]
    dropped.add("images of patients in the 5 x 200 set", *inside)
    pool = [sample for sample in pool if sample.patient not in taken]
    valid = read_labelled(tables["valid"], missing, dropped)
    share = min(given.validate / max(1, len(pool)), 0.5)
    notes: dict[str, Any] = {}
    together = patients_together(pool, given.images, notes)
    shares = (1 - share, share, 0.0)
    samples_of = split_by_patient(pool, shares, given.seed, together) if pool else {}
    samples_of["test"] = _samples(given, valid, texts, dropped, listed)
    return Build(samples_of, dropped, notes, missing=missing.counts)


def read_plus(table: Path, section: str, missing: Missing, dropped: Dropped) -> dict[str, str]:
    """Reports of CheXpert Plus, by the path of their image without extension.

    Args:
        table: the file.
        section: see `choose_text`.
        missing: which cells have no value; counts them.
        dropped: receives the rows without a path.
    """
    columns = ["path_to_image", "section_findings", "section_impression"]
    texts = {}
    for line, (path, findings, impression) in read_numbered(table, columns, missing):
        if not path:
            dropped.add(_NO_PATH, "", where=f"{table.name}:{line}")
            continue
        sections = Sections(" ".join(findings.split()), " ".join(impression.split()))
        text = choose_text(sections, section)
        if text and gloria_clean_report_chexpert(text):
            texts[_stem(path)] = text
    return texts


def add_uncertain(parser: argparse.ArgumentParser) -> None:
    """The option that says what becomes of uncertain labels."""
    parser.add_argument(
        "--uncertain",
        choices=list(UNCERTAIN),
        default="negative",
        help="what labels of -1 count as; mixed: present for atelectasis, edema and pleural "
        "effusion; unknown: neither present nor absent; drop: leave such studies out",
    )


def present_labels(
    values: Sequence[str], names: Sequence[str], uncertain: str
) -> tuple[str, ...] | None:
    """The labels that count as present in a row of a label table.

    Args:
        values: one per label: `1.0` is present, `0.0` absent, `-1.0` uncertain, blank if not
            mentioned.
        names: the labels.
        uncertain: `negative` counts uncertain labels as absent, `positive` as present, `mixed` as
            present for atelectasis, edema and pleural effusion only, `unknown` as neither, and
            `drop` refuses the row.

    Returns:
        The names, in the order given, those of unknown labels with a question mark in front; `No
        Finding` when nothing is present, itself unknown when something might be; None when the row
        is refused.

    Raises:
        ValueError: a value is none of the four.
    """
    present, unknown = [], []
    for name, value in zip(names, values, strict=True):
        number = label_number(value)
        if number == -1:
            if uncertain == "drop":
                return None
            if uncertain == "unknown":
                unknown.append(f"{UNKNOWN}{name}")
            if uncertain == "positive" or (uncertain == "mixed" and name in MIXED_POSITIVE):
                present.append(name)
        elif number == 1:
            present.append(name)
    if not present and f"{UNKNOWN}{NO_FINDING}" not in unknown:
        (unknown if unknown else present).append(f"{UNKNOWN if unknown else ''}{NO_FINDING}")
    return (*present, *unknown)


def label_number(value: str) -> int:
    """1, 0 or -1 of a cell of a label table; a blank one is 0.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _NUMBERS[value]
    except KeyError:
        raise ValueError(f"'{value}' is no label value; allowed are 1, 0, -1 and blank") from None


def _samples(
    given: argparse.Namespace,
    images: Iterable[Image],
    texts: dict[str, str],
    dropped: Dropped,
    listed: dict[Path, set[str]],
) -> list[Sample]:
    samples = []
    for image in images:
        labels = present_labels(image.values, CHEXPERT_LABELS, given.uncertain)
        reason = ""
        text = texts.get(_stem(image.path), "")
        if given.view != "all" and image.view.lower() != given.view:
            reason = "images of another view"
        elif labels is None:
            reason = "images with uncertain labels"
        elif given.reports is not None and not text:
            reason = "images without a report"
        elif not command.only_present([image.path], given.images, listed):
            reason = "images that are not in the folder of images"
        else:
            samples.append(Sample((image.path,), text, labels, image.patient))
        if reason:
            dropped.add(reason, image.path, where=image.where)
    return samples


def _run(given: argparse.Namespace) -> int:
    tables = {name: find_table(given.tables, f"{name}.csv") for name in ("train", "valid")}
    inputs = command.input_facts({path.name: path for path in tables.values()})
    if given.reports is not None:
        if given.reports.is_dir():
            given = argparse.Namespace(**{**vars(given), "reports": given.reports / PLUS})
        if not given.reports.is_file():
            raise DataError(f"There is no file {given.reports} (given with --reports).")
        inputs |= command.input_facts({given.reports.name: given.reports})
    names = ["five_by_200", "each", "draw_seed", "missing"]
    if not given.five_by_200:
        names += ["seed", "view", "uncertain", "validate", "keep_5x200"]
    options = {name: getattr(given, name) for name in names}
    if given.reports is not None:
        options["section"] = given.section
    inputs |= command.images_facts(given.images)
    release = "CheXpert-v1.0" + ("" if given.reports is None else ", CheXpert Plus 240401")
    origin = Origin(SCRIPT, "CheXpert", release, options, inputs)

    def make() -> Build:
        missing, dropped = Missing(given.missing), Dropped()
        texts = {}
        if given.reports is not None:
            texts = read_plus(given.reports, given.section, missing, dropped)
        return _named(build(given, tables, texts, missing, dropped))

    root = given.root or Path(FIVE_ROOT if given.five_by_200 else "data/SELFSUP/chexpert")
    report_file = command.REPORT_FILES[given.section]
    then = command.Next("config/downstream/chexpert.yml", "data/chexpert", given.images)
    if given.five_by_200:
        config = "config/protocols/chexpert-5x200.yml"
        then = command.Next(config, FIVE_ROOT, given.images, evaluates=True)
    command.make(root, origin, make, force=given.force, then=then, report_file=report_file)
    return 0


def _named(made: Build) -> Build:
    """The files of a split hold a line for each sample: with some reports only, none is written."""
    with_text = {bool(sample.report) for lines in made.samples.values() for sample in lines}
    if with_text != {True, False}:
        return made
    samples = {
        split: [replace(sample, report="") for sample in lines]
        for split, lines in made.samples.items()
    }
    return replace(made, samples=samples)


def _below_release(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[1:]) if path.lower().startswith("chexpert") else path


def _stem(path: str) -> str:
    return _below_release(path).rpartition(".")[0]


def _rank(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{path}".encode()).digest()


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__ or "", "")
    parser.set_defaults(root=None)
    parser.epilog = f"Folders built by default: data/SELFSUP/chexpert; {FIVE_ROOT} (--five-by-200)"
    raw = Path("data/raw/chexpert")
    parser.add_argument("--tables", type=Path, default=raw, help="folder of train.csv, valid.csv")
    parser.add_argument(
        "--reports", type=Path, metavar="FILE", help=f"{PLUS}: keep images with a report only"
    )
    command.add_section(parser, default="impression")
    views = ["frontal", "lateral", "all"]
    parser.add_argument("--view", choices=views, default=views[0], help="which images to take")
    add_uncertain(parser)
    parser.add_argument(
        "--validate", type=count, default=5000, help="training images to validate on"
    )
    parser.add_argument(
        "--five-by-200", action="store_true", help="build the 5 x 200 set as the test split"
    )
    parser.add_argument(
        "--each", type=count, default=200, help="images of each finding in that set"
    )
    parser.add_argument(
        "--keep-5x200",
        action="store_true",
        help="leave the patients of the 5 x 200 set in the training data",
    )
    parser.add_argument(
        "--draw-seed",
        type=int,
        default=0,
        help="seed of the 5 x 200 set; give both builds the same --draw-seed, --each and --images",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training split")
    return parser
