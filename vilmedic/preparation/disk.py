"""What to say when a disk refuses."""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_trouble(error: OSError, where: str = "") -> str:
    """An error of the disk in words; that it is full is said as such.

    Args:
        error: what was raised.
        where: the folder written to, where it is known.
    """
    if error.errno not in FULL:
        return str(error)
    disk = f"The disk of {where}" if where else "The disk"
    return f"{disk} is full. What is complete is kept: make room and run the same command again."
