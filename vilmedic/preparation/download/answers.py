"""What a server answers, and what that means."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

from vilmedic.preparation.download.credentials import Login
from vilmedic.preparation.download.errors import NoAccess, NotAFile, NotThere, WrongPassword

MOST_DIGITS = 18
"""Of a number in a header: more bytes or seconds than there are."""


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


class Again(Exception):
    """A trouble that may pass.

    Args:
        reason: what happened.
        wait: seconds that the server asks to wait.
        dead: whether the connection was of no use, whatever came over it.
    """

    def __init__(self, reason: str, wait: float | None = None, *, dead: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.dead = wait, dead


class Answer:
    """A response as a context; troubles of the network become `Again`."""

    def __init__(
        self,
        client: httpx2.Client,
        method: str,
        url: str,
        headers: dict[str, str],
        auth: httpx2.Auth | None,
    ) -> None:
        self.context = client.stream(method, url, headers=headers, auth=auth)

    def __enter__(self) -> httpx2.Response:
        try:
            return self.context.__enter__()
        except httpx2.TooManyRedirects:
            raise NotAFile("The server redirects in circles.") from None
        except httpx2.RequestError as error:
            raise Again(reason_of(error)) from None

    def __exit__(self, *raised: Any) -> None:
        self.context.__exit__(*raised)


def judge(response: httpx2.Response, job: Job, login: Login | None) -> None:
    """Turn the answers that are no file into errors."""
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
    if status in (408, 425, 429) or status >= 500:
        wait = _seconds(response.headers.get("Retry-After"))
        raise Again(f"the server answers {status} {response.reason_phrase}", wait)
    if status not in (200, 206):
        raise NotAFile(f"{job.url}: the server answers {status} {response.reason_phrase}.")
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
    """What to raise when a login form or a notice came in place of a file."""
    return NotAFile(
        f"{job.url}: the server sent a web page instead ({where}), most likely a "
        "login form or a notice. Open the address in a browser to see what it wants."
    )


def looks_like_page(job: Job, start: bytes) -> bool:
    """Whether the first bytes of a file are markup, whatever the server calls them."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:512].lower()
    return text.startswith(_MARKUP) and not _is_page(job.path)


_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<meta", b"<title")


def _is_page(path: Path) -> bool:
    return path.name.lower().endswith((".html", ".htm", ".xhtml"))


def _is_gzip(path: Path) -> bool:
    """Servers call files packed that are so by themselves."""
    return path.name.lower().endswith((".gz", ".tgz"))


def reason_of(error: Exception) -> str:
    """Why a request failed, in a few words."""
    return str(error).strip() or type(error).__name__


def whole_number(text: str | None) -> int | None:
    """A header that holds a number, or None."""
    return int(text) if text and text.isdecimal() and len(text) <= MOST_DIGITS else None


def _seconds(text: str | None) -> float | None:
    """How long to wait, out of a number or a date; None when the header says neither."""
    if text and text.isdecimal():
        return float(text[:MOST_DIGITS])
    try:
        then = parsedate_to_datetime(text or "")
    except ValueError:
        return None
    zoned = then if then.tzinfo else then.replace(tzinfo=timezone.utc)
    return max(0.0, (zoned - datetime.now(timezone.utc)).total_seconds())
