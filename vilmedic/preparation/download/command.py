"""Fetches data sets and builds what the configurations train on.

python data/download.py                                  lists what there is
python data/download.py mimic-cxr-images-512,SELFSUP     fetches two of them
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vilmedic.preparation import command as shared
from vilmedic.preparation.download.images import parse_subset
from vilmedic.preparation.download.run import Options, fetch
from vilmedic.preparation.download.table import Table, load_table

SCRIPT = "download"
WIDTH = 100


def main(arguments: Sequence[str] | None = None, *, scripts: Path) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: of the command line.
        scripts: folder of the table of resources and of the scripts that build folders.
    """
    given = _parser(scripts).parse_args(arguments)
    return shared.guarded(SCRIPT, lambda: _run(given, scripts))


def listing(table: Table, data: Path) -> str:
    """What there is: name, what, size, terms, and where it goes."""
    lines = []
    for name, resource in table.resources.items():
        lines.append(name)
        for key, value in (
            ("", resource.what),
            ("size", resource.size),
            ("terms", resource.terms),
            ("account", _account(table, resource.account)),
            ("goes to", str(data / resource.target)),
            ("page", resource.page),
        ):
            if value:
                head = f"    {key + ': ' if key else ''}"
                lines.append(textwrap.fill(head + value, WIDTH, subsequent_indent="        "))
    lines.append("")
    lines.append("Fetch with: python data/download.py NAME[,NAME...]")
    return "\n".join(lines)


def _run(given: argparse.Namespace, scripts: Path) -> int:
    table = load_table(given.resources)
    names = list(dict.fromkeys(part for name in given.names for part in shared.names(name)))
    if not names:
        print(listing(table, given.data))
        return 0
    options = Options(
        data=given.data,
        scripts=scripts,
        subset=parse_subset(given.subset) if given.subset else None,
        keep_originals=given.keep_originals,
        parallel=given.parallel,
        retries=given.retries,
        wait=given.wait,
        timeout=given.timeout,
        workers=given.workers,
    )
    return fetch(table, table.pick(names), options)


def _account(table: Table, name: str) -> str:
    if not name:
        return ""
    account = table.accounts[name]
    return (
        f"{account.host}; user and password from {account.username} and {account.password}, "
        "~/.netrc, or asked for"
    )


def _parser(scripts: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME[,NAME...]", help="what to fetch; nothing lists it all")
    add("--data", type=Path, default=Path("data"), help="data folder (default: data)")
    add(
        "--subset",
        metavar="N|SPLIT|SPLIT:N",
        help="images of MIMIC-CXR: only the first N studies, only a split, or both",
    )
    add("--keep-originals", action="store_true", help="keep images in their published size as well")
    add("--parallel", type=_positive, default=8, help="transfers at a time (default: 8)")
    add(
        "--retries",
        type=shared.count,
        default=8,
        help="attempts without a new byte before giving up (default: 8)",
    )
    add("--wait", type=float, default=1.0, help="seconds before the first retry (default: 1)")
    add("--timeout", type=float, default=60.0, help="seconds below 1 kB a second (default: 60)")
    shared.add_workers(parser)
    add(
        "--resources",
        type=Path,
        default=scripts / "resources.yml",
        help="table of what there is (default: resources.yml beside this script)",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
