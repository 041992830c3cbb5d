"""What files hold, as digests, without reading again what has not been written to.

A digest is remembered together with what the file system said of the file when it was read: size,
time of the last write, inode, and the time of the last change, which no program can set. A file
of which all of these are as they were has not been written to since, even if its size and time
were put back. As clocks tick coarsely, what was changed less than `SETTLED` before it was read is
not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vilmedic.files import BLOCK, core_count, open_regular, replacing

SETTLED = 2 * 10**9  # nanoseconds
DIGEST = 16  # bytes


def file_contents(paths: Iterable[Path], folder: Path) -> dict[Path, str]:
    """A digest of the content of each file; `missing` or `unreadable` where there is none.

    Args:
        paths: the files.
        folder: where digests are remembered, one file for each list of paths. That it cannot be
            written to costs the time of reading all files at the next call and no more.
    """
    every = list(dict.fromkeys(paths))
    together = _short("\n".join(os.path.abspath(path) for path in every).encode())
    memory = folder / f".contents-{together.hex()}.npy"
    known, now = _load(memory), time.time_ns()
    states = [_state(path, now) for path in every]
    found = {
        path: known[state[0]].hex()
        for path, state in zip(every, states, strict=True)
        if state is not None and state[0] in known
    }
    unknown = [path for path in every if path not in found]
    if unknown:
        with ThreadPoolExecutor(min(32, core_count())) as pool:
            found |= zip(unknown, pool.map(_digest, unknown), strict=True)
        _save(
            memory,
            [
                state[0] + bytes.fromhex(found[path])
                for path, state in zip(every, states, strict=True)
                if state is not None and state[1] and len(found[path]) == 2 * DIGEST
            ],
        )
    return found


def file_digests(paths: Sequence[Path]) -> list[str]:
    """A digest of the content of each file, read now; an empty text for one that is unreadable."""
    with ThreadPoolExecutor(min(32, core_count())) as pool:
        found = list(pool.map(_digest, paths))
    return [digest if len(digest) == 2 * DIGEST else "" for digest in found]


def _short(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _state(path: Path, now: int) -> tuple[bytes, bool] | None:
    """What the file system says of a file, and whether a later change is sure to change it."""
    try:
        at = path.stat()
    except OSError:
        return None
    times = (at.st_mtime_ns, at.st_ctime_ns)
    text = f"{path.absolute()}\n{at.st_size} {at.st_ino} {at.st_dev} {times}"
    return _short(text.encode()), max(times) < now - SETTLED


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST)
    try:
        with open_regular(path) as file:
            while chunk := file.read(BLOCK):
                digest.update(chunk)
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"
    return digest.hexdigest()


def _load(path: Path) -> dict[bytes, bytes]:
    """Digests by state; none where nothing was remembered, or that was damaged."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return {}
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 2 * DIGEST:
        return {}
    return {row[:DIGEST]: row[DIGEST:] for row in map(bytes, rows)}


def _save(path: Path, rows: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, f".{os.getpid()}") as draft, open(draft, "wb") as file:
            np.save(file, np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 2 * DIGEST))
