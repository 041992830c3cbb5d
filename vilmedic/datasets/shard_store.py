"""Bytes out of tar shards, in a folder or behind a URL.

Shards behind a URL are fetched whole, when the first of their samples is read, into a folder that
the loading processes of a machine share and that holds a limited number of bytes: the ones that
were not used for longest make room. So the data set can be larger than the disk, and each shard
crosses the network once for each time that training comes to it.
"""

from __future__ import annotations

import logging
import os
import time
import urllib.parse
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from vilmedic.errors import DataError
from vilmedic.files import confined, plain_name, sha256_of

if TYPE_CHECKING:
    from httpx2 import Client

logger = logging.getLogger(__name__)

OPEN_FILES = 64
TRIES = 6
TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Args:
        name: its file name.
        size: bytes.
        sha256: hex digest of its content.
    """

    name: str
    size: int
    sha256: str


class ShardStore:
    """Reads ranges of bytes of the shards of a split.

    Args:
        place: folder, or http(s) URL of one.
        spool: folder for shards that come from a URL.
        spool_bytes: most that it holds, apart from shards that are being fetched.

    Raises:
        DataError: the URL is of another kind.
    """

    def __init__(self, place: str, spool: Path, spool_bytes: int) -> None:
        self.place, self.spool, self.spool_bytes = place.rstrip("/"), spool, spool_bytes
        scheme = urllib.parse.urlsplit(place).scheme if "://" in place else ""
        if scheme not in ("", "http", "https"):
            raise DataError(
                f"Shards cannot be read from '{place}'. Allowed: a folder, or a URL that starts "
                "with http:// or https://."
            )
        if "@" in urllib.parse.urlsplit(place).netloc:
            raise DataError(
                "The URL of the shards holds a user name. Put user and password into ~/.netrc, "
                "where no configuration, log or run directory repeats them."
            )
        self.remote = bool(scheme)
        self._open: OrderedDict[str, int] = OrderedDict()

    def where(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        return f"{self.place}/{shard.name}"

    def check(self, shards: list[Shard]) -> None:
        """Raise a `DataError` unless all shards of a folder are there in their full size."""
        for shard in [] if self.remote else shards:
            path = Path(self.place, shard.name)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                found = "does not exist" if size is None else f"has {size} bytes"
                raise DataError(
                    f"{path} {found}, and the index expects {shard.size} bytes. Set image_path to "
                    "the folder or URL of the shards, or write them again with data/make_shards.py."
                )

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        """Some bytes of a shard.

        Raises:
            DataError: the shard cannot be had, or ends before them.
        """
        descriptor = self._descriptor(shard)
        content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise DataError(f"{self.where(shard)} ends before byte {offset + size}.")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors belong to a process

    def _descriptor(self, shard: Shard) -> int:
        if shard.name in self._open:
            self._open.move_to_end(shard.name)
            return self._open[shard.name]
        try:
            if self.remote:
                descriptor = self._fetched(shard)
            else:
                descriptor = os.open(f"{self.place}/{shard.name}", os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.where(shard)} cannot be read: {error.strerror}.") from error
        self._open[shard.name] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _fetched(self, shard: Shard) -> int:
        """An open shard of the spool, fetched first where need be; one process fetches it."""
        self.spool.mkdir(parents=True, exist_ok=True)
        path = confined(self.spool, f"{shard.sha256[:16]}-{plain_name(shard.name)}")
        while True:
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    with FileLock(self.spool / ".room.lock"):
                        self._make_room(shard.size)
                    self._fetch(shard, path)
                try:
                    os.utime(path)
                    return os.open(path, os.O_RDONLY)  # stays readable when it is removed
                except FileNotFoundError:
                    continue  # another process has just made room with it

    def _make_room(self, size: int) -> None:
        held = sorted(self.spool.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        total = size + sum(path.stat().st_size for path in held)
        for path in held:
            if total <= self.spool_bytes:
                break
            total -= path.stat().st_size
            path.unlink()

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Download a shard, going on where a broken connection stopped; checked before it counts.

        Raises:
            DataError: the server refuses, or does not give the right bytes.
        """
        from vilmedic.http import Again, open_client  # for shards behind a URL alone

        url = f"{self.place}/{urllib.parse.quote(shard.name)}"
        partial = path.with_name(f".{path.name}.partial")
        reason = ""
        with open_client(TIMEOUT) as client:
            for attempt in range(TRIES):
                if attempt:
                    time.sleep(min(0.25 * 4 ** (attempt - 1), 30))
                    logger.warning("%s: %s; trying again", url, reason)
                try:
                    _receive(client, url, partial, shard.size)
                except Again as trouble:
                    reason = str(trouble)
                    continue
                except DataError as error:
                    reason = str(error).rstrip(".")
                    break
                if sha256_of(partial) == shard.sha256:
                    os.replace(partial, path)
                    return
                reason = "what came is not what the index expects (SHA-256 differs)"
                partial.unlink()
        raise DataError(f"{url} cannot be fetched: {reason}.")


def _receive(client: Client, url: str, partial: Path, size: int) -> None:
    """Append to a partial file what it lacks.

    Raises:
        Again: the server or the connection failed in a way that may pass.
        DataError: the server refuses.
    """
    from vilmedic.http import Again, Answer, may_pass, netrc_login, received, said

    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    login = netrc_login(urllib.parse.urlsplit(url).hostname or "")
    with Answer(client, "GET", url, headers, login) as answer:
        if answer.status_code == 416:  # it has less than was fetched before
            partial.unlink(missing_ok=True)
        if answer.status_code == 416 or may_pass(answer.status_code):
            raise Again(said(answer))
        if answer.status_code not in (200, 206):
            raise DataError(said(answer))
        goes_on = have and answer.status_code == 206
        with open(partial, "ab" if goes_on else "wb") as file:
            for chunk in received(answer, TIMEOUT):
                file.write(chunk)
                if file.tell() > size:
                    raise Again(f"the server sends more than the {size} bytes expected")
            arrived = file.tell()
    if arrived < size:
        raise Again(f"the connection ended after {arrived} of {size} bytes")
