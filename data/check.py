"""Looks at the data of a configuration before anything is trained on it.

    python data/check.py config/SELFSUP/convirt-mimic.yml [key=value ...]

Prints a table, errors and warnings, and writes data_check.json, data_check.png (a page of
histograms) and data_samples.png (images with their reports) into the run's folder. Exit status: 0,
1 when there are errors in the data, 2 when the configuration cannot be used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from vilmedic.config.load import load
from vilmedic.preparation.arguments import whole
from vilmedic.preparation.command import guarded


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    given = _parser().parse_args(arguments)
    return guarded("check", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    config = load(given.config, given.overrides)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("transformers").setLevel(logging.ERROR)  # lengths are what we look for
    from vilmedic.preparation.check_page import as_table, as_values, draw_page
    from vilmedic.preparation.checking import check_data
    from vilmedic.preparation.sample_page import draw_samples

    findings = check_data(config, most=given.images, workers=given.workers)
    folder = given.out or config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    values = json.dumps(as_values(findings), indent=2, ensure_ascii=False)
    (folder / "data_check.json").write_text(values + "\n", encoding="utf-8")
    draw_page(findings, folder / "data_check.png", f"Data of {given.config}")
    sampled = draw_samples(findings, folder / "data_samples.png", f"Samples of {given.config}")
    print(as_table(findings))
    for kind, texts in (("warning", findings.warnings), ("error", findings.errors)):
        for text in texts:
            print(f"{kind}: {text}")
    counts = f"{len(findings.errors)} errors, {len(findings.warnings)} warnings"
    print(f"{counts}; see {folder / 'data_check.png'}")
    if sampled:
        print(f"Images with their reports: {folder / 'data_samples.png'}")
    return 1 if findings.errors else 0


def _parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").strip().splitlines()
    parser = argparse.ArgumentParser(description=lines[0])
    parser.add_argument("config", help="configuration file")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--images", type=whole, help="decode at most this many images of a split")
    parser.add_argument("--workers", type=whole, default=0, help="threads, 0 for one a core")
    parser.add_argument("--out", type=Path, help="folder for the files instead of the run's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
