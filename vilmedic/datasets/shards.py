"""Tar shards: index, reading of samples, and a shuffle order that reads shard by shard.

A folder of shards is a folder of line files with one more file per split, `<split>.shards.npz`, the
index with the shard and byte offset of each image. With it any sample can be read separately, so
that batches are a function of seed, epoch and position as they are for files, for any number of
loading processes and ranks, and runs resume exactly. `data/make_shards.py` writes such folders.

Shards from a URL are downloaded as a whole when their first sample is read, into a folder of
limited size shared by the loading processes of a machine: the least recently used shards are
evicted. So the data set can be larger than the disk, and each shard is downloaded once for each
time that training reaches it.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import time
import urllib.parse
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from vilmedic.datasets.aligned import stable_seed
from vilmedic.datasets.decode import Color
from vilmedic.datasets.image_source import ImageSource
from vilmedic.datasets.lines import Lines, split_names
from vilmedic.errors import DataError
from vilmedic.files import confined, plain_name, replacing, sha256_of
from vilmedic.log import counted

if TYPE_CHECKING:
    from httpx2 import Client

logger = logging.getLogger(__name__)

LANES = 8
MOST_BYTES = 2**30
"""Most bytes of an index in memory: about 35 million images."""
ROOM_FOR_MORE = "-" * 32
"""Prefix and suffix of a shard's name while it is downloaded, for their length."""
_SUM = re.compile(r"[0-9a-f]{64}")
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


@dataclass(frozen=True)
class ShardIndex:
    """Index of the images of a split in shards.

    Args:
        shards: the tar files.
        starts: int64 [N + 1], number of the first image of each of the N lines.
        shard: int32 [M], the shard of each of the M images.
        offset: int64 [M], the byte at which its file begins.
        size: int64 [M], the bytes of its file.
    """

    shards: list[Shard]
    starts: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    @property
    def of_lines(self) -> np.ndarray:
        """int32 [N], the shard of each line."""
        return self.shard[self.starts[:-1]]

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        with replacing(path) as draft, open(draft, "wb") as file:
            np.savez_compressed(
                file,
                names=np.array([shard.name for shard in self.shards]),
                sizes=np.array([shard.size for shard in self.shards], dtype=np.int64),
                sha256=np.array([shard.sha256 for shard in self.shards]),
                starts=self.starts,
                shard=self.shard,
                offset=self.offset,
                size=self.size,
            )

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read an index from an untrusted source.

        Raises:
            DataError: the file is missing or damaged, or its numbers and names cannot be right.
        """
        try:
            found = _arrays(path)
            columns = (found[name].tolist() for name in ("names", "sizes", "sha256"))
            shards = [Shard(*row) for row in zip(*columns, strict=True)]
            index = cls(shards, *(found[name] for name in ("starts", "shard", "offset", "size")))
            index.validate()
            return index
        except FileNotFoundError:
            raise DataError(
                f"{path} does not exist: shards need an index. data/make_shards.py writes both."
            ) from None
        except Exception as error:  # a damaged file raises errors of zip, of numpy and others
            raise DataError(f"{path} is no index of shards, or damaged: {error}.") from error

    def validate(self) -> None:
        """Refuse names that lead out of the folder, and inconsistent numbers.

        Raises:
            ValueError: says what is wrong.
        """
        names = [shard.name for shard in self.shards]
        for shard in self.shards:
            try:
                plain_name(f"{plain_name(shard.name)}{ROOM_FOR_MORE}")
            except ValueError as error:
                raise ValueError(
                    f"the shard name {shard.name[:60]!r} is no file name: {error}"
                ) from None
            if not _SUM.fullmatch(str(shard.sha256)):
                raise ValueError(f"the SHA-256 of {shard.name} is not 64 hex digits")
            if shard.size < 0:
                raise ValueError(f"the size of {shard.name} is {shard.size}")
        if len(set(names)) < len(names):
            raise ValueError("two shards have one name")
        columns = (self.starts, self.shard, self.offset, self.size)
        if any(column.ndim != 1 or column.dtype.kind not in "iu" for column in columns):
            raise ValueError("its columns are not lists of whole numbers")
        images = len(self.shard)
        if len(self.offset) != images or len(self.size) != images:
            raise ValueError("its columns have different lengths")
        starts = self.starts
        if (
            not len(starts)
            or starts[0] != 0
            or starts[-1] != images
            or (starts[1:] < starts[:-1]).any()
        ):
            raise ValueError(f"the first images of the lines do not rise from 0 to {images}")
        if not images:
            return
        if self.shard.min() < 0 or self.shard.max() >= len(names):
            raise ValueError(f"an image is in none of its {counted(len(names), 'shard')}")
        sizes = np.array([shard.size for shard in self.shards], dtype=np.int64)[self.shard]
        # compared by a difference, as a sum could overflow
        if self.offset.min() < 0 or self.size.min() < 0 or (self.size > sizes - self.offset).any():
            raise ValueError("an image lies outside its shard")


class ImageShards(ImageSource):
    """Images in tar shards.

    Args:
        texts: the lines, each with the original names of its images.
        index: the index of their positions.
        store: reads the shards.
        color: see `ImageSource`.
        resize: see `ImageSource`.
        most: see `ImageSource`.
        max_pixels: see `ImageSource`.

    Raises:
        DataError: lines and index do not match, or a shard is missing.
    """

    def __init__(
        self,
        texts: Lines,
        index: ShardIndex,
        store: ShardStore,
        color: Color,
        resize: int | None,
        most: int,
        max_pixels: int,
    ) -> None:
        super().__init__(texts, color, resize, most, max_pixels)
        self.index, self.store = index, store
        if len(texts) != len(index.starts) - 1:
            raise DataError(
                f"{texts.path} has {counted(len(texts), 'line')}, and the index of the shards "
                "beside it "
                f"{len(index.starts) - 1}. Copy both from the same folder."
            )
        store.check(index.shards)

    def open(self, line: int, number: int) -> IO[bytes]:
        """The bytes of an image's file."""
        image = int(self.index.starts[line]) + number
        shard = self.index.shards[int(self.index.shard[image])]
        offset, size = int(self.index.offset[image]), int(self.index.size[image])
        return io.BytesIO(self.store.read(shard, offset, size))

    def places(self, line: int) -> list[str]:
        """Shard and name of each image of a line."""
        names = self.names(line)
        first = int(self.index.starts[line])
        numbers = self.index.shard[first : first + len(names)].tolist()
        shards = [self.store.where(self.index.shards[number]) for number in numbers]
        return [f"{shard}:{name}" for shard, name in zip(shards, names, strict=True)]

    def missing(self) -> dict[int, str]:
        """Return no lines: the index lists only existing images."""
        for line in range(len(self.texts)):
            names = len(split_names(self.texts[line]))
            if names != self.index.starts[line + 1] - self.index.starts[line] or not names:
                raise DataError(
                    f"{self.texts.where(line)} names {counted(names, 'image')}, which is not what "
                    "the index "
                    "of the shards beside it has. Copy both from the same folder."
                )
        return {}

    def contents(self, lines: Sequence[int], folder: Path) -> list[list[str]]:
        """Return the shard's digest and the byte offset of each image, from the index."""
        return [self._contents(line) for line in lines]

    def _contents(self, line: int) -> list[str]:
        first = int(self.index.starts[line])
        images = range(first, first + len(self.names(line)))
        digests = [self.index.shards[int(self.index.shard[image])].sha256 for image in images]
        offsets = self.index.offset[first : first + len(digests)].tolist()
        return [f"{digest} {offset}" for digest, offset in zip(digests, offsets, strict=True)]


def shard_order(
    of_samples: np.ndarray, *, seed: int, epoch: int, batch_size: int, mixed: int
) -> torch.Tensor:
    """A random order of samples that reads a few shards at a time.

    The shards, in random order, are distributed to lanes: as many as the largest divisor of the
    batch size up to 8, at most the number of shards. A batch takes the same number of samples from
    each lane, lane after lane, so that ranks that split a batch into equal pieces read different
    shards. A lane mixes the samples of `mixed / lanes` of its shards at a time. The rest of the
    longer lanes at the end is mixed together.

    Args:
        of_samples: int [N], the shard of each sample.
        seed: seed of the order.
        epoch: the pass over the data.
        batch_size: samples per batch, over all ranks.
        mixed: shards whose samples are mixed at a time.

    Returns:
        int64 [N], each number from 0 to N - 1 once.
    """
    generator = np.random.default_rng(stable_seed("shards", seed, epoch))
    shards, counts = np.unique(of_samples, return_counts=True)
    most = min(LANES, len(shards))
    lanes = next(lane for lane in range(most, 0, -1) if batch_size % lane == 0)
    by_shard = np.split(np.argsort(of_samples, kind="stable"), np.cumsum(counts)[:-1])
    dealt: list[list[np.ndarray]] = [[] for _ in range(lanes)]
    totals = [0] * lanes
    for shard in generator.permutation(len(shards)):
        lane = totals.index(min(totals))
        dealt[lane].append(by_shard[shard])
        totals[lane] += len(by_shard[shard])
    window = max(1, mixed // lanes)
    rows = [
        np.concatenate(
            [
                generator.permutation(np.concatenate(parts[start : start + window]))
                for start in range(0, len(parts), window)
            ]
        )
        for parts in dealt
    ]
    share = batch_size // lanes
    batches = min(totals) // share
    even = np.stack([row[: batches * share].reshape(batches, share) for row in rows], axis=1)
    rest = generator.permutation(np.concatenate([row[batches * share :] for row in rows]))
    return torch.from_numpy(np.concatenate([even.ravel(), rest]).astype(np.int64))


class ShardStore:
    """Reads ranges of bytes of the shards of a split.

    Args:
        place: folder, or http(s) URL of one.
        spool: folder for shards that come from a URL.
        spool_bytes: its most bytes, not counting shards that are being downloaded.

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
        """Raise a `DataError` unless all shards of a folder exist in full size."""
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
            DataError: the shard is not available, or ends before them.
        """
        descriptor = self._descriptor(shard)
        content = os.pread(descriptor, size, offset)
        if len(content) != size:
            raise DataError(f"{self.where(shard)} ends before byte {offset + size}.")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # file descriptors belong to one process

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
        """Open a shard of the spool, downloading it first if needed; one process downloads it."""
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
                    return os.open(path, os.O_RDONLY)  # stays readable after it is removed
                except FileNotFoundError:
                    continue  # another process has just evicted it

    def _make_room(self, size: int) -> None:
        held = sorted(self.spool.glob("*.tar"), key=lambda path: path.stat().st_mtime)
        total = size + sum(path.stat().st_size for path in held)
        for path in held:
            if total <= self.spool_bytes:
                break
            total -= path.stat().st_size
            path.unlink()

    def _fetch(self, shard: Shard, path: Path) -> None:
        """Download a shard, resuming after broken connections, and verify it.

        Raises:
            DataError: the server refuses, or does not give the right bytes.
        """
        from vilmedic.http import Again, open_client  # only for shards from a URL

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
                except Again as failure:
                    reason = str(failure)
                    continue
                except DataError as error:
                    reason = str(error).rstrip(".")
                    break
                if sha256_of(partial) == shard.sha256:
                    os.replace(partial, path)
                    return
                reason = "the content differs from the index (SHA-256)"
                partial.unlink()
        raise DataError(f"{url} cannot be fetched: {reason}.")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` after checking its claimed sizes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        for member in members:
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read(file)
                claimed = math.prod(shape) * dtype.itemsize
                if claimed != member.file_size - file.tell():
                    raise ValueError(f"{member.filename} claims {claimed:,} bytes, and has others")
    with np.load(path, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def _receive(client: Client, url: str, partial: Path, size: int) -> None:
    """Append the missing bytes to a partial file.

    Raises:
        Again: the server or the connection failed temporarily.
        DataError: the server refuses.
    """
    from vilmedic.http import Again, Answer, may_pass, netrc_login, received, said

    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    login = netrc_login(urllib.parse.urlsplit(url).hostname or "")
    with Answer(client, "GET", url, headers, login) as answer:
        if answer.status_code == 416:  # it has fewer bytes than were downloaded before
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
