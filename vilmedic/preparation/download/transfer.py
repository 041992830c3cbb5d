"""Resumable HTTP download of one file, verified before it counts."""

from __future__ import annotations

import gzip
import os
import random
import re
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

from vilmedic.files import BLOCK, DAMAGE, FULL, disk_trouble, sha256_of
from vilmedic.preparation.download.answers import (
    Again,
    Answer,
    Job,
    judge,
    looks_like_page,
    reason_of,
    web_page,
    whole_number,
)
from vilmedic.preparation.download.credentials import Login
from vilmedic.preparation.download.errors import (
    Interrupted,
    NoSpace,
    NotAFile,
    Unreachable,
    WrongContent,
)

LONGEST_WAIT = 60.0  # seconds
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
SLOWEST = 1000  # bytes a second; less than that for `timeout` seconds is a dead connection
SPOILT = 3  # times that wrong content is fetched anew before it is reported
AGENT = "vilmedic-download"
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Transfer:
    """Fetches files, resuming, retrying and verifying each.

    A file grows under the name `<name>.part` and gets its own name when size and sum are right, so
    whatever bears its own name is complete.

    Args:
        login: user and password, for the files that need them.
        retries: attempts in a row without a single new byte before giving up.
        wait: seconds before the first of them; each wait doubles the one before.
        timeout: seconds without any byte, or with less than 1 kB a second, after which a connection
            counts as dead.
        on_bytes: told how many bytes arrived; a negative number when some are thrown away.
        on_size: told how large a file is, once that is known.
    """

    def __init__(
        self,
        login: Login | None = None,
        *,
        retries: int = 8,
        wait: float = 1.0,
        timeout: float = 60.0,
        on_bytes: Callable[[int], None] = lambda _: None,
        on_size: Callable[[Job, int], None] = lambda _job, _size: None,
    ) -> None:
        self.login, self.retries, self.wait = login, retries, wait
        self.timeout = timeout
        self.on_bytes, self.on_size = on_bytes, on_size
        self.stop = threading.Event()
        agent = login.account.user_agent if login and login.account.user_agent else AGENT
        self.client = httpx2.Client(
            timeout=timeout,
            follow_redirects=True,
            headers={"User-Agent": agent, "Accept-Encoding": "identity"},
            limits=httpx2.Limits(max_connections=64, max_keepalive_connections=64),
        )

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def fetch(self, job: Job) -> bool:
        """Fetch a file unless it is there.

        Returns:
            Whether it had to be fetched.

        Raises:
            DataError: one of the kinds in `vilmedic.preparation.download.errors`.
        """
        if is_there(job):
            return False
        part = part_of(job.path)
        part.parent.mkdir(parents=True, exist_ok=True)
        failed = spoilt = 0
        furthest = _size(part)
        while True:
            try:
                self._receive(job, part)
                _check(job, part)
            except WrongContent:
                spoilt += 1
                self._discard(part)
                if spoilt >= SPOILT:
                    raise
            except Again as trouble:
                # Bytes that came before and were thrown away are no progress when they come again.
                useful = _size(part) > furthest and not trouble.dead
                failed = 0 if useful else failed + 1
                furthest = max(furthest, _size(part))
                if failed > self.retries:
                    raise Unreachable(
                        f"{job.url}: {trouble}; gave up after {failed} attempts. Run the same "
                        "command again to go on from here."
                    ) from None
                self._pause(trouble.wait, failed)
            except OSError as error:
                raise disk_error(job.path, error) from error
            else:
                os.replace(part, job.path)
                _tag_of(part).unlink(missing_ok=True)
                return True

    def size_of(self, job: Job) -> int | None:
        """The size of a file as the server says it, or None when it does not.

        Raises:
            DataError: the server refuses.
        """
        failed = 0
        while True:
            try:
                with self._request("HEAD", job, {}) as response:
                    if response.status_code not in (405, 501):
                        judge(response, job, self.login)
                        return whole_number(response.headers.get("Content-Length"))
                    return None
            except Again as trouble:
                failed += 1
                if failed > self.retries:
                    raise Unreachable(f"{job.url}: {trouble}; gave up.") from None
                self._pause(trouble.wait, failed)

    def _receive(self, job: Job, part: Path) -> None:
        start = _size(part)
        if job.bytes is not None and start >= job.bytes:
            if start == job.bytes:
                return
            self._discard(part)
            start = 0
        headers = {}
        tag = _tag_of(part).read_text() if _tag_of(part).is_file() else ""
        if start and not tag and job.sha256 is None:
            # Nothing would tell whether the rest is of the same version of the file.
            self._discard(part)
            start = 0
        if start:
            headers["Range"] = f"bytes={start}-"
            if tag:
                headers["If-Range"] = tag
        with self._request("GET", job, headers) as response:
            if response.status_code == 416:
                if response.headers.get("Content-Range", "") == f"bytes */{start}":
                    return  # it had arrived whole
                self._discard(part)
                raise Again("the server has less than was fetched before, so it starts anew")
            judge(response, job, self.login)
            total = whole_number(response.headers.get("Content-Length"))
            if response.status_code == 206:
                total = _resumed_total(response, start)
                if job.sha256 is None and _version(response) != tag:
                    self._discard(part)
                    raise Again(
                        "the file has changed on the server, so it is fetched from the start"
                    )
            elif start:
                self._discard(part)  # the whole file comes again: it changed, or ranges are unknown
                start = 0
            if total is not None:
                self.on_size(job, total)
            _remember(response, part)
            since, fresh = time.monotonic(), 0
            with open(part, "ab" if start else "wb") as file:
                for chunk in _chunks(response):
                    if self.stop.is_set():
                        raise Interrupted(f"{job.url}: stopped.")
                    file.write(chunk)
                    self.on_bytes(len(chunk))
                    fresh += len(chunk)
                    if time.monotonic() - since > self.timeout:
                        if fresh < SLOWEST * self.timeout:
                            slow = f"only {fresh} bytes came in {self.timeout:.0f} seconds"
                            raise Again(slow, dead=True)
                        since, fresh = time.monotonic(), 0
            ends_by_closing = "Transfer-Encoding" not in response.headers
        if total is not None and _size(part) < total:
            raise Again("the connection was cut")
        if total is None and ends_by_closing and job.bytes is None and job.sha256 is None:
            _check_ending(job, part)

    def _request(self, method: str, job: Job, headers: dict[str, str]) -> Any:
        auth = self.login.auth_for(job.url) if self.login else None
        return Answer(self.client, method, job.url, headers, auth)

    def _discard(self, part: Path) -> None:
        self.on_bytes(-_size(part))
        part.unlink(missing_ok=True)
        _tag_of(part).unlink(missing_ok=True)

    def _pause(self, asked: float | None, failed: int) -> None:
        seconds = min(self.wait * 2 ** max(0, failed - 1), LONGEST_WAIT) * random.uniform(
            0.75, 1.25
        )
        if asked is not None and asked > seconds:
            seconds = min(asked, LONGEST_ASKED)
            most = "" if asked <= seconds else f"; tried again after {seconds:.0f}"
            tqdm.write(f"The server asks to wait for {asked:.0f} seconds{most}.", file=sys.stderr)
        if self.stop.wait(seconds):
            raise Interrupted("Stopped.")


def is_there(job: Job) -> bool:
    """Whether a file is there in its published size and with its published sum."""
    if not job.path.is_file():
        return False
    try:
        _check(job, job.path)
    except WrongContent:
        return False
    return True


def part_of(path: Path) -> Path:
    """The name of a file while it grows."""
    return path.with_name(f"{path.name}.part")


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _chunks(response: httpx2.Response) -> Any:
    try:
        # As they come: a fixed size of chunks would lose the last ones when the connection is cut.
        yield from response.iter_raw()
    except httpx2.RequestError as error:
        raise Again(reason_of(error)) from None


def _check(job: Job, path: Path) -> None:
    size = path.stat().st_size
    if not size and job.bytes is None:
        raise WrongContent(f"{job.url} gave an empty file.")
    if job.bytes is not None and size != job.bytes:
        raise WrongContent(f"{job.url} gave {size:,} bytes; {job.bytes:,} are published.")
    if job.sha256 is not None and (got := sha256_of(path)) != job.sha256.lower():
        raise WrongContent(
            f"{job.url} gave a file of the SHA-256 {got}; {job.sha256.lower()} is published. It "
            f"was thrown away {SPOILT} times: something changes it on the way, or the sum is that "
            "of another release."
        )
    if job.sha256 is None:
        with open(path, "rb") as file:
            if looks_like_page(job, file.read(1024)):
                raise web_page(job, "see the address")


def _check_ending(job: Job, part: Path) -> None:
    """Refuse a file of which neither server nor table say the size, unless it shows its own end.

    Raises:
        Again: it is an archive, and ends before its end.
        NotAFile: nothing tells a cut file from a whole one.
    """
    with open(part, "rb") as file:
        start = file.read(4)
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(part) as stream:
                while stream.read(BLOCK):
                    pass
        except DAMAGE as error:
            raise Again(f"the connection was cut ({error})") from None
    elif start == b"PK\x03\x04":
        if not zipfile.is_zipfile(part):
            raise Again("the connection was cut (the list at the end of the archive is missing)")
    else:
        raise NotAFile(
            f"{job.url}: the server does not say how large the file is, so that a cut one would "
            "pass for whole. State its bytes or sha256 in the table of resources."
        )


def _resumed_total(response: httpx2.Response, start: int) -> int | None:
    found = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if found is None or int(found[1]) != start:
        raise Again("the server sent another part than the one asked for")
    return None if found[3] == "*" else int(found[3])


def _version(response: httpx2.Response) -> str:
    """What tells one version of a file from another: its strong tag, or when it was changed."""
    tag: str = response.headers.get("ETag", "")
    if not tag or tag.startswith("W/"):
        tag = response.headers.get("Last-Modified", "")
    return tag


def _remember(response: httpx2.Response, part: Path) -> None:
    """Note which version of the file is being fetched, so that no two are mixed."""
    if tag := _version(response):
        _tag_of(part).write_text(tag)
    else:
        _tag_of(part).unlink(missing_ok=True)


def disk_error(path: Path, error: OSError) -> NoSpace | OSError:
    """What to raise for an error of the disk: that it is full is said in its own words."""
    if error.errno in FULL:
        return NoSpace(disk_trouble(error, str(path.parent)))
    return error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
