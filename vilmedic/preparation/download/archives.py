"""Archives, unpacked without letting a member out of its folder."""

from __future__ import annotations

import errno
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vilmedic.errors import DataError
from vilmedic.files import BLOCK, DAMAGE, confined, open_tar
from vilmedic.preparation.download.http import disk_error
from vilmedic.preparation.download.progress import readable

UNUSABLE = (None, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""What an archive is the reason for, not the disk: members in the way of each other, names that are
too long, and bad data (bz2 raises an `OSError` without a number)."""


def unpack(archive: Path, folder: Path, most: int = 0) -> bool:
    """Unpack a `.tgz`, `.tar` or `.zip` into a folder, which appears when it is complete.

    Only plain files are taken. A member whose name leads out of the folder, or that is a link, a
    device or a file with holes, ends it: no published archive of images has any. So does an
    archive that unpacks to more than is expected of it, before it fills the disk.

    Args:
        archive: the file.
        folder: where its members go; left alone when it is there.
        most: bytes that it may unpack to; 0 for any number.

    Returns:
        Whether anything was unpacked.

    Raises:
        DataError: the archive is damaged or has such a member.
        NoSpace: the disk is full.
    """
    if folder.is_dir():
        return False
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    unpacked = 0
    try:
        members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
        for name, content in members:
            try:
                target = confined(draft, name)
            except ValueError as error:
                raise DataError(
                    f"{archive}: the member {name[:100]!r} is refused: {error}."
                ) from None
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, open(target, "wb") as file:
                while chunk := content.read(BLOCK):
                    unpacked += len(chunk)
                    if most and unpacked > most:
                        raise DataError(
                            f"{archive} unpacks to more than {readable(most)}, which is more than "
                            "can be expected of it, so nothing of it is kept. Remove it and fetch "
                            "it again."
                        )
                    file.write(chunk)
        draft.rename(folder)
    except DAMAGE as error:
        raise DataError(f"{archive} is damaged: {error}. Remove it and run this again.") from None
    except OSError as error:
        if error.errno in UNUSABLE:
            reason = error.strerror or error
            raise DataError(
                f"{archive} is damaged: {reason}. Remove it and run this again."
            ) from None
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with open_tar(archive) as opened:
        for member in opened:
            if member.isdir():
                continue
            plain = member.isreg() and not member.issparse()
            content = opened.extractfile(member) if plain else None
            if content is None:
                raise DataError(f"{archive}: the member '{member.name}' is no plain file.")
            yield member.name, content


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if member.filename.endswith("/"):  # a folder; `is_dir` stumbles over an empty name
                continue
            if (member.external_attr >> 28) not in (0, 0o10):  # the kind of file, by Unix
                raise DataError(f"{archive}: the member '{member.filename}' is no plain file.")
            yield member.filename, opened.open(member)
