"""Write small archives in the layout of the published ones, with made-up texts."""

from __future__ import annotations

import csv
import gzip
import random
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilmedic.preparation.builders.chexpert import CHEXPERT_LABELS, NO_FINDING

FINDINGS = ["The lungs are clear.", "There is a small effusion.", "The heart is enlarged."]
IMPRESSIONS = ["No acute process.", "Small effusion.", "Cardiomegaly."]


@dataclass
class Mimic:
    """A small MIMIC-CXR: tables as rows, and reports by path below `files`."""

    split: list[list[str]] = field(default_factory=list)
    metadata: list[list[str]] = field(default_factory=list)
    chexpert: list[list[str]] = field(default_factory=list)
    reports: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> list[str]:
        return [
            f"files/p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg"
            for dicom, study, patient, _ in self.split
        ]


def report_text(findings: str | None, impression: str | None) -> str:
    text = "                                 FINAL REPORT\n EXAMINATION:  CHEST\n\n"
    text += " INDICATION:  ___ year old with cough\n\n COMPARISON:  None.\n\n"
    if findings is not None:
        text += f" FINDINGS:\n\n {findings}\n\n"
    if impression is not None:
        text += f" IMPRESSION:\n\n {impression}\n"
    return text


def make_mimic(patients: int = 12, seed: int = 0, studies: int = 2) -> Mimic:
    """Patients with studies of one or two views; of twelve, two are in validate and two in test."""
    draw = random.Random(seed)
    made = Mimic()
    number = 0
    for index in range(patients):
        patient = str(10000032 + index * 1000003)
        split = {0: "validate", 1: "test"}.get(index % 6, "train")
        for _ in range(studies):
            number += 1
            study = str(50000000 + number)
            for view in draw.choice([["PA", "LATERAL"], ["LATERAL", "PA"], ["AP"]]):
                dicom = "-".join(f"{draw.getrandbits(32):08x}" for _ in range(5))
                made.split.append([dicom, study, patient, split])
                made.metadata.append([dicom, patient, study, "CHEST", view, "3056", "2544"])
            values = [draw.choice(["1.0", "0.0", "-1.0", "", "", ""]) for _ in CHEXPERT_LABELS]
            values[CHEXPERT_LABELS.index(NO_FINDING)] = ""
            made.chexpert.append([patient, study, *values])
            made.reports[f"p{patient[:2]}/p{patient}/s{study}.txt"] = report_text(
                draw.choice(FINDINGS), draw.choice(IMPRESSIONS)
            )
    return made


def write_mimic(folder: Path, made: Mimic, *, zipped: bool = True, compressed: bool = True) -> None:
    """Write the tables and reports of a small MIMIC-CXR as published."""
    ending = ".csv.gz" if compressed else ".csv"
    columns = {
        "split": ["dicom_id", "study_id", "subject_id", "split"],
        "metadata": [
            "dicom_id",
            "subject_id",
            "study_id",
            "PerformedProcedureStepDescription",
            "ViewPosition",
            "Rows",
            "Columns",
        ],
        "chexpert": ["subject_id", "study_id", *CHEXPERT_LABELS],
    }
    for kind, header in columns.items():
        write_csv(folder / f"mimic-cxr-2.0.0-{kind}{ending}", header, getattr(made, kind))
    if zipped:
        with zipfile.ZipFile(folder / "mimic-cxr-reports.zip", "w") as archive:
            for path, text in made.reports.items():
                archive.writestr(f"files/{path}", text)
        return
    for path, text in made.reports.items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_text(text)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a CSV file, gzipped if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        # No time stamp, so that the same rows give the same bytes.
        with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
            packed.write(_csv_text(header, rows).encode())
    else:
        path.write_bytes(_csv_text(header, rows).encode())
    return path


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int] = (40, 32)) -> None:
    """Write a different image for each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, size[::-1], dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    class Collected(list[str]):
        write = list.append

    collected = Collected()
    writer = csv.writer(collected, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return "".join(collected)
