"""Resumable HTTP download of one file, verified before it gets its name."""

from __future__ import annotations

import getpass
import gzip
import os
import random
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
from tqdm import tqdm

from vilmedic.errors import DataError
from vilmedic.files import BLOCK, DAMAGE, FULL, disk_message, sha256_of
from vilmedic.http import (
    Again,
    Answer,
    Login,
    NotAFile,
    WrongPassword,
    may_pass,
    netrc_login,
    open_client,
    received,
    said,
)
from vilmedic.log import counted
from vilmedic.preparation.download.resources import Account

LONGEST_WAIT = 60.0  # seconds
LONGEST_ASKED = 600.0  # seconds that a server may ask us to wait
SPOILT = 3  # downloads of wrong content before it is reported
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
MOST_DIGITS = 18  # of a number in a header; larger ones are impossible
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<meta", b"<title")


class NoAccess(DataError):
    """The account is valid but has no access to this data set."""


class NotThere(DataError):
    """The server has no such file."""


class WrongContent(DataError):
    """The downloaded file differs from the published one in size or checksum."""


class NoSpace(DataError):
    """The disk has too little space."""


class Unreachable(DataError):
    """No answer, or only server errors, after all retries."""


class Stopped(DataError):
    """Stopped because another transfer failed permanently."""


FATAL = (WrongPassword, NoAccess, NotAFile, NoSpace, Unreachable, Stopped)
"""Failures that would repeat for the next file."""


@dataclass(frozen=True)
class Job:
    """A file to fetch.

    Attributes:
        url: where it is.
        path: where it goes.
        bytes: its size, when known.
        sha256: its sum, when known.
        page: where one gets access to it, for messages.
    """

    url: str
    path: Path
    bytes: int | None = None
    sha256: str | None = None
    page: str = ""


class Transfer:
    """Fetches files, resuming, retrying and verifying each.

    A file is written as `<name>.part` and renamed when size and checksum are right, so that a file
    under its own name is complete.

    Args:
        login: user and password, for the files that need them.
        agent: user agent that the server requires; empty for the default.
        retries: attempts in a row without a single new byte before giving up.
        wait: seconds before the first retry, doubled for each further one.
        timeout: seconds without any byte, or with less than 1 kB a second, after which a connection
            counts as dead.
        on_bytes: called with the number of new bytes, negative if some are discarded.
        on_size: called with the size of a file once it is known.
    """

    def __init__(
        self,
        login: Login | None = None,
        *,
        agent: str = "",
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
        self.client = open_client(timeout, agent)

    def close(self) -> None:
        """Close all connections."""
        self.client.close()

    def fetch(self, job: Job) -> bool:
        """Fetch a file unless it exists.

        Returns:
            Whether it had to be fetched.

        Raises:
            DataError: one of the kinds above.
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
            except Again as failure:
                # Bytes that were discarded are no progress when they arrive again.
                useful = _size(part) > furthest and not failure.dead
                failed = 0 if useful else failed + 1
                furthest = max(furthest, _size(part))
                if failed > self.retries:
                    raise Unreachable(
                        f"{job.url}: {failure}; gave up after {failed} attempts. Run the same "
                        "command again to resume."
                    ) from None
                self._pause(failure.wait, failed)
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
                        check_response(response, job, self.login)
                        return whole_number(response.headers.get("Content-Length"))
                    return None
            except Again as failure:
                failed += 1
                if failed > self.retries:
                    raise Unreachable(f"{job.url}: {failure}; gave up.") from None
                self._pause(failure.wait, failed)

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
            # Without a version it is unknown whether the rest is of the same file.
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
                raise Again(
                    "the server has less than was fetched before: it starts from the beginning"
                )
            check_response(response, job, self.login)
            total = whole_number(response.headers.get("Content-Length"))
            if response.status_code == 206:
                total = _resumed_total(response, start)
                if job.sha256 is None and _version(response) != tag:
                    self._discard(part)
                    raise Again(
                        "the file has changed on the server, so it is fetched from the start"
                    )
            elif start:
                self._discard(part)  # the whole file is sent: it changed, or no ranges
                start = 0
            if total is not None:
                self.on_size(job, total)
            _remember(response, part)
            with open(part, "ab" if start else "wb") as file:
                for chunk in received(response, self.timeout):
                    if self.stop.is_set():
                        raise Stopped(f"{job.url}: stopped.")
                    file.write(chunk)
                    self.on_bytes(len(chunk))
            ends_by_closing = "Transfer-Encoding" not in response.headers
        if total is not None and _size(part) < total:
            raise Again("the connection was cut")
        if total is None and ends_by_closing and job.bytes is None and job.sha256 is None:
            _check_ending(job, part)

    def _request(self, method: str, job: Job, headers: dict[str, str]) -> Answer:
        return Answer(self.client, method, job.url, headers, self.login)

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
            tqdm.write(
                f"The server asks to wait for {counted(round(asked), 'second')}{most}.",
                file=sys.stderr,
            )
        if self.stop.wait(seconds):
            raise Stopped("Stopped.")


def is_there(job: Job) -> bool:
    """Return whether a file is there in its published size and with its published sum."""
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


def disk_error(path: Path, error: OSError) -> NoSpace | OSError:
    """The exception for a disk error, with its own message for a full disk."""
    if error.errno in FULL:
        return NoSpace(disk_message(error, str(path.parent)))
    return error


def check_response(response: httpx2.Response, job: Job, login: Login | None) -> None:
    """Raise errors for responses that are not a file."""
    status = response.status_code
    host = response.url.host
    if status == 401:
        what = "does not accept user and password" if login else "wants a user and a password"
        raise WrongPassword(f"{host} {what}. Check both, and try to log in there with them.")
    if status == 403:
        raise NoAccess(
            f"{host} gives this account no access to {job.url}. Complete the required training and "
            f"sign the data use agreement{' at ' + job.page if job.page else ''}, then run this "
            "again."
        )
    if status in (404, 410):
        raise NotThere(
            f"{job.url} does not exist. The release may have moved: see "
            f"{job.page or 'its web page'}, and correct the table of resources."
        )
    if may_pass(status):
        raise Again(said(response), _seconds(response.headers.get("Retry-After")))
    if status not in (200, 206):
        raise NotAFile(f"{job.url}: {said(response)}.")
    kind = response.headers.get("Content-Type", "").strip().lower()
    if kind.startswith(("text/html", "application/xhtml")) and not _is_page(job.path):
        raise web_page(job, response.url.path)
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("", "identity") and job.sha256 is None and not _is_gzip(job.path):
        raise NotAFile(
            f"{job.url}: the server sends it packed ({packed}) although the file as it is was "
            f"asked for, so that it cannot be compared with anything. Fetch it with a browser and "
            f"put it at {job.path}."
        )


def web_page(job: Job, where: str) -> NotAFile:
    """Return the error for a login form or notice instead of a file."""
    return NotAFile(
        f"{job.url}: the server sent a web page instead ({where}), most likely a "
        "login form or a notice. Open the address in a browser to see what it asks for."
    )


def looks_like_page(job: Job, start: bytes) -> bool:
    """Return whether the first bytes of a file are markup, whatever the server calls them."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    return text.startswith(_MARKUP) and not _is_page(job.path)


def whole_number(text: str | None) -> int | None:
    """A header that holds a number, or None."""
    return int(text) if text and text.isdecimal() and len(text) <= MOST_DIGITS else None


def find_login(account: Account, environment: Mapping[str, str] = os.environ) -> Login:
    """User and password: from the environment, else from netrc, else asked for.

    Raises:
        WrongPassword: none has them, and there is no terminal to ask.
    """
    user = environment.get(account.username, "")
    password = environment.get(account.password, "")
    if user and password:
        return Login(account.host, user, password)
    kept = netrc_login(account.host, environment)
    if kept is not None and user in ("", kept.user):
        return kept
    if not (sys.stdin and sys.stdin.isatty()):
        raise WrongPassword(
            f"{account.host} needs a user and a password. Set {account.username} and "
            f"{account.password}, or put them into ~/.netrc (machine {account.host} login USER "
            f"password PASSWORD), or run this in a terminal to be asked. Sign up: {account.page}"
        )
    user = user or input(f"User at {account.host}: ").strip()
    return Login(account.host, user, password or getpass.getpass(f"Password of {user}: "))


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _check(job: Job, path: Path) -> None:
    size = path.stat().st_size
    if not size and job.bytes is None:
        raise WrongContent(f"{job.url} gave an empty file.")
    if job.bytes is not None and size != job.bytes:
        raise WrongContent(f"{job.url} gave {size:,} bytes; {job.bytes:,} are published.")
    if job.sha256 is not None and (got := sha256_of(path)) != job.sha256.lower():
        raise WrongContent(
            f"{job.url} gave a file of the SHA-256 {got}; {job.sha256.lower()} is published. It "
            f"was deleted {SPOILT} times: something changes it on the way, or the sum is that "
            "of another release."
        )
    if job.sha256 is None:
        with open(path, "rb") as file:
            if looks_like_page(job, file.read(1024)):
                raise web_page(job, "see the address")


def _check_ending(job: Job, part: Path) -> None:
    """Refuse a file of unknown size, unless its format shows its end.

    Raises:
        Again: it is an archive, and ends before its end.
        NotAFile: a truncated file could not be noticed.
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
            f"{job.url}: the server does not say how large the file is, so that a truncated file "
            "could not be noticed. State its bytes or sha256 in the table of resources."
        )


def _resumed_total(response: httpx2.Response, start: int) -> int | None:
    found = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    if found is None or int(found[1]) != start:
        raise Again("the server sent another part than the one asked for")
    return None if found[3] == "*" else int(found[3])


def _version(response: httpx2.Response) -> str:
    """Identifies the version of a file: its strong tag, or when it was changed."""
    tag: str = response.headers.get("ETag", "")
    if not tag or tag.startswith("W/"):
        tag = response.headers.get("Last-Modified", "")
    return tag


def _remember(response: httpx2.Response, part: Path) -> None:
    """Record the version of the file being fetched, so that versions are not mixed."""
    if tag := _version(response):
        _tag_of(part).write_text(tag)
    else:
        _tag_of(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_page(path: Path) -> bool:
    return path.name.lower().endswith((".html", ".htm", ".xhtml"))


def _is_gzip(path: Path) -> bool:
    """Return whether a content encoding is that of the file itself, such as of a `.gz`."""
    return path.name.lower().endswith((".gz", ".tgz"))


def _seconds(text: str | None) -> float | None:
    """Parse the waiting time from a number or date; None without either."""
    if text and text.isdecimal():
        return float(text[:MOST_DIGITS])
    try:
        then = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    zoned = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return max(0.0, (zoned - datetime.now(timezone.utc)).total_seconds())
