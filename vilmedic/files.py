"""Files that are whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str, writer: str = "") -> None:
    """Write a text file so that it is either the old one or the whole new one.

    Args:
        path: the file.
        text: its content, written as UTF-8.
        writer: what tells writers apart that may be at the same file at the same time.

    Raises:
        OSError: it cannot be written; the old file is still there.
    """
    # One name for all attempts: what a killed one has left is overwritten by the next.
    temporary = path.with_name(f".{path.name}{writer}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
