"""Write the images of a folder of line files into tar shards, which ImSeqShards reads.

    python data/make_shards.py data/SELFSUP/mimic-cxr data/SELFSUP/mimic-cxr-shards \
        --image-path data/images/mimic-cxr-images-512 --ext jpg

An interrupted call resumes when it is run again. The shards can be copied anywhere, also to a web
server; line files and indices must stay in a local folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vilmedic import script
from vilmedic.log import counted
from vilmedic.preparation.command import guarded
from vilmedic.preparation.shards import write_shards
from vilmedic.script import argument_parser, count, positive


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    given = _parser().parse_args(arguments)
    return guarded("make_shards", lambda: _run(given))


def _run(given: argparse.Namespace) -> int:
    written = write_shards(
        given.root,
        given.target,
        image_path=given.image_path,
        ext=given.ext,
        samples=given.samples,
        force=given.force,
        workers=given.workers,
    )
    for split, counts in written.items():
        gib = counts["bytes"] / 2**30
        print(
            f"{split}: {counted(counts['lines'], 'line')} with "
            f"{counted(counts['images'], 'image')} in "
            f"{counted(counts['shards'], 'shard')}, {gib:.2f} GiB"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("root", type=Path, help="folder with train.image.tok and so on")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--image-path", type=Path, help="folder that the paths are relative to")
    parser.add_argument("--ext", help="extension of paths without one, such as jpg")
    parser.add_argument("--samples", type=positive, default=1000, help="lines per shard")
    parser.add_argument(
        "--workers", type=count, default=0, help="shards at a time, 0 for one per core"
    )
    parser.add_argument("--force", action="store_true", help="replace existing shards")
    return parser


if __name__ == "__main__":
    script.run(main)
