"""The download command: fetches data sets and builds their training folders.

python data/download.py                                  lists what there is
python data/download.py mimic-cxr-images-512,SELFSUP     fetches two of them
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from vilmedic.errors import ConfigError, DataError
from vilmedic.files import walk_files
from vilmedic.log import counted
from vilmedic.preparation.command import add_workers, guarded, name_list
from vilmedic.preparation.download.http import Job, Transfer, find_login, is_there, part_of
from vilmedic.preparation.download.jobs import (
    DONE,
    Subset,
    check_expected,
    fetch_image,
    fetch_model,
    has_model,
    image_jobs,
    is_unpacked,
    list_images,
    not_done,
    parse_subset,
    read_sums,
    run_script,
    unpack_and_resize,
)
from vilmedic.preparation.download.progress import TransferBar, check_space, readable, run_all
from vilmedic.preparation.download.resources import (
    File,
    Images,
    Resource,
    ResourceTable,
    load_table,
)
from vilmedic.script import argument_parser, count, positive

SCRIPT = "download"
WIDTH = 100
FAILED = "failed.txt"


def main(arguments: Sequence[str] | None = None, *, scripts: Path) -> int:
    """Runs the command line and returns its exit status.

    Args:
        arguments: of the command line.
        scripts: folder of the table of resources and of the scripts that build folders.
    """
    given = _parser(scripts).parse_args(arguments)
    return guarded(SCRIPT, lambda: _run(given, scripts))


def listing(table: ResourceTable, data: Path) -> str:
    """List the resources: name, description, size, terms and target."""
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


@dataclass(frozen=True)
class Options:
    """Download options.

    Attributes:
        data: the data folder.
        scripts: the folder of the scripts to run afterwards.
        subset: which images; None for all.
        keep_originals: leave the images as published beside the smaller ones.
        parallel: transfers at a time.
        retries: attempts without a new byte before giving up.
        wait: seconds before the first of them.
        timeout: seconds of silence after which a connection is dead.
        workers: processes that make images smaller.
    """

    data: Path
    scripts: Path
    subset: Subset | None = None
    keep_originals: bool = False
    parallel: int = 8
    retries: int = 8
    wait: float = 1.0
    timeout: float = 60.0
    workers: int = 0


def fetch(table: ResourceTable, resources: dict[str, Resource], options: Options) -> int:
    """Fetch resources and build their folders.

    Returns:
        0 when all is there, 1 when single images could not be fetched.

    Raises:
        DataError: the user has to fix something; fetched files stay.
    """
    data = options.data
    if options.subset and not any(r.images or r.subset_after for r in resources.values()):
        raise ConfigError("--subset concerns images of MIMIC-CXR; nothing that was named has any.")
    for name, resource in resources.items():
        check_expected(name, resource, data)
    missed: dict[str, str] = {}
    for account, members in _by_account(resources).items():
        with _Server(table, account, members, options) as server:
            server.fetch_files()
            for resource in members.values():
                if resource.images:
                    missed |= server.fetch_images(resource, resource.images)
    for resource in resources.values():
        for model in resource.models:
            new = fetch_model(model, data / model.path, options.parallel)
            print(f"{data / model.path}: {'fetched' if new else 'was there already'}", flush=True)
    for resource in resources.values():
        step, target = resource.unpack, data / resource.target
        if step and not is_unpacked(step, target, data):
            keep, workers = options.keep_originals, options.workers
            unpack_and_resize(step, target, data, keep=keep, workers=workers)
    if missed:
        print(
            f"{counted(len(missed), 'image')} could not be fetched; {FAILED} lists them, and the "
            "same command tries again. The scripts that follow wait for them."
        )
        return 1
    for resource in resources.values():
        more = resource.subset_after if options.subset else ()
        for command in resource.after:
            run_script((*command, *more), options.scripts, data)
    return 0


def _run(given: argparse.Namespace, scripts: Path) -> int:
    table = load_table(given.resources)
    names = list(dict.fromkeys(part for name in given.names for part in name_list(name)))
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


def _account(table: ResourceTable, name: str) -> str:
    if not name:
        return ""
    account = table.accounts[name]
    return (
        f"{account.host}; user and password from {account.username} and {account.password}, "
        "~/.netrc, or asked for"
    )


def _parser(scripts: Path) -> argparse.ArgumentParser:
    parser = argument_parser(__doc__ or "")
    add = parser.add_argument
    what = "what to fetch, such as mimic-cxr-images-512,SELFSUP; without a name, list what there is"
    add("names", nargs="*", metavar="NAME[,NAME...]", help=what)
    add("--data", type=Path, default=Path("data"), help="data folder")
    add(
        "--subset",
        metavar="N|SPLIT|SPLIT:N",
        help="images of MIMIC-CXR: only the first N studies, only a split, or both",
    )
    add("--keep-originals", action="store_true", help="keep images in their published size as well")
    add("--parallel", type=positive, default=8, help="transfers at a time")
    add(
        "--retries",
        type=count,
        default=8,
        help="attempts without a new byte before giving up",
    )
    add("--wait", type=float, default=1.0, help="seconds before the first retry")
    add("--timeout", type=float, default=60.0, help="seconds below 1 kB a second")
    add_workers(parser)
    add(
        "--resources",
        type=Path,
        default=scripts / "resources.yml",
        help="table of what there is (default: resources.yml beside this script)",
    )
    return parser


class _Server:
    """All resources from one server under one account."""

    def __init__(
        self, table: ResourceTable, account: str, resources: dict[str, Resource], options: Options
    ) -> None:
        self.resources, self.options, self.data = resources, options, options.data
        self.account = table.accounts[account] if account else None
        self.transfer: Transfer | None = None

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.transfer:
            self.transfer.close()

    def fetch_files(self) -> None:
        """Fetch the files of all resources, those of sums first."""
        wanted: dict[Path, tuple[File, str]] = {}
        for resource in self.resources.values():
            for file in resource.files:
                wanted[self.data / file.path] = (file, resource.page)
        lists = {
            file.sums: Job(file.sums, self._sums_path(file.sums), page=page)
            for file, page in wanted.values()
            if file.sums
        }
        for resource in self.resources.values():
            if resource.images:
                sums = resource.images.sums
                lists[sums] = Job(sums, self._sums_path(sums), page=resource.page)
        self._fetch("sums", list(lists.values()))
        jobs = []
        for path, (file, page) in wanted.items():
            sha256 = file.sha256
            if file.sums and not sha256:
                sha256 = self._published_sum(file)
            jobs.append(Job(file.url, path, file.bytes, sha256, page))
        later = {self.data / r.target: _later(r, self.data) for r in self.resources.values()}
        self._fetch("files", jobs, later)

    def fetch_images(self, resource: Resource, images: Images) -> dict[str, str]:
        """Fetch images and make each smaller as it arrives.

        Returns:
            Of each image that could not be fetched, the reason.
        """
        target, keep = self.data / resource.target, self.options.keep_originals
        names = list_images(self.data / images.split, self.options.subset or Subset())
        missing = not_done(names, target, self.data / images.originals if keep else None)
        there = len(names) - len(missing)
        print(f"{target}: {there:,} of {len(names):,} images are there", flush=True)
        note = target / FAILED
        note.unlink(missing_ok=True)
        if not missing:
            return {}
        sums = read_sums(self._sums_path(images.sums), set(missing))
        jobs = image_jobs(images, missing, sums, self.data, target, resource.page)
        passing = len(missing) if keep else min(len(missing), self.options.parallel)
        check_space(
            {
                target: len(missing) * images.kept_each,
                self.data / images.originals: passing * images.bytes_each,
            }
        )
        each = images.bytes_each
        transfer = self._open()
        bar = TransferBar("images", len(missing) * each, each)
        transfer.on_bytes, transfer.on_size = bar.arrived, bar.sized
        work = partial(fetch_image, transfer, images, keep=keep)
        try:
            failed = run_all(work, jobs, self.options.parallel, transfer.stop)
        finally:
            bar.close()
        if failed:
            target.mkdir(parents=True, exist_ok=True)
            lines = (f"{name}\t{' '.join(reason.split())}\n" for name, reason in failed.items())
            note.write_text("".join(lines), encoding="utf-8")
        return failed

    def _fetch(self, what: str, jobs: list[Job], later: dict[Path, int] | None = None) -> None:
        missing = [job for job in jobs if not is_there(job)]
        if not missing:
            check_space(later or {})
            return
        transfer = self._open()
        sized = []
        for job in missing:
            # One after the other, so that a wrong password is tried only once.
            size = job.bytes if job.bytes is not None else transfer.size_of(job)
            sized.append((job, size or 0, _arrived(job)))
        needed: dict[Path, int] = defaultdict(int, later or {})
        for job, size, arrived in sized:
            needed[job.path.parent] += max(0, size - arrived)
        check_space(needed)
        total = sum(size for _, size, _ in sized)
        print(f"Fetching {len(sized)} {what}, {readable(total)}", flush=True)
        bar = TransferBar(what, total)
        for job, size, _ in sized:
            bar.sized(replace(job, bytes=size), size)
        transfer.on_bytes, transfer.on_size = bar.arrived, bar.sized
        bar.arrived(sum(arrived for _, _, arrived in sized))
        try:
            failed = run_all(transfer.fetch, missing, self.options.parallel, transfer.stop)
        finally:
            bar.close()
        if failed:
            raise DataError("\n".join(failed.values()))

    def _open(self) -> Transfer:
        if self.transfer is None:
            options, account = self.options, self.account
            self.transfer = Transfer(
                find_login(account) if account else None,
                agent=account.user_agent if account else "",
                retries=options.retries,
                wait=options.wait,
                timeout=options.timeout,
            )
        return self.transfer

    def _sums_path(self, url: str) -> Path:
        parts = [part for part in urlsplit(url).path.split("/") if part not in ("", "files")]
        return self.data / "raw" / "sums" / "-".join(parts)

    def _published_sum(self, file: File) -> str:
        assert file.sums is not None
        # The list stands at the top of a release, and names files relative to it.
        name = file.url.removeprefix(file.sums.rpartition("/")[0] + "/")
        path = self._sums_path(file.sums)
        sums = read_sums(path, {name})
        if name not in sums:
            raise DataError(f"{path} has no sum of {name}: is {file.sums} of the same release?")
        return sums[name]


def _by_account(resources: dict[str, Resource]) -> dict[str, dict[str, Resource]]:
    groups: dict[str, dict[str, Resource]] = defaultdict(dict)
    for name, resource in resources.items():
        groups[resource.account][name] = resource
    return groups


def _later(resource: Resource, data: Path) -> int:
    """Return the space for models and unpacking besides the files, less what exists."""
    later = 0
    for model in resource.models:
        if not has_model(data / model.path):
            later += _still(model.bytes, data / model.path)
    step, target = resource.unpack, data / resource.target
    if step and not (target / DONE).is_file():
        later += _still(step.bytes, data / step.folder) + _still(step.kept_bytes, target)
    return later


def _still(size: int, folder: Path) -> int:
    """Return the bytes that a folder still lacks of its final size."""
    if not size:
        return 0
    held = sum(os.path.getsize(path) for path in walk_files(folder) if path.is_file())
    return max(0, size - held)


def _arrived(job: Job) -> int:
    part = part_of(job.path)
    return part.stat().st_size if part.is_file() else 0
