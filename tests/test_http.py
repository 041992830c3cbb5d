from __future__ import annotations

from pathlib import Path

import pytest

from vilmedic.http import WrongPassword, netrc_login


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path / ".netrc"


def test_password_is_sent_only_to_its_host_over_https(netrc: Path) -> None:
    netrc.write_text("machine data.org login ada password secret\n")
    login = netrc_login("data.org")
    assert login is not None
    assert login.auth_for("https://data.org/a.tar") is not None
    assert login.auth_for("http://data.org/a.tar") is None
    assert login.auth_for("https://other.org/a.tar") is None
    assert "secret" not in repr(login)


def test_the_default_netrc_entry_is_ignored(netrc: Path) -> None:
    assert netrc_login("data.org") is None
    netrc.write_text("machine a.org login ada password secret\ndefault login any password thing\n")
    assert netrc_login("data.org") is None
    assert netrc_login("127.0.0.1:8000") is None


def test_netrc_variable_names_another_file(netrc: Path) -> None:
    other = netrc.with_name("other")
    other.write_text("machine data.org login ada password secret\n")
    login = netrc_login("data.org:443", {"NETRC": str(other)})
    assert login is not None
    assert login.user == "ada"


def test_a_broken_netrc_is_named_without_its_content(netrc: Path) -> None:
    netrc.write_text("machine data.org login ada pasword secret\n")
    with pytest.raises(WrongPassword, match=r"\.netrc cannot be used") as caught:
        netrc_login("data.org")
    assert "secret" not in str(caught.value)
