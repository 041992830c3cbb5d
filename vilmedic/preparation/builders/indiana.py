"""Builder for the Indiana University collection.

Written for the collection of Indiana University as Open-i gives it out: `NLMCXR_reports.tgz` (3,955
XML reports) and the images of `NLMCXR_png.tgz`; and for the two tables `indiana_reports.csv` and
`indiana_projections.csv` in which it is also given out. Each report is of another patient.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vilmedic.datasets.report_text import r2gen_clean_report
from vilmedic.errors import DataError
from vilmedic.files import DAMAGE, open_tar, sha256_of
from vilmedic.preparation import command
from vilmedic.preparation.builders.folder_images import patients_together
from vilmedic.preparation.command import list_facts
from vilmedic.preparation.folder import Build, Dropped, Origin, Sample, split_by_patient
from vilmedic.preparation.sections import Sections, choose_text
from vilmedic.preparation.splitting import plain_number
from vilmedic.tables import Missing, read_numbered, read_table

SCRIPT = "make_indiana"
ROOT = "data/SELFSUP/indiana"
ARCHIVE, TABLE, PROJECTIONS = (
    "NLMCXR_reports.tgz",
    "indiana_reports.csv",
    "indiana_projections.csv",
)
_SERIES = re.compile(r"IM-\d[\w-]*")  # what the names of an image in archive and table share
_BOUNDARY = (b"<!ENTITY", b"<!DOCTYPE")


@dataclass(frozen=True)
class IndianaReport:
    """A report as published."""

    uid: str
    sections: Sections
    labels: tuple[str, ...]
    images: tuple[str, ...]
    where: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    return command.guarded(SCRIPT, lambda: _run(given))


def read_xml_reports(path: Path) -> Iterator[IndianaReport]:
    """The reports of `NLMCXR_reports.tgz`, or of a folder of its XML files, in the order of ids.

    Nothing is unpacked.

    Raises:
        DataError: the archive or a report in it cannot be read.
    """
    reports = [_parse(name, content) for name, content in _members(path)]
    yield from sorted(reports, key=lambda report: int(report.uid))


def read_table_reports(
    table: Path, projections: Path, missing: Missing, dropped: Dropped
) -> Iterator[IndianaReport]:
    """The reports of the two tables; images have their names of `indiana_projections.csv`.

    Args:
        table: of the reports.
        projections: of the images.
        missing: which cells have no value; counts them.
        dropped: receives the images that are of none of the reports.

    Raises:
        DataError: a table cannot be read, or a row of it has no uid.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for line, (uid, filename) in read_numbered(projections, ["uid", "filename"], missing):
        if filename:
            images[_uid(uid, projections, line)].append(filename)
        else:
            name, where = uid and f"report {uid}", f"{projections.name}:{line}"
            dropped.add("rows without the name of an image", name, where=where)
    columns = ["uid", "Problems", "findings", "impression"]
    listed: set[str] = set()
    for line, row in read_numbered(table, columns, missing):
        uid, problems, findings, impression = row
        uid = _uid(uid, table, line)
        sections = Sections(_one_line(findings), _one_line(impression))
        labels = _labels([name for name in problems.split(";") if not missing.is_missing(name)])
        listed.add(uid)
        yield IndianaReport(uid, sections, labels, tuple(images[uid]), f"{table.name}:{line}")
    for uid, names in images.items():
        if uid not in listed:
            dropped.add("images without a report", *names, where=projections.name)


def build(
    given: argparse.Namespace,
    reports: list[IndianaReport],
    views: dict[str, str],
    missing: Missing,
    dropped: Dropped,
) -> Build:
    """Make the samples of all splits.

    Args:
        given: the options.
        reports: as published.
        views: `Frontal` or `Lateral` of each image, by the part of its name that is common.
        missing: which values are missing, with counts.
        dropped: what was left out so far; receives the rest.
    """
    listed: dict[Path, set[str]] = {}
    kept: list[Sample] = []
    for report in reports:
        images = list(report.images)
        if views:
            images.sort(key=lambda name: views.get(_key(report.uid, name), "") != "Frontal")
        if given.projection != "all":
            wanted = given.projection.capitalize()
            chosen = [name for name in images if views.get(_key(report.uid, name)) == wanted]
            others = [name for name in images if name not in chosen]
            dropped.add("images of another projection", *others, where=report.where)
            images = chosen
        present = command.only_present(images, given.images, listed)
        absent = [name for name in images if name not in present]
        dropped.add("images that are not in the folder of images", *absent, where=report.where)
        reason = ""
        text = choose_text(report.sections, given.section)
        if not present:
            reason = "reports without an image"
        elif not text:
            section = "findings or impression" if given.section == "both" else given.section
            reason = f"reports without {section}"
        elif not r2gen_clean_report(text):
            reason = "reports that are empty after cleaning"
        else:
            lines = [tuple(present)] if given.line == "study" else [(name,) for name in present]
            kept += [Sample(names, text, report.labels, report.uid) for names in lines]
        if reason:
            dropped.add(reason, f"report {report.uid}", where=report.where)
    notes: dict[str, Any] = {
        "reports": len(reports),
        "reports with findings": sum(bool(report.sections.findings) for report in reports),
        "reports with an impression": sum(bool(report.sections.impression) for report in reports),
    }
    together = patients_together(kept, given.images, notes)
    samples = split_by_patient(kept, given.split, given.seed, together) if kept else {}
    return Build(samples, dropped, notes, missing=missing.counts)


def _run(given: argparse.Namespace) -> int:
    source = _locate(given.reports)
    projections = (
        given.projections or (source.parent if source.is_file() else given.reports) / PROJECTIONS
    )
    if given.projections is not None and not projections.is_file():
        raise DataError(f"There is no file {projections} (given with --projections).")
    has_views = projections.is_file()
    is_table = source.name.endswith((".csv", ".csv.gz"))
    if not has_views and (is_table or given.projection != "all"):
        why = "the images of each report" if is_table else "which images are frontal"
        raise DataError(
            f"There is no file {projections}, which says {why}: the reports themselves do not. "
            "Say where it is with --projections."
        )
    options = {
        name: getattr(given, name)
        for name in ("section", "line", "projection", "split", "seed", "missing")
    }
    inputs = {source.name: _facts(source)} | command.images_facts(given.images)
    if has_views:
        inputs |= command.input_facts({projections.name: projections})
    release = "tables of uid and projection" if is_table else "NLMCXR_reports.tgz of Open-i"
    origin = Origin(SCRIPT, "Indiana University chest X-rays", release, options, inputs)

    def make() -> Build:
        views, missing, dropped = {}, Missing(given.missing), Dropped()
        if has_views:
            for uid, name, view in read_table(projections, ["uid", "filename", "projection"]):
                views[_key(plain_number(uid), name)] = view.capitalize()
        if is_table:
            found = read_table_reports(source, projections, missing, dropped)
        else:
            found = read_xml_reports(source)
        return build(given, list(found), views, missing, dropped)

    report_file = command.REPORT_FILES[given.section]
    command.make(
        given.root,
        origin,
        make,
        force=given.force,
        then=command.Next("config/SELFSUP/convirt-indiana.yml", ROOT, given.images),
        report_file=report_file,
    )
    return 0


def _locate(given: Path) -> Path:
    """The archive, the table, or the folder of XML files in what the user named."""
    if given.is_file():
        return given
    for name in (ARCHIVE, "ecgen-radiology", TABLE):
        if (given / name).exists():
            return given / name
    if given.is_dir() and any(given.glob("*.xml")):
        return given
    raise DataError(
        f"{given} is neither {ARCHIVE} nor {TABLE}, nor a folder that holds one of them or the XML "
        "reports. Get them with `python data/download.py indiana-images-512`, or say where they "
        "are with --reports."
    )


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.glob("*.xml")):
            yield str(file), file.read_bytes()
        return
    try:
        with open_tar(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".xml") else None
                if content is not None:
                    yield f"{path}: {member.name}", content.read()
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{path} is no complete archive: {error}. Download it again.") from None


def _parse(name: str, content: bytes) -> IndianaReport:
    if any(mark in content for mark in _BOUNDARY):
        raise DataError(f"{name} declares entities, which no report of the collection does.")
    try:
        root = ElementTree.fromstring(content)
        uid = root.findall("uId")[0].attrib["id"].removeprefix("CXR")
        int(uid)
    except (ElementTree.ParseError, IndexError, KeyError, ValueError) as error:
        raise DataError(f"{name} is no report of the collection: {error}.") from None
    texts: dict[str, list[str]] = defaultdict(list)
    for node in root.iter("AbstractText"):
        texts[node.attrib.get("Label", "").lower()].append(node.text or "")
    sections = Sections(_one_line(*texts["findings"]), _one_line(*texts["impression"]))
    terms = [(node.text or "").split("/")[0] for node in root.findall("MeSH/major")]
    images = tuple(f"{node.attrib['id']}.png" for node in root.iter("parentImage"))
    return IndianaReport(uid, sections, _labels(terms), images, name.rpartition("/")[2])


def _labels(terms: Sequence[str]) -> tuple[str, ...]:
    """Headings without commas, which separate labels in the files."""
    cleaned = (" ".join(term.replace(",", " ").split()) for term in terms)
    return tuple(dict.fromkeys(filter(None, cleaned))) or ("No Indexing",)


def _uid(text: str, table: Path, line: int) -> str:
    if not text:
        raise DataError(f"{table}:{line} has no uid.")
    return plain_number(text)


def _key(uid: str, name: str) -> str:
    found = _SERIES.search(name)
    return f"{uid}/{found[0] if found else name}"


def _one_line(*texts: str) -> str:
    return " ".join(" ".join(texts).split())


def _facts(source: Path) -> dict[str, Any]:
    if source.is_dir():
        return list_facts(source)
    return {"sha256": sha256_of(source), "bytes": source.stat().st_size}


def _parser() -> argparse.ArgumentParser:
    parser = command.make_parser(__doc__ or "", ROOT)
    parser.add_argument(
        "--reports",
        type=Path,
        default=Path("data/raw/indiana"),
        help=f"{ARCHIVE}, {TABLE}, or a folder that holds one of them or the XML reports",
    )
    parser.add_argument(
        "--projections",
        type=Path,
        help=f"{PROJECTIONS}; by default that beside the reports, when it is there",
    )
    parser.add_argument(
        "--projection",
        choices=["all", "frontal", "lateral"],
        default="all",
        help="images to keep; all lists frontal ones first when the projections are known",
    )
    command.add_section(parser)
    command.add_line(parser)
    command.add_split(parser)
    return parser
