"""User and password of a server: from the environment, from netrc, or asked for.

They are held in memory only, shown nowhere, and sent to their own host alone.
"""

from __future__ import annotations

import getpass
import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx2

from vilmedic.preparation.download.errors import WrongPassword
from vilmedic.preparation.download.table import Account

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Login:
    """User and password for one host.

    Args:
        account: whose.
        user: the user's name.
        password: the password.
    """

    def __init__(self, account: Account, user: str, password: str) -> None:
        self.account, self.user = account, user
        self._auth = httpx2.BasicAuth(user.encode(), password.encode())

    def __repr__(self) -> str:
        return f"Login({self.account.host!r})"

    def auth_for(self, url: str) -> httpx2.Auth | None:
        """What to send along with a request; nothing to other hosts, and nothing unencrypted."""
        parts = httpx2.URL(url)
        if parts.host != httpx2.URL(f"//{self.account.host}").host:
            return None
        if parts.scheme != "https" and parts.host not in _LOOPBACK:
            return None
        return self._auth


def find_login(account: Account, environment: Mapping[str, str] = os.environ) -> Login:
    """User and password, from the first of the three places that has them.

    Raises:
        WrongPassword: none has them, and there is nobody to ask.
    """
    user = environment.get(account.username, "")
    password = environment.get(account.password, "")
    if user and password:
        return Login(account, user, password)
    kept = _netrc(account.host, environment)
    if kept is not None and (not user or kept[0] == user):
        return Login(account, *kept)
    if not (sys.stdin and sys.stdin.isatty()):
        raise WrongPassword(
            f"{account.host} needs a user and a password. Set {account.username} and "
            f"{account.password}, or put them into ~/.netrc (machine {account.host} login USER "
            f"password PASSWORD), or run this in a terminal to be asked. Sign up: {account.page}"
        )
    user = user or input(f"User at {account.host}: ").strip()
    return Login(account, user, password or getpass.getpass(f"Password of {user}: "))


def _netrc(host: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    path = Path(environment.get("NETRC") or Path.home() / ".netrc")
    if not path.is_file():
        return None
    try:
        found = netrc.netrc(str(path)).authenticators(host.partition(":")[0])
    except (OSError, netrc.NetrcParseError) as error:
        reason = getattr(error, "msg", None) or getattr(error, "strerror", None) or "unreadable"
        raise WrongPassword(f"{path} cannot be used: {reason}.") from None
    if found is None or not found[0] or not found[2]:
        return None
    return found[0], found[2]
