from __future__ import annotations

import errno
import gzip
import hashlib
import io
import random
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preparation.download.server import Fault, Seen, Server, serving
from vilmedic.preparation.download import http as module
from vilmedic.preparation.download.http import (
    Job,
    Login,
    NoAccess,
    NoSpace,
    NotAFile,
    NotThere,
    Stopped,
    Transfer,
    Unreachable,
    WrongContent,
    WrongPassword,
    find_login,
    is_there,
    part_of,
)
from vilmedic.preparation.download.resources import Account

CONTENT = random.Random(0).randbytes(300_000)
PATH = "/files/release/1.0/archive.zip"
AGENT = "Wget/1.21 (test)"  # required by the server
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def make(server: Server, tmp_path: Path) -> Any:
    server.files[PATH] = CONTENT
    made: list[Transfer] = []

    def build(**options: Any) -> tuple[Transfer, Job]:
        options = {"retries": 3, "wait": 0.001, "timeout": 2.0} | options
        job = Job(server.url + PATH, tmp_path / "out" / "archive.zip", len(CONTENT), SUM)
        made.append(Transfer(**options))
        return made[-1], job

    yield build
    for transfer in made:
        transfer.close()


def only(*faults: Fault | None) -> Callable[[Seen, int], Fault | None]:
    """The faults of the first responses; later ones have none."""
    return lambda _seen, number: faults[number] if number < len(faults) else None


def check_whole(job: Job) -> None:
    assert job.path.read_bytes() == CONTENT
    assert [path.name for path in job.path.parent.iterdir()] == [job.path.name]


def test_a_file_is_downloaded_once(server: Server, make: Any) -> None:
    arrived: list[int] = []
    sizes: list[int] = []
    transfer, job = make(on_bytes=arrived.append, on_size=lambda _, size: sizes.append(size))
    assert transfer.size_of(job) == len(CONTENT)
    assert transfer.fetch(job)
    check_whole(job)
    assert sum(arrived) == sizes[0] == len(CONTENT)
    assert not transfer.fetch(job)
    assert len(server.gets()) == 1


@pytest.mark.parametrize("cut", [0, 1, 65_536, 299_999])
def test_a_broken_connection_resumes(server: Server, make: Any, cut: int) -> None:
    transfer, job = make()
    server.faults = only(Fault(cut=cut))
    transfer.fetch(job)
    check_whole(job)
    ranges = [seen.range for seen in server.gets()]
    assert ranges == ["", f"bytes={cut}-" if cut else ""]


def test_a_later_run_resumes(server: Server, make: Any) -> None:
    transfer, job = make(retries=0)
    server.faults = only(Fault(cut=100_000), Fault(status=503), None)
    with pytest.raises(Unreachable, match=r"answers 503.*to resume"):
        transfer.fetch(job)
    assert not job.path.exists()
    assert part_of(job.path).stat().st_size == 100_000
    again, _ = make()
    again.fetch(job)
    check_whole(job)
    assert server.gets()[-1].range == "bytes=100000-"


def test_retries_are_reset_after_progress(server: Server, make: Any) -> None:
    transfer, job = make(retries=1)
    server.faults = lambda _seen, number: Fault(cut=20_000) if number < 12 else None
    transfer.fetch(job)
    check_whole(job)


def test_a_server_without_ranges_starts_again(server: Server, make: Any) -> None:
    arrived: list[int] = []
    transfer, job = make(on_bytes=arrived.append)
    server.ranges = False
    server.faults = only(Fault(cut=50_000))
    transfer.fetch(job)
    check_whole(job)
    assert sum(arrived) == len(CONTENT)  # discarded bytes are subtracted


def test_two_versions_of_a_file_are_never_mixed(server: Server, make: Any) -> None:
    old = bytes(reversed(CONTENT))
    server.files[PATH] = old
    transfer, job = make(retries=0)
    server.faults = only(Fault(cut=100_000), Fault(status=500))
    with pytest.raises(Unreachable):
        transfer.fetch(job)
    assert part_of(job.path).read_bytes() == old[:100_000]
    server.files[PATH] = CONTENT
    plain = Job(job.url, job.path)  # no published checksum would reveal the mixture
    again, _ = make()
    again.fetch(plain)
    check_whole(job)


def test_corrupt_bytes_are_discarded_and_downloaded_again(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(wrong=1234), Fault(cut=1000, wrong=10))
    transfer.fetch(job)
    check_whole(job)


def test_persistent_corruption_is_an_error_and_not_kept(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = lambda _seen, _number: Fault(wrong=7)
    with pytest.raises(WrongContent, match=rf"{SUM} is published"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []
    assert len(server.gets()) == module.SPOILT


def test_a_wrong_size_is_an_error(server: Server, make: Any) -> None:
    transfer, job = make()
    server.files[PATH] = CONTENT + b"more"
    with pytest.raises(WrongContent, match=r"300,004 bytes; 300,000 are published"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []


def test_an_existing_file_with_another_checksum_is_replaced(server: Server, make: Any) -> None:
    transfer, job = make()
    job.path.parent.mkdir()
    job.path.write_bytes(bytes(len(CONTENT)))
    assert not is_there(job)
    transfer.fetch(job)
    check_whole(job)


def test_a_silent_connection_times_out_and_resumes(server: Server, make: Any) -> None:
    transfer, job = make(timeout=0.2)
    server.faults = only(Fault(slow=1.0))
    transfer.fetch(job)
    check_whole(job)


def test_server_errors_are_retried(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(status=500), Fault(status=502), Fault(status=429))
    transfer.fetch(job)
    check_whole(job)
    assert len(server.gets()) == 4


def test_retry_after_is_respected(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(status=503, headers={"Retry-After": "1"}))
    began = time.monotonic()
    transfer.fetch(job)
    assert time.monotonic() - began > 0.9


def test_retry_delays_grow(monkeypatch: pytest.MonkeyPatch, server: Server, make: Any) -> None:
    transfer, job = make(retries=4, wait=1.0)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return False

    monkeypatch.setattr(transfer.stop, "wait", wait)
    server.faults = lambda _seen, _number: Fault(status=500)
    with pytest.raises(Unreachable, match="gave up after 5 attempts"):
        transfer.fetch(job)
    assert [round(wait / 2**n) for n, wait in enumerate(waits)] == [1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(6))
def test_random_faults_give_the_right_file(server: Server, make: Any, seed: int) -> None:
    draw = random.Random(seed)

    def faults(_seen: Seen, number: int) -> Fault | None:
        if number > 25:
            return None
        return draw.choice(
            [
                Fault(cut=draw.randrange(len(CONTENT))),
                Fault(cut=draw.randrange(len(CONTENT))),
                Fault(status=draw.choice([500, 503, 429])),
                Fault(cut=draw.randrange(2000), slow=0.01),
                None,
            ]
        )

    server.faults = faults
    transfer, job = make(retries=30)
    spoil = draw.random() < 0.5
    if spoil:
        part_of(job.path).parent.mkdir()
        part_of(job.path).write_bytes(draw.randbytes(1000))  # a part of another file
    transfer.fetch(job)
    check_whole(job)


def login(**changes: Any) -> Login:
    given = {"user": "reader@example.org", "password": "s3cret-Pa55word"} | changes
    return Login("127.0.0.1", given["user"], given["password"])


def test_user_and_password_are_sent(server: Server, make: Any) -> None:
    server.closed = True
    transfer, job = make(login=login(), agent=AGENT)
    transfer.fetch(job)
    check_whole(job)


@pytest.mark.parametrize("given", [{"password": "wrong"}, {"user": "nobody"}])
def test_a_wrong_password_is_an_error(server: Server, make: Any, given: dict[str, str]) -> None:
    server.closed = True
    transfer, job = make(login=login(**given), agent=AGENT)
    with pytest.raises(WrongPassword, match="does not accept user and password") as caught:
        transfer.fetch(job)
    assert "Pa55word" not in str(caught.value)
    assert "example.org" not in str(caught.value)
    assert len(server.seen) == 1


def test_a_missing_agreement_is_an_error(server: Server, make: Any) -> None:
    server.closed, server.signed = True, False
    transfer, job = make(login=login(), agent=AGENT)
    job = Job(job.url, job.path, page="https://example.org/release")
    with pytest.raises(NoAccess, match=r"sign the data use agreement at https://example\.org/rel"):
        transfer.fetch(job)


def test_a_missing_file_is_an_error(server: Server, make: Any) -> None:
    transfer, job = make()
    with pytest.raises(NotThere, match=r"nothing\.zip does not exist"):
        transfer.fetch(Job(job.url.replace("archive", "nothing"), job.path))


def test_a_login_page_is_not_kept_as_a_file(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = lambda _seen, _number: Fault(html=True)
    with pytest.raises(NotAFile, match="sent a web page instead"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []


def test_the_password_is_not_sent_to_other_hosts(server: Server, make: Any) -> None:
    with serving() as other:
        other.files["/elsewhere"] = CONTENT
        server.faults = only(Fault(redirect=f"http://localhost:{other.port}/elsewhere"))
        transfer, job = make(login=login(), agent=AGENT)
        transfer.fetch(job)
        check_whole(job)
        assert server.gets()[0].authorization.startswith("Basic ")
        assert other.gets()[0].authorization == ""
    assert login().auth_for("http://127.0.0.1/x") is not None
    assert login().auth_for("https://127.0.0.2/x") is None
    far = Login("physionet.org", "a", "b")
    assert far.auth_for("https://physionet.org/x") is not None
    assert far.auth_for("http://physionet.org/x") is None  # unencrypted
    assert far.auth_for("https://physionet.org.evil.example/x") is None


def test_an_unreachable_server_is_an_error(make: Any, tmp_path: Path) -> None:
    transfer, _ = make(retries=2)
    with pytest.raises(Unreachable, match="gave up after 3 attempts"):
        transfer.fetch(Job("http://127.0.0.1:9/file", tmp_path / "file"))


def test_a_full_disk_keeps_the_downloaded_part(
    server: Server, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, job = make()

    class Full:
        """A file on a disk with space for 100,000 bytes."""

        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, content: bytes) -> None:
            if self.file.tell() + len(content) > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(content)

    monkeypatch.setattr(module, "open", Full, raising=False)
    with pytest.raises(NoSpace, match="free space and run the same command again"):
        transfer.fetch(job)
    assert 0 < part_of(job.path).stat().st_size <= 100_000
    monkeypatch.undo()
    transfer.fetch(job)
    check_whole(job)
    assert server.gets()[-1].range


def test_an_interrupted_transfer_keeps_its_part(server: Server, make: Any) -> None:
    transfer, job = make(wait=60.0)
    server.faults = only(Fault(cut=1000))
    threading.Timer(0.2, transfer.stop.set).start()
    with pytest.raises(Stopped):
        transfer.fetch(job)
    assert part_of(job.path).stat().st_size == 1000


def test_a_complete_part_is_accepted(server: Server, make: Any) -> None:
    transfer, job = make()
    part_of(job.path).parent.mkdir()
    part_of(job.path).write_bytes(CONTENT)
    transfer.fetch(Job(job.url, job.path))  # its size is unknown beforehand
    check_whole(job)


# -- files without published checksum and size

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture
def unknown(server: Server, make: Any, tmp_path: Path) -> Any:
    """A transfer and a job with only an address."""

    def build(name: str = "archive.zip", **options: Any) -> tuple[Transfer, Job]:
        transfer, _ = make(**options)
        server.files[f"/free/{name}"] = CONTENT
        return transfer, Job(f"{server.url}/free/{name}", tmp_path / "free" / name)

    return build


@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=PAGE, replaced={"Content-Type": "Text/HTML; charset=utf-8"}),
        Fault(body=PAGE, replaced={"Content-Type": None}),
        Fault(body=b"\n " + PAGE.lower(), replaced={"Content-Type": "application/octet-stream"}),
        Fault(body=b"\xef\xbb\xbf<HTML><title>notice</title>", replaced={"Content-Type": None}),
    ],
)
def test_a_web_page_instead_of_a_file_is_refused(
    server: Server, unknown: Any, fault: Fault
) -> None:
    transfer, job = unknown()
    server.faults = lambda _seen, _number: fault
    with pytest.raises(NotAFile, match="web page"):
        transfer.fetch(job)
    assert not job.path.exists()


def test_compressed_responses_are_refused_for_uncompressed_files(
    server: Server, unknown: Any
) -> None:
    packed = gzip.compress(b"a,b\n1,2\n")
    server.faults = lambda _seen, _number: Fault(body=packed, replaced={"Content-Encoding": "gzip"})
    transfer, job = unknown("table.csv")
    with pytest.raises(NotAFile, match=r"packed \(gzip\)"):
        transfer.fetch(job)
    transfer, job = unknown("table.csv.gz")
    transfer.fetch(job)
    assert job.path.read_bytes() == packed


def test_an_empty_file_is_an_error(server: Server, unknown: Any) -> None:
    transfer, job = unknown()
    server.faults = lambda _seen, _number: Fault(body=b"")
    with pytest.raises(WrongContent, match="empty"):
        transfer.fetch(job)
    assert not job.path.exists()


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_truncated_response_without_length_is_fetched_again(
    server: Server, unknown: Any, kind: str
) -> None:
    whole = gzip.compress(CONTENT)
    if kind == "zip":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a.txt", CONTENT)
        whole = stream.getvalue()
    closing = {"Content-Length": None}
    server.faults = only(
        Fault(body=whole[:200_000], replaced=closing), Fault(body=whole, replaced=closing)
    )
    transfer, job = unknown(f"reports.{kind}")
    server.ranges = False
    transfer.fetch(job)
    assert job.path.read_bytes() == whole
    assert len(server.gets("/free/")) == 2


def test_a_response_without_length_or_end_is_refused(server: Server, unknown: Any) -> None:
    server.faults = lambda _seen, _number: Fault(replaced={"Content-Length": None})
    transfer, job = unknown("model.bin")
    with pytest.raises(NotAFile, match="does not say how large"):
        transfer.fetch(job)
    assert not job.path.exists()


@pytest.mark.parametrize("tag", [None, '"new"'])
def test_two_versions_are_never_mixed(server: Server, unknown: Any, tag: str | None) -> None:
    """The file changes during the download; with a tag the server also ignores If-Range."""
    old, new = CONTENT, CONTENT[::-1]
    transfer, job = unknown()

    def answer(seen: Seen, number: int) -> Fault:
        if not number:
            first = {"ETag": tag and '"old"'}
            return Fault(body=old, cut=100_000, replaced=first)
        if seen.range and tag:
            rest = {"ETag": tag, "Content-Range": f"bytes 100000-{len(new) - 1}/{len(new)}"}
            return Fault(body=new, replaced=rest)
        return Fault(body=new, replaced={"ETag": tag})

    server.faults = answer
    transfer.fetch(job)
    assert job.path.read_bytes() == new


# -- servers that never finish


def test_endless_restarts_are_given_up(server: Server, make: Any) -> None:
    """Half of the file, then 416 for the rest: discarded bytes are not progress."""
    transfer, job = make()

    def answer(seen: Seen, _number: int) -> Fault:
        if seen.range:
            return Fault(status=416, headers={"Content-Range": "bytes */5"})
        return Fault(cut=150_000)

    server.faults = answer
    with pytest.raises(Unreachable, match="gave up after"):
        transfer.fetch(job)
    assert len(server.gets()) <= 12


def test_truncation_without_range_support_is_given_up(server: Server, make: Any) -> None:
    transfer, job = make()
    server.ranges = False
    server.faults = lambda _seen, number: Fault(cut=150_000 - number)
    with pytest.raises(Unreachable, match="gave up after"):
        transfer.fetch(job)


def test_a_trickle_counts_as_a_dead_connection(server: Server, make: Any) -> None:
    transfer, job = make(timeout=0.3, retries=0)
    server.faults = lambda _seen, _number: Fault(trickle=0.02)
    with pytest.raises(Unreachable, match="bytes came in"):
        transfer.fetch(job)


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("7", 7.0),
        ("9" * 5000, 600.0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 600.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("soon", None),
        ("-5", None),
    ],
)
def test_retry_after_is_bounded_and_logged(
    server: Server,
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    waited: float | None,
) -> None:
    transfer, job = make()
    waits: list[float] = []
    monkeypatch.setattr(transfer.stop, "wait", lambda seconds: waits.append(seconds))
    server.faults = only(Fault(status=503, headers={"Retry-After": asked}))
    transfer.fetch(job)
    assert len(waits) == 1
    if waited is None:
        assert waits[0] < 1
    else:
        assert waits[0] == waited
        assert "asks to wait" in capsys.readouterr().err


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


def test_credentials_come_from_the_environment_first(home: Path) -> None:
    netrc(home, "machine physionet.org login other password other\n")
    got = header({"PHYSIONET_USERNAME": "user", "PHYSIONET_PASSWORD": "pass:word"})
    assert got == "Basic dXNlcjpwYXNzOndvcmQ="  # base64 of user:pass:word


def test_credentials_come_from_netrc_second(home: Path) -> None:
    netrc(
        home, "machine elsewhere.org login a password b\nmachine physionet.org login u password p\n"
    )
    assert header({}) == "Basic dTpw"
    moved = netrc(home, "machine physionet.org login x password y\n", "moved")
    assert header({"NETRC": str(moved)}) == "Basic eDp5"
    assert header({"PHYSIONET_USERNAME": "u"}) == "Basic dTpw"


def test_missing_credentials_are_prompted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: " u ")
    monkeypatch.setattr("getpass.getpass", lambda _: "p")
    assert header({}) == "Basic dTpw"
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("the user is known"))
    assert header({"PHYSIONET_USERNAME": "u"}) == "Basic dTpw"


def test_missing_credentials_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(WrongPassword, match=r"PHYSIONET_PASSWORD.*netrc.*https://page"):
        find_login(ACCOUNT, {"PHYSIONET_USERNAME": "u"})


def test_a_login_hides_its_password() -> None:
    login = find_login(ACCOUNT, {"PHYSIONET_USERNAME": "user", "PHYSIONET_PASSWORD": "s3cret"})
    assert "s3cret" not in repr(login)
    assert "user" not in repr(login)
