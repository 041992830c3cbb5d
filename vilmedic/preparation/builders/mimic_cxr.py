"""Builder for MIMIC-CXR.

Written for the reports of MIMIC-CXR 2.1.0 (`mimic-cxr-reports.zip`, or its folder `files`) and the
tables of MIMIC-CXR-JPG 2.1.0 (`mimic-cxr-2.0.0-split`, `-metadata` and `-chexpert`, `.csv.gz` or
`.csv`; their names still say 2.0.0 in that release).
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import brief
from vilmedic.datasets.report_text import r2gen_clean_report
from vilmedic.encodings import Decoded, decode_unicode, is_credible
from vilmedic.errors import DataError, nearest
from vilmedic.files import DAMAGE, core_count, open_regular, sha256_of, text_table
from vilmedic.preparation import command
from vilmedic.preparation.builders.chexpert import CHEXPERT_LABELS, add_uncertain, present_labels
from vilmedic.preparation.command import list_facts
from vilmedic.preparation.folder import Build, Dropped, Origin, Sample, samples_by_split
from vilmedic.preparation.sections import choose_text, find_sections
from vilmedic.preparation.splitting import (
    SPLITS,
    label_shares,
    plain_number,
    stratified_split,
    unevenness,
)
from vilmedic.tables import Missing, find_table, read_numbered, read_table

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
ARCHIVE = "mimic-cxr-reports.zip"
CHUNK = 500
LONGEST = 2**24  # bytes of a report
_MEMBER = re.compile(r"^(?P<prefix>.*?)p\d\d/p\d+/s\d+\.txt$")
_archives: dict[Path, zipfile.ZipFile] = {}  # of this process: reading the directory takes seconds


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


def build(given: argparse.Namespace, tables: dict[str, Path], reports: ReportSource) -> Build:
    """Make the samples of all splits."""
    dropped, missing = Dropped(), Missing(given.missing)
    studies = list(_studies(given, tables, dropped, missing))
    paths = [report_path(study.patient, study.study) for study in studies]
    texts = read_reports(
        reports, paths, section=given.section, unheaded=given.unheaded, workers=given.workers
    )
    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    unheaded = 0
    western: list[str] = []
    for study, path, found in zip(studies, paths, texts, strict=True):
        reason = ""
        if found.missing:
            reason = "studies without a report file"
        elif found.undecodable:
            reason = "studies whose report is neither UTF-8 nor cp1252 text"
        elif not found.text:
            reason = f"studies whose report has no {_section_name(given.section)}"
        elif not _LETTER.search(found.text) and not r2gen_clean_report(found.text):
            reason = "studies whose report is empty after cleaning"
        else:
            unheaded += found.unheaded
            western += [path] if found.encoding else []
            lines = [study.images] if given.line == "study" else [(one,) for one in study.images]
            samples[study.split].extend(
                Sample(images, found.text, study.labels, study.patient) for images in lines
            )
        if reason:
            dropped.add(reason, f"files/{path}")
    made = Build(samples, dropped, missing=missing.counts)
    if western:
        made.notes["reports read as cp1252, as they are not UTF-8"] = len(western)
        made.notes["files of reports read as cp1252"] = western
    if given.section == "both" and given.unheaded:
        made.notes["reports without headings, taken from their text"] = unheaded
    return _balance(made, given) if given.balanced else made


@dataclass(frozen=True)
class ReportSource:
    """Location of the reports.

    Attributes:
        path: an archive, or the folder that holds `p10` to `p19`.
        prefix: what stands before `p10/` in the archive.
    """

    path: Path
    prefix: str = ""

    def facts(self) -> dict[str, dict[str, Any]]:
        """Size and sum of the archive, or of the list of a folder's files and their sizes."""
        if self.path.is_file():
            return {
                self.path.name: {
                    "sha256": sha256_of(self.path),
                    "bytes": self.path.stat().st_size,
                }
            }
        return {"reports": list_facts(self.path)}


@dataclass(frozen=True)
class FoundReport:
    """Parsed text of one report.

    Attributes:
        text: the chosen section, empty when there is none.
        missing: there is no such file.
        unheaded: the text is that of a report without headings.
        encoding: the character set of a file that is not UTF-8.
        undecodable: no character set gives a text without doubt.
    """

    text: str
    missing: bool = False
    unheaded: bool = False
    encoding: str = ""
    undecodable: bool = False


def locate_reports(given: Path) -> ReportSource:
    """Find the reports in what the user named.

    Args:
        given: the archive, a folder that holds it, or a folder that holds `files` or `p10`.

    Raises:
        DataError: nothing of that kind is there.
    """
    archive = given / ARCHIVE if given.is_dir() else given
    if archive.is_file():
        return ReportSource(archive, _prefix(archive))
    folders = (given, given / "files", given / "mimic-cxr-reports" / "files")
    for folder in folders:
        if folder.is_dir() and any(folder.glob("p1[0-9]")):
            return ReportSource(folder)
    raise DataError(
        f"{given} is neither {ARCHIVE} nor a folder that holds it, nor one that holds files/p10 to "
        "files/p19. Get it with `python data/download.py SELFSUP`, or say where it is with "
        "--reports."
    )


def read_reports(
    reports: ReportSource, paths: Sequence[str], *, section: str, unheaded: bool, workers: int = 0
) -> list[FoundReport]:
    """The chosen text of each report, in the order of the paths.

    Args:
        reports: where they are.
        paths: below `files`, such as `p10/p10000032/s50414267.txt`.
        section: see `choose_text`.
        unheaded: see `choose_text`.
        workers: processes, 0 for one per core; the result does not depend on it.
    """
    read = partial(_read_chunk, reports, section, unheaded)
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(workers or core_count(), len(chunks))
    if workers <= 1:
        return [found for chunk in chunks for found in read(chunk)]
    # Fresh processes rather than forks: the caller may be running threads.
    with get_context("spawn").Pool(workers) as pool:
        return [found for chunk in pool.imap(read, chunks) for found in chunk]


def decode_report(content: bytes) -> Decoded | None:
    """The text of a report file in English: in Unicode, or as Windows writes it (cp1252).

    Returns:
        None for a file that is in neither without doubt.
    """
    decoded = decode_unicode(content)
    if decoded is not None:
        return None if "\0" in decoded.text else decoded
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return Decoded(text, "cp1252") if is_credible(text, "cp1252") else None


def _run(given: argparse.Namespace) -> int:
    tables = {kind: find_table(given.tables, name) for kind, name in TABLES.items()}
    reports = locate_reports(given.reports)
    options = {
        name: getattr(given, name)
        for name in ("section", "views", "line", "uncertain", "unheaded", "missing")
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
    balanced = "-balanced" if given.balanced else ""
    config = f"config/SELFSUP/convirt-mimic{balanced}.yml"
    command.make(
        root,
        origin,
        lambda: build(given, tables, reports),
        force=given.force,
        then=command.Next(config, ROOTS["both", given.balanced], given.images),
        report_file=command.REPORT_FILES[given.section],
    )
    return 0


def _studies(
    given: argparse.Namespace, tables: dict[str, Path], dropped: Dropped, missing: Missing
) -> Iterator[Study]:
    rank = {view: number for number, view in enumerate(given.views)}
    every = set(VIEWS) <= rank.keys()  # then also those that the list does not know, as the last
    rows = read_table(tables["metadata"], ["dicom_id", "ViewPosition"], missing)
    views = {dicom: view for dicom, view in rows}  # noqa: C416  (dict() loses the types)
    labels = _labels(tables["chexpert"], given.uncertain, missing)
    members: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    columns = ["subject_id", "study_id", "split", "dicom_id"]
    for line, (patient, study, split, dicom) in read_numbered(tables["split"], columns, missing):
        where = f"{tables['split']}:{line}"
        if split and split not in SPLITS:
            raise DataError(
                f"{where}: study {study} is in the split '{brief(split)}'; allowed are "
                f"{', '.join(SPLITS)}.{nearest(split, SPLITS)}"
            )
        if not (patient and study and split and dicom):
            dropped.add(
                "rows without a patient, study, split or image", dicom, where=Path(where).name
            )
            continue
        members[plain_number(patient), plain_number(study), split].append(dicom)
    listed: dict[Path, set[str]] = {}
    for (patient, study, split), dicoms in members.items():
        seen = [dicom for dicom in dicoms if every or views.get(dicom, "") in rank]
        others = [image_path(patient, study, dicom) for dicom in dicoms if dicom not in seen]
        dropped.add("images of other views", *others)
        seen.sort(key=lambda dicom: rank.get(views.get(dicom, ""), len(rank)))
        paths = [image_path(patient, study, dicom) for dicom in seen]
        present = command.only_present(paths, given.images, listed)
        absent = set(paths) - set(present)
        dropped.add(
            "images that are not in the folder of images", *(p for p in paths if p in absent)
        )
        name, reason = f"p{patient}/s{study}", ""
        if not present:
            reason = "studies without an image"
        elif study not in labels:
            reason = "studies without labels"
        elif labels[study] is None:
            reason = "studies with uncertain labels"
        else:
            yield Study(study, patient, split, tuple(present), labels[study] or ())
        if reason:
            dropped.add(reason, name)


def _labels(table: Path, uncertain: str, missing: Missing) -> dict[str, tuple[str, ...] | None]:
    labels = {}
    columns = ["study_id", *CHEXPERT_LABELS]
    for line, (study, *values) in read_numbered(table, columns, missing):
        try:
            found = present_labels(values, CHEXPERT_LABELS, uncertain)
        except ValueError as error:
            raise DataError(f"{table}:{line}: study {study}: {error}.") from None
        labels[plain_number(study)] = found
    return labels


def _balance(made: Build, given: argparse.Namespace) -> Build:
    """Deal the patients out again, with an even distribution of labels."""
    everything = [sample for samples in made.samples.values() for sample in samples]
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    sizes: Counter[str] = Counter()
    for sample in everything:
        labels[sample.patient].update(sample.labels)
        sizes[sample.patient] += 1
    split = stratified_split(labels, sizes, given.split, given.seed)
    balanced = replace(made, samples=samples_by_split(everything, split))
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
    names = sorted({name for of in share.values() for name in of})
    rows = [[f"  {name}", *(f"{of.get(name, 0):.2%}" for of in share.values())] for name in names]
    return [title, *text_table([["", *share], *rows])]


def _section_name(section: str) -> str:
    return "findings or impression" if section == "both" else section


def _views(text: str) -> tuple[str, ...]:
    chosen: list[str] = []
    for name in command.name_list(text):
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


def _read_chunk(
    reports: ReportSource, section: str, unheaded: bool, paths: Sequence[str]
) -> list[FoundReport]:
    found = []
    for path in paths:
        content = _content(reports, path)
        if content is None:
            found.append(FoundReport("", missing=True))
            continue
        decoded = decode_report(content)
        if decoded is None:
            found.append(FoundReport("", undecodable=True))
            continue
        sections = find_sections(decoded.text)
        chosen = choose_text(sections, section, unheaded=unheaded)
        has_heading = bool(sections.findings or sections.impression)
        encoding = "" if decoded.encoding.startswith("utf") else decoded.encoding
        found.append(
            FoundReport(chosen, unheaded=bool(chosen) and not has_heading, encoding=encoding)
        )
    return found


def _content(reports: ReportSource, path: str) -> bytes | None:
    try:
        if reports.path.is_dir():
            with open_regular(reports.path / path) as file:
                return file.read()
        if reports.path not in _archives:
            _archives[reports.path] = zipfile.ZipFile(reports.path)
        member = _archives[reports.path].getinfo(reports.prefix + path)
        if member.file_size > LONGEST:
            raise zipfile.BadZipFile(f"{member.file_size:,} bytes are no report")
        return _archives[reports.path].read(member)
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{reports.path}: {path} cannot be read: {error}.") from None


def _prefix(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if match := _MEMBER.match(name):
                    return match["prefix"]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} is no complete archive: {error}. Download it again.") from None
    raise DataError(f"{archive} holds no report such as files/p10/p10000032/s50414267.txt.")


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
    add_uncertain(parser)
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
