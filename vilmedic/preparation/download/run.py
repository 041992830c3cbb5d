"""Fetches some resources: checks first, then transfers, then the steps that follow."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from vilmedic.errors import ConfigError, DataError
from vilmedic.files import walk_files
from vilmedic.preparation.download.answers import Job
from vilmedic.preparation.download.credentials import Login, find_login
from vilmedic.preparation.download.hub import fetch_model, has_model
from vilmedic.preparation.download.images import (
    Subset,
    fetch_image,
    image_jobs,
    list_images,
    not_done,
    read_sums,
)
from vilmedic.preparation.download.progress import Progress, run_all
from vilmedic.preparation.download.space import check_space, readable
from vilmedic.preparation.download.steps import (
    DONE,
    check_expected,
    is_unpacked,
    run_script,
    unpack_and_resize,
)
from vilmedic.preparation.download.table import File, Images, Resource, Table
from vilmedic.preparation.download.transfer import Transfer, is_there, part_of

FAILED = "failed.txt"


@dataclass(frozen=True)
class Options:
    """How to fetch.

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


def fetch(table: Table, resources: dict[str, Resource], options: Options) -> int:
    """Fetch resources and build what follows from them.

    Returns:
        0 when all is there, 1 when single images could not be fetched.

    Raises:
        DataError: something that the user has to mend; what was fetched stays.
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
            f"{len(missed):,} images could not be fetched; {FAILED} lists them, and the same "
            "command tries them again. The scripts that follow wait for them."
        )
        return 1
    for resource in resources.values():
        more = resource.subset_after if options.subset else ()
        for command in resource.after:
            run_script((*command, *more), options.scripts, data)
    return 0


class _Server:
    """All that comes from one server under one account."""

    def __init__(
        self, table: Table, account: str, resources: dict[str, Resource], options: Options
    ) -> None:
        self.resources, self.options, self.data = resources, options, options.data
        self.login: Login | None = None
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
        room = {self.data / r.target: _later(r, self.data) for r in self.resources.values()}
        self._fetch("files", jobs, room)

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
        progress = Progress("images", len(missing) * each, each)
        transfer.on_bytes, transfer.on_size = progress.arrived, progress.sized
        work = partial(fetch_image, transfer, images, keep=keep)
        try:
            failed = run_all(work, jobs, self.options.parallel, transfer.stop)
        finally:
            progress.close()
        if failed:
            target.mkdir(parents=True, exist_ok=True)
            lines = (f"{name}\t{' '.join(reason.split())}\n" for name, reason in failed.items())
            note.write_text("".join(lines), encoding="utf-8")
        return failed

    def _fetch(self, what: str, jobs: list[Job], room: dict[Path, int] | None = None) -> None:
        missing = [job for job in jobs if not is_there(job)]
        if not missing:
            check_space(room or {})
            return
        transfer = self._open()
        sized = []
        for job in missing:
            # One after the other: a wrong password is tried once, not many times at once.
            size = job.bytes if job.bytes is not None else transfer.size_of(job)
            sized.append((job, size or 0, _arrived(job)))
        needed: dict[Path, int] = defaultdict(int, room or {})
        for job, size, arrived in sized:
            needed[job.path.parent] += max(0, size - arrived)
        check_space(needed)
        total = sum(size for _, size, _ in sized)
        print(f"Fetching {len(sized)} {what}, {readable(total)}", flush=True)
        progress = Progress(what, total)
        for job, size, _ in sized:
            progress.sized(replace(job, bytes=size), size)
        transfer.on_bytes, transfer.on_size = progress.arrived, progress.sized
        progress.arrived(sum(arrived for _, _, arrived in sized))
        try:
            failed = run_all(transfer.fetch, missing, self.options.parallel, transfer.stop)
        finally:
            progress.close()
        if failed:
            raise DataError("\n".join(failed.values()))

    def _open(self) -> Transfer:
        if self.transfer is None:
            if self.account is not None:
                self.login = find_login(self.account)
            options = self.options
            self.transfer = Transfer(
                self.login, retries=options.retries, wait=options.wait, timeout=options.timeout
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
    """Room that models and unpacking will take beside the files; what is there already counts."""
    later = 0
    for model in resource.models:
        if not has_model(data / model.path):
            later += _still(model.bytes, data / model.path)
    step, target = resource.unpack, data / resource.target
    if step and not (target / DONE).is_file():
        later += _still(step.bytes, data / step.folder) + _still(step.kept_bytes, target)
    return later


def _still(size: int, folder: Path) -> int:
    """Of the bytes that a folder will hold, those that it does not hold yet."""
    if not size:
        return 0
    held = sum(os.path.getsize(path) for path in walk_files(folder) if path.is_file())
    return max(0, size - held)


def _arrived(job: Job) -> int:
    part = part_of(job.path)
    return part.stat().st_size if part.is_file() else 0
