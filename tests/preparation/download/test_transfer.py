from __future__ import annotations

import errno
import hashlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preparation.download.server import Fault, Seen, Server, serving
from vilmedic.preparation.download import transfer as module
from vilmedic.preparation.download.answers import Job
from vilmedic.preparation.download.credentials import Login
from vilmedic.preparation.download.errors import (
    Interrupted,
    NoAccess,
    NoSpace,
    NotAFile,
    NotThere,
    Unreachable,
    WrongContent,
    WrongPassword,
)
from vilmedic.preparation.download.table import Account
from vilmedic.preparation.download.transfer import Transfer, is_there, part_of

CONTENT = random.Random(0).randbytes(300_000)
PATH = "/files/release/1.0/archive.zip"
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
    """The faults of the first answers; the later ones are right."""
    return lambda _seen, number: faults[number] if number < len(faults) else None


def check_whole(job: Job) -> None:
    assert job.path.read_bytes() == CONTENT
    assert [path.name for path in job.path.parent.iterdir()] == [job.path.name]


def test_a_file_arrives_once(server: Server, make: Any) -> None:
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
def test_a_cut_connection_goes_on_where_it_was(server: Server, make: Any, cut: int) -> None:
    transfer, job = make()
    server.faults = only(Fault(cut=cut))
    transfer.fetch(job)
    check_whole(job)
    ranges = [seen.range for seen in server.gets()]
    assert ranges == ["", f"bytes={cut}-" if cut else ""]


def test_a_later_run_goes_on_where_the_first_stopped(server: Server, make: Any) -> None:
    transfer, job = make(retries=0)
    server.faults = only(Fault(cut=100_000), Fault(status=503), None)
    with pytest.raises(Unreachable, match=r"answers 503.*to go on from here"):
        transfer.fetch(job)
    assert not job.path.exists()
    assert part_of(job.path).stat().st_size == 100_000
    again, _ = make()
    again.fetch(job)
    check_whole(job)
    assert server.gets()[-1].range == "bytes=100000-"


def test_retries_count_anew_after_progress(server: Server, make: Any) -> None:
    transfer, job = make(retries=1)
    server.faults = lambda _seen, number: Fault(cut=20_000) if number < 12 else None
    transfer.fetch(job)
    check_whole(job)


def test_a_server_without_ranges_starts_anew(server: Server, make: Any) -> None:
    arrived: list[int] = []
    transfer, job = make(on_bytes=arrived.append)
    server.ranges = False
    server.faults = only(Fault(cut=50_000))
    transfer.fetch(job)
    check_whole(job)
    assert sum(arrived) == len(CONTENT)  # what was thrown away is counted back


def test_two_versions_of_a_file_are_never_mixed(server: Server, make: Any) -> None:
    old = bytes(reversed(CONTENT))
    server.files[PATH] = old
    transfer, job = make(retries=0)
    server.faults = only(Fault(cut=100_000), Fault(status=500))
    with pytest.raises(Unreachable):
        transfer.fetch(job)
    assert part_of(job.path).read_bytes() == old[:100_000]
    server.files[PATH] = CONTENT
    plain = Job(job.url, job.path)  # no published sum would show the mixture
    again, _ = make()
    again.fetch(plain)
    check_whole(job)


def test_wrong_bytes_are_thrown_away_and_fetched_anew(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(wrong=1234), Fault(cut=1000, wrong=10))
    transfer.fetch(job)
    check_whole(job)


def test_lasting_wrong_bytes_are_reported_and_not_kept(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = lambda _seen, _number: Fault(wrong=7)
    with pytest.raises(WrongContent, match=rf"{SUM} is published"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []
    assert len(server.gets()) == module.SPOILT


def test_another_size_is_reported(server: Server, make: Any) -> None:
    transfer, job = make()
    server.files[PATH] = CONTENT + b"more"
    with pytest.raises(WrongContent, match=r"300,004 bytes; 300,000 are published"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []


def test_a_file_of_another_sum_does_not_count_as_there(server: Server, make: Any) -> None:
    transfer, job = make()
    job.path.parent.mkdir()
    job.path.write_bytes(bytes(len(CONTENT)))
    assert not is_there(job)
    transfer.fetch(job)
    check_whole(job)


def test_a_silent_connection_is_given_up_and_resumed(server: Server, make: Any) -> None:
    transfer, job = make(timeout=0.2)
    server.faults = only(Fault(slow=1.0))
    transfer.fetch(job)
    check_whole(job)


def test_errors_of_the_server_pass(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(status=500), Fault(status=502), Fault(status=429))
    transfer.fetch(job)
    check_whole(job)
    assert len(server.gets()) == 4


def test_the_server_is_given_the_time_it_asks_for(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = only(Fault(status=503, headers={"Retry-After": "1"}))
    began = time.monotonic()
    transfer.fetch(job)
    assert time.monotonic() - began > 0.9


def test_waits_grow(monkeypatch: pytest.MonkeyPatch, server: Server, make: Any) -> None:
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
def test_nothing_is_lost_and_nothing_wrong_is_kept(server: Server, make: Any, seed: int) -> None:
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
        part_of(job.path).write_bytes(draw.randbytes(1000))  # a part of something else
    transfer.fetch(job)
    check_whole(job)


def login(**changes: Any) -> Login:
    account = Account("127.0.0.1", "U", "P", "page", "Wget/1.21 (test)")
    given = {"user": "reader@example.org", "password": "s3cret-Pa55word"} | changes
    return Login(account, given["user"], given["password"])


def test_user_and_password_open_a_closed_server(server: Server, make: Any) -> None:
    server.closed = True
    transfer, job = make(login=login())
    transfer.fetch(job)
    check_whole(job)


@pytest.mark.parametrize("given", [{"password": "wrong"}, {"user": "nobody"}])
def test_a_wrong_password(server: Server, make: Any, given: dict[str, str]) -> None:
    server.closed = True
    transfer, job = make(login=login(**given))
    with pytest.raises(WrongPassword, match="does not accept user and password") as caught:
        transfer.fetch(job)
    assert "Pa55word" not in str(caught.value)
    assert "example.org" not in str(caught.value)
    assert len(server.seen) == 1


def test_a_missing_agreement(server: Server, make: Any) -> None:
    server.closed, server.signed = True, False
    transfer, job = make(login=login())
    job = Job(job.url, job.path, page="https://example.org/release")
    with pytest.raises(NoAccess, match=r"sign the data use agreement at https://example\.org/rel"):
        transfer.fetch(job)


def test_a_file_that_is_not_there(server: Server, make: Any) -> None:
    transfer, job = make()
    with pytest.raises(NotThere, match=r"nothing\.zip does not exist"):
        transfer.fetch(Job(job.url.replace("archive", "nothing"), job.path))


def test_a_login_page_is_not_kept_as_a_file(server: Server, make: Any) -> None:
    transfer, job = make()
    server.faults = lambda _seen, _number: Fault(html=True)
    with pytest.raises(NotAFile, match="sent a web page instead"):
        transfer.fetch(job)
    assert list(job.path.parent.iterdir()) == []


def test_the_password_goes_to_no_other_host(server: Server, make: Any) -> None:
    with serving() as other:
        other.files["/elsewhere"] = CONTENT
        server.faults = only(Fault(redirect=f"http://localhost:{other.port}/elsewhere"))
        transfer, job = make(login=login())
        transfer.fetch(job)
        check_whole(job)
        assert server.gets()[0].authorization.startswith("Basic ")
        assert other.gets()[0].authorization == ""
    assert login().auth_for("http://127.0.0.1/x") is not None
    assert login().auth_for("https://127.0.0.2/x") is None
    far = Login(Account("physionet.org", "U", "P", "page"), "a", "b")
    assert far.auth_for("https://physionet.org/x") is not None
    assert far.auth_for("http://physionet.org/x") is None  # unencrypted
    assert far.auth_for("https://physionet.org.evil.example/x") is None


def test_no_answer_at_all(make: Any, tmp_path: Path) -> None:
    transfer, _ = make(retries=2)
    with pytest.raises(Unreachable, match="gave up after 3 attempts"):
        transfer.fetch(Job("http://127.0.0.1:9/file", tmp_path / "file"))


def test_a_full_disk_keeps_what_was_fetched(
    server: Server, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, job = make()

    class Full:
        """A file on a disk that is full after 100,000 bytes."""

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
    with pytest.raises(NoSpace, match="make room and run the same command again"):
        transfer.fetch(job)
    assert 0 < part_of(job.path).stat().st_size <= 100_000
    monkeypatch.undo()
    transfer.fetch(job)
    check_whole(job)
    assert server.gets()[-1].range


def test_a_stopped_transfer_keeps_its_part(server: Server, make: Any) -> None:
    transfer, job = make(wait=60.0)
    server.faults = only(Fault(cut=1000))
    threading.Timer(0.2, transfer.stop.set).start()
    with pytest.raises(Interrupted):
        transfer.fetch(job)
    assert part_of(job.path).stat().st_size == 1000


def test_a_part_that_is_whole_already(server: Server, make: Any) -> None:
    transfer, job = make()
    part_of(job.path).parent.mkdir()
    part_of(job.path).write_bytes(CONTENT)
    transfer.fetch(Job(job.url, job.path))  # its size is not known beforehand
    check_whole(job)
