"""Shared HTTP client of downloads and shards: retries on transient failures, netrc logins."""

from __future__ import annotations

import netrc
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2

from vilmedic.errors import DataError
from vilmedic.log import counted

AGENT = "vilmedic-download"
SLOWEST = 1000  # bytes a second; less than that for `timeout` seconds is a dead connection
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class WrongPassword(DataError):
    """The server rejects user and password, or requires them."""


class NotAFile(DataError):
    """The server sent a web page, such as a login form, instead of a file."""


class Again(Exception):
    """A temporary failure.

    Args:
        reason: what happened.
        wait: seconds that the server asks to wait.
        dead: whether the connection made no useful progress.
    """

    def __init__(self, reason: str, wait: float | None = None, *, dead: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.dead = wait, dead


class Login:
    """User and password for one host; kept only in memory, never shown or sent to other hosts.

    Args:
        host: the host.
        user: the user's name.
        password: the password.
    """

    def __init__(self, host: str, user: str, password: str) -> None:
        self.host, self.user = host, user
        self._auth = httpx2.BasicAuth(user.encode(), password.encode())

    def __repr__(self) -> str:
        return f"Login({self.host!r})"

    def auth_for(self, url: str) -> httpx2.Auth | None:
        """Return the credentials for a request; None for other hosts or without encryption."""
        parts = httpx2.URL(url)
        if parts.host != httpx2.URL(f"//{self.host}").host:
            return None
        if parts.scheme != "https" and parts.host not in _LOOPBACK:
            return None
        return self._auth


def netrc_login(host: str, environment: Mapping[str, str] = os.environ) -> Login | None:
    """Read user and password of a host from `~/.netrc`, or the file that `NETRC` names.

    Only the host's own entry is used: `default` would be sent to any server.

    Raises:
        WrongPassword: the file cannot be used.
    """
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return None
    try:
        user, _, password = netrc.netrc(str(path)).hosts.get(host.partition(":")[0], ("", "", ""))
    except (OSError, netrc.NetrcParseError) as error:
        reason = getattr(error, "msg", None) or getattr(error, "strerror", None) or "unreadable"
        raise WrongPassword(f"{path} cannot be used: {reason}.") from None
    return Login(host, user, password) if user and password else None


def open_client(timeout: float, agent: str = "") -> httpx2.Client:
    """Open a client that follows redirects and requests files without compression.

    Args:
        timeout: seconds without any byte after which a connection counts as dead.
        agent: user agent; empty for the default.
    """
    return httpx2.Client(
        timeout=timeout,
        follow_redirects=True,
        headers={"User-Agent": agent or AGENT, "Accept-Encoding": "identity"},
        limits=httpx2.Limits(max_connections=64, max_keepalive_connections=64),
    )


class Answer:
    """A response as a context; failures of the network become `Again`."""

    def __init__(
        self,
        client: httpx2.Client,
        method: str,
        url: str,
        headers: dict[str, str],
        login: Login | None,
    ) -> None:
        auth = login.auth_for(url) if login else None
        self.context = client.stream(method, url, headers=headers, auth=auth)

    def __enter__(self) -> httpx2.Response:
        try:
            return self.context.__enter__()
        except httpx2.TooManyRedirects:
            raise NotAFile("The server redirects in circles.") from None
        except httpx2.RequestError as error:
            raise Again(_reason(error)) from None

    def __exit__(self, *raised: Any) -> None:
        self.context.__exit__(*raised)


def may_pass(status: int) -> bool:
    """Return whether a response status is temporary."""
    return status in (408, 425, 429) or status >= 500


def said(response: httpx2.Response) -> str:
    """Description of a server's response status."""
    return f"the server answers {response.status_code} {response.reason_phrase}"


def received(response: httpx2.Response, timeout: float) -> Iterator[bytes]:
    """Yield the bytes of a file as they arrive.

    Chunks have the size in which they arrive: with a fixed size, the last bytes would be lost if
    the connection breaks.

    Raises:
        Again: the connection broke, or was slower than `SLOWEST` for `timeout` seconds.
    """
    since, fresh = time.monotonic(), 0
    try:
        for chunk in response.iter_raw():
            yield chunk
            fresh += len(chunk)
            if time.monotonic() - since > timeout:
                if fresh < SLOWEST * timeout:
                    slow = f"only {counted(fresh, 'byte')} came in {timeout:.0f} seconds"
                    raise Again(slow, dead=True)
                since, fresh = time.monotonic(), 0
    except httpx2.RequestError as error:
        raise Again(_reason(error)) from None


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
