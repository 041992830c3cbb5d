"""With badly behaving servers a download is complete or leaves no file."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from tests.hostile.table import Table
from tests.preparation.download.server import Fault, Seen, serving
from vilmedic.preparation.download.http import Job, Transfer

DOWNLOADS = 20
CONTENT = random.Random(1).randbytes(60_000)
PAGE = b"<html><head><title>Sign in</title></head></html>"
HEADERS: tuple[dict[str, str | None], ...] = (
    {"Content-Type": "TEXT/HTML"},
    {"Content-Type": None},
    {"Content-Encoding": "gzip"},
    {"Content-Length": None},
    {"Content-Length": "70000"},
    {"Content-Length": "9" * 400},
    {"ETag": None},
    {"ETag": 'W/"weak"'},
    {"Content-Range": "bytes 5-9/3"},
    {"Retry-After": "9" * 400},
)


def fault(draw: random.Random) -> Fault:
    """A response with one or two faults."""
    kinds = draw.sample(range(7), draw.choice((1, 1, 2)))
    made = Fault()
    for kind in kinds:
        if kind == 0:
            made.status = draw.choice((206, 404, 416, 429, 500, 503, 302, 418))
            made.headers = {"Retry-After": "0", "Content-Range": "bytes */7"}
        elif kind == 1:
            made.cut = draw.randrange(len(CONTENT))
        elif kind == 2:
            made.body = draw.choice((b"", PAGE, CONTENT[:1000]))
        elif kind == 3:
            made.wrong = draw.randrange(len(CONTENT))
        elif kind == 4:
            made.redirect = draw.choice(("/loop", "/files/a.bin", "ftp://127.0.0.1/x", "//"))
        else:
            made.replaced |= draw.choice(HEADERS)
    return made


@pytest.mark.parametrize("number", range(DOWNLOADS))
def test_a_download_is_complete_or_absent(tmp_path: Path, number: int, table: Table) -> None:
    draw = random.Random(number)
    answers = [fault(draw) if draw.random() < 0.7 else Fault() for _ in range(6)]
    known = hashlib.sha256(CONTENT).hexdigest() if number % 2 else None
    with serving() as server:
        server.files["/files/a.bin"] = CONTENT
        server.ranges = draw.random() < 0.7

        def answer(seen: Seen, count: int) -> Fault | None:
            if seen.path == "/loop":
                return Fault(redirect="/loop")
            return answers[count] if count < len(answers) else None

        server.faults = answer
        job = Job(f"{server.url}/files/a.bin", tmp_path / "in" / "a.bin", sha256=known)
        transfer = Transfer(retries=3, wait=0.001, timeout=1.0)
        try:
            message = table.attempt(
                "downloads", f"number {number}", lambda: transfer.fetch(job), seconds=10
            )
        finally:
            transfer.close()
        if message is not None:
            assert not job.path.exists()
        else:
            # Without a published checksum the file may be another one, but not an HTML page or a
            # part.
            content = job.path.read_bytes()
            assert content == CONTENT if known else len(content) in (len(CONTENT), 1000)
    assert {path.name for path in tmp_path.rglob("*")} <= {
        "in",
        "a.bin",
        "a.bin.part",
        "a.bin.part.tag",
    }
