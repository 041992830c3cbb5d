"""Build the phantom data set: synthetic chest X-rays with findings, reports and labels.

    python data/make_phantom.py --root data/phantom --train 4000 --validate 500 --test 500 \
        --size 128 --seed 0

The same arguments give the same data set with any number of cores.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.log import counted
from vilmedic.phantom.write import SIZES, Plan, build, write_sheet
from vilmedic.preparation.command import guarded
from vilmedic.script import argument_parser, count


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = _parser().parse_args(arguments)
    return guarded("make_phantom", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    plan = Plan(**{field.name: getattr(given, field.name) for field in fields(Plan)})
    started = time.monotonic()
    built = build(given.root, plan, force=given.force, workers=given.workers)
    samples = counted(plan.train + plan.validate + plan.test, "sample")
    if built:
        seconds = time.monotonic() - started
        print(f"{given.root}: built {samples} of {plan.size} pixels in {seconds:.0f} s")
    else:
        print(f"{given.root}: the same {samples} already there, nothing to do")
    words = ["python", "bin/train.py", "config/phantom/convirt.yml"]
    if given.root != Path("data/phantom"):
        words += [f"dataset.{part}.root={given.root}" for part in ("image", "seq", "label")]
    print(f"Next:\n    {shlex.join(words)}")
    if given.sheet:
        write_sheet(given.sheet, plan.seed)
        print(f"{given.sheet}: written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    default = Plan()
    parser.add_argument("--root", type=Path, default=Path("data/phantom"), help="folder to build")
    parser.add_argument("--train", type=count, default=default.train, help="training samples")
    parser.add_argument(
        "--validate", type=count, default=default.validate, help="validation samples"
    )
    parser.add_argument("--test", type=count, default=default.test, help="test samples")
    parser.add_argument(
        "--size", type=_size, default=default.size, help="side of the images in pixels"
    )
    parser.add_argument("--seed", type=count, default=default.seed, help="random seed")
    parser.add_argument("--workers", type=count, default=0, help="processes, 0 for one per core")
    parser.add_argument("--force", action="store_true", help="replace an existing phantom data set")
    parser.add_argument(
        "--sheet", type=Path, help="also write a sheet of 25 sample images here (PNG)"
    )
    return parser


def _size(text: str) -> int:
    value = count(text)
    low, high = SIZES
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is out of range; give {low} to {high} pixels")
    return value


if __name__ == "__main__":
    script.run(main)
