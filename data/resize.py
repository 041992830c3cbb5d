"""Resize a folder of JPEG, PNG or DICOM images, keeping its tree of folders.

    python data/resize.py archive/images data/images/my-images-512 --size 512

An interrupted call resumes when it is run again. Images that cannot be read, and those that would
get the same name, are listed in unreadable.txt in the new folder, and the exit status is then 1.
Files that are not images are listed in left_out.txt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.datasets.decode import MAX_PIXELS
from vilmedic.datasets.lines import SHOWN
from vilmedic.errors import escaped
from vilmedic.log import counted
from vilmedic.preparation.command import guarded
from vilmedic.preparation.resize import LEFT_OUT, UNREADABLE, resize_tree
from vilmedic.script import argument_parser, count, positive


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = _parser().parse_args(arguments)
    return guarded("resize", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    found = resize_tree(
        given.source,
        given.target,
        given.size,
        suffix=f".{given.format}",
        quality=given.quality,
        workers=given.workers,
        force=given.force,
        max_pixels=given.max_pixels,
    )
    other = sum(found.other.values())
    print(
        f"{given.target}: {counted(found.written, 'image')} written, {found.present:,} there "
        f"already, {len(found.unreadable):,} unreadable; left out, of other kinds: "
        f"{counted(other, 'file')}"
    )
    for kind, number in found.other.most_common(SHOWN):
        print(escaped(f"  left out: {number:,} {kind}"))
    if found.left_out:
        print(f"  all of them: {given.target / LEFT_OUT}")
    for path, note in list(found.noted.items())[:SHOWN]:
        print(escaped(f"  read by its content: {path}: {note}"))
    if len(found.noted) > SHOWN:
        print(f"  and {len(found.noted) - SHOWN:,} more that contradict their headers")
    for reason in list(found.unreadable.values())[:SHOWN]:
        print(escaped(f"  unreadable: {reason}"), file=sys.stderr)
    if found.unreadable:
        print(f"  all of them: {given.target / UNREADABLE}", file=sys.stderr)
    return 1 if found.unreadable else 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("source", type=Path, help="folder of images")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--size", type=positive, default=512, help="pixels of the short side")
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="output format")
    parser.add_argument(
        "--quality",
        type=int,
        default=95,
        choices=range(1, 101),
        metavar="1..100",
        help="JPEG quality",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        help="pixels of the largest image to read",
    )
    parser.add_argument("--workers", type=count, default=0, help="processes, 0 for one per core")
    parser.add_argument("--force", action="store_true", help="convert existing images again")
    return parser


if __name__ == "__main__":
    script.run(main)
