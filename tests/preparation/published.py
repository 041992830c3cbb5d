"""Baseline: build the MIMIC-CXR folder as published scripts do, report by report in one process.

Own implementation of their method: one pass splits every report at headings in capitals and writes
a table of sections; a second one reads it, joins impression and findings, and writes the lines.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from pathlib import Path

HEADING = re.compile(r"\n ([A-Z ()/,-]+):\s")


def make_folder(files: Path, split_table: Path, metadata_table: Path, root: Path) -> int:
    """Build the folder; return the number of lines written."""
    sections = root / "sections.csv"
    root.mkdir(parents=True, exist_ok=True)
    with open(sections, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study", "impression", "findings"])
        for group in sorted(os.listdir(files)):
            for patient in sorted(os.listdir(files / group)):
                for name in os.listdir(files / group / patient):
                    text = (files / group / patient / name).read_text()
                    found = split_report(text)
                    writer.writerow([name[:-4], found.get("impression"), found.get("findings")])
    texts: dict[str, str] = {}
    with open(sections, newline="") as file:
        for row in csv.DictReader(file):
            impression = re.sub(r"\s+", " ", row["impression"]).strip()
            findings = re.sub(r"\s+", " ", row["findings"]).strip()
            if impression or findings:
                texts[row["study"]] = " ".join(filter(None, [impression, findings]))
    with open(metadata_table, newline="") as file:
        views = {row["dicom_id"]: row["ViewPosition"] for row in csv.DictReader(file)}
    studies: dict[tuple[str, str], list[str]] = defaultdict(list)
    with open(split_table, newline="") as file:
        for row in csv.DictReader(file):
            patient = f"p{row['subject_id']}"
            path = f"files/{patient[:3]}/{patient}/s{row['study_id']}/{row['dicom_id']}.jpg"
            studies["s" + row["study_id"], row["split"]].append(path)
    written = 0
    out = {
        (split, kind): open(root / f"{split}.{kind}.tok", "w")  # noqa: SIM115
        for split in ("train", "validate", "test")
        for kind in ("report", "image")
    }
    for (study, split), paths in studies.items():
        if study in texts:
            ordered = sorted(paths, key=lambda path: views[Path(path).stem] != "PA")
            out[split, "report"].write(texts[study] + "\n")
            out[split, "image"].write(",".join(ordered) + "\n")
            written += 1
    for file in out.values():
        file.close()
    return written


def split_report(text: str) -> dict[str, str]:
    """The last non-empty section of each name."""
    found: dict[str, str] = {}
    match = HEADING.search(text)
    while match:
        name, start = match[1].lower().strip(), match.end()
        skip = max(0, text[start:].find("\n"))
        following = HEADING.search(text, start + skip)
        body = text[start : following.start() if following else len(text)].strip()
        if body:
            found[name] = body
        match = following
    return found
