"""Check the data of a configuration before training.

    python data/check.py config/SELFSUP/convirt-mimic.yml [key=value ...]

Prints a table, errors, warnings and advice, and writes data_check.json, data_check.png (a page of
histograms), data_samples.png (images with their reports) and data_check.txt (all files of which a
message lists the first five) into the run's folder. Exit status: 0 without errors and warnings, 1
with any, 2 when the configuration is not valid.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.config.load import load
from vilmedic.datasets.lines import SHOWN
from vilmedic.errors import escaped
from vilmedic.log import Progress, counted
from vilmedic.preparation.command import guarded
from vilmedic.script import argument_parser, count

LISTS = "data_check.txt"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = _parser().parse_intermixed_args(arguments)
    return guarded("check", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    config = load(given.config, given.overrides)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("transformers").setLevel(
        logging.ERROR
    )  # hides its warnings about long reports
    from vilmedic.preparation.check_page import (
        as_lists,
        as_table,
        as_values,
        data_title,
        draw_page,
        draw_samples,
    )
    from vilmedic.preparation.checking import check_data

    with Progress("Checking the data"):
        findings = check_data(config, most=given.images, workers=given.workers)
    folder = given.out or config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps(as_values(findings), indent=2, ensure_ascii=False)
    (folder / "data_check.json").write_text(values + "\n", encoding="utf-8")
    title = data_title(config.dataset, findings)
    draw_page(findings, folder / "data_check.png", title)
    (folder / LISTS).write_text(as_lists(findings), encoding="utf-8", errors="backslashreplace")
    sampled = draw_samples(findings, folder / "data_samples.png", title)
    print(escaped(as_table(findings)))
    kinds = {"advice": findings.advice, "warning": findings.warnings, "error": findings.errors}
    for kind, texts in kinds.items():
        for text in texts:
            print(escaped(f"{kind}: {text}"))
    if findings.named:
        print(f"Lists of more than {SHOWN} in full: {folder / LISTS}")
    errors, warnings = len(findings.errors), len(findings.warnings)
    counts = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
    print(f"{counts}; see {folder / 'data_check.png'}")
    if sampled:
        print(f"Images with their reports: {folder / 'data_samples.png'}")
    return 1 if findings.errors or findings.warnings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("config", help="configuration file")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--images", type=count, help="decode at most this many images of a split")
    parser.add_argument("--workers", type=count, default=0, help="threads, 0 for one per core")
    parser.add_argument("--out", type=Path, help="write the files to this folder")
    return parser


if __name__ == "__main__":
    script.run(main)
