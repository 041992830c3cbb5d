from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.preparation.download.credentials import find_login
from vilmedic.preparation.download.errors import WrongPassword
from vilmedic.preparation.download.table import Account

ACCOUNT = Account("physionet.org", "PHYSIONET_USERNAME", "PHYSIONET_PASSWORD", "https://page")
URL = "https://physionet.org/files/x"


def header(environment: dict[str, str]) -> str:
    auth = find_login(ACCOUNT, environment).auth_for(URL)
    assert auth is not None
    return str(vars(auth)["_auth_header"])


def netrc(home: Path, text: str, name: str = ".netrc") -> Path:
    path = home / name
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_the_environment_comes_first(home: Path) -> None:
    netrc(home, "machine physionet.org login other password other\n")
    got = header({"PHYSIONET_USERNAME": "user", "PHYSIONET_PASSWORD": "pass:word"})
    assert got == "Basic dXNlcjpwYXNzOndvcmQ="  # base64 of user:pass:word


def test_netrc_comes_next(home: Path) -> None:
    netrc(
        home, "machine elsewhere.org login a password b\nmachine physionet.org login u password p\n"
    )
    assert header({}) == "Basic dTpw"
    moved = netrc(home, "machine physionet.org login x password y\n", "moved")
    assert header({"NETRC": str(moved)}) == "Basic eDp5"
    assert header({"PHYSIONET_USERNAME": "u"}) == "Basic dTpw"


def test_the_rest_is_asked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: " u ")
    monkeypatch.setattr("getpass.getpass", lambda _: "p")
    assert header({}) == "Basic dTpw"
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("the user is known"))
    assert header({"PHYSIONET_USERNAME": "u"}) == "Basic dTpw"


def test_without_any_and_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(WrongPassword, match=r"PHYSIONET_PASSWORD.*netrc.*https://page"):
        find_login(ACCOUNT, {"PHYSIONET_USERNAME": "u"})


def test_a_broken_netrc_is_named_without_its_content(home: Path) -> None:
    netrc(home, "machine physionet.org login u pasword s3cret\n")
    with pytest.raises(WrongPassword, match=r"\.netrc cannot be used") as caught:
        find_login(ACCOUNT, {})
    assert "s3cret" not in str(caught.value)


def test_a_login_does_not_show_what_it_holds() -> None:
    login = find_login(ACCOUNT, {"PHYSIONET_USERNAME": "user", "PHYSIONET_PASSWORD": "s3cret"})
    assert "s3cret" not in repr(login)
    assert "user" not in repr(login)
