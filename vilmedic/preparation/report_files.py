"""The reports of MIMIC-CXR, out of their archive or a folder, by many processes."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilmedic.encodings import Decoded, decode_unicode, is_credible
from vilmedic.errors import DataError
from vilmedic.files import DAMAGE, open_regular, sha256_of
from vilmedic.preparation.command import cores, list_facts
from vilmedic.preparation.sections import choose_text, find_sections

ARCHIVE = "mimic-cxr-reports.zip"
CHUNK = 500
LONGEST = 2**24  # bytes of a report
_MEMBER = re.compile(r"^(?P<prefix>.*?)p\d\d/p\d+/s\d+\.txt$")


@dataclass(frozen=True)
class Reports:
    """Where reports are.

    Attributes:
        path: an archive, or the folder that holds `p10` to `p19`.
        prefix: what stands before `p10/` in the archive.
    """

    path: Path
    prefix: str = ""

    def facts(self) -> dict[str, dict[str, Any]]:
        """Size and sum of the archive, or of the list of a folder's files and their sizes."""
        if self.path.is_file():
            return {
                self.path.name: {
                    "sha256": sha256_of(self.path),
                    "bytes": self.path.stat().st_size,
                }
            }
        return {"reports": list_facts(self.path)}


@dataclass(frozen=True)
class Found:
    """What was found of one report.

    Attributes:
        text: the chosen section, empty when there is none.
        missing: there is no such file.
        unheaded: the text is that of a report without headings.
        encoding: the character set of a file that is not UTF-8.
        undecodable: no character set gives a text without doubt.
    """

    text: str
    missing: bool = False
    unheaded: bool = False
    encoding: str = ""
    undecodable: bool = False


def locate_reports(given: Path) -> Reports:
    """Find the reports in what the user named.

    Args:
        given: the archive, a folder that holds it, or a folder that holds `files` or `p10`.

    Raises:
        DataError: nothing of that kind is there.
    """
    archive = given / ARCHIVE if given.is_dir() else given
    if archive.is_file():
        return Reports(archive, _prefix(archive))
    folders = (given, given / "files", given / "mimic-cxr-reports" / "files")
    for folder in folders:
        if folder.is_dir() and any(folder.glob("p1[0-9]")):
            return Reports(folder)
    raise DataError(
        f"{given} is neither {ARCHIVE} nor a folder that holds it, nor one that holds files/p10 to "
        "files/p19. Get it with `python data/download.py SELFSUP`, or say where it is with "
        "--reports."
    )


def read_reports(
    reports: Reports, paths: Sequence[str], *, section: str, unheaded: bool, workers: int = 0
) -> list[Found]:
    """The chosen text of each report, in the order of the paths.

    Args:
        reports: where they are.
        paths: below `files`, such as `p10/p10000032/s50414267.txt`.
        section: see `choose_text`.
        unheaded: see `choose_text`.
        workers: processes, 0 for one a core; the result does not depend on it.
    """
    read = partial(_read_chunk, reports, section, unheaded)
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(cores(workers), len(chunks))
    if workers <= 1:
        return [found for chunk in chunks for found in read(chunk)]
    # Fresh processes rather than forks: the caller may be running threads.
    with get_context("spawn").Pool(workers) as pool:
        return [found for chunk in pool.imap(read, chunks) for found in chunk]


_archives: dict[Path, zipfile.ZipFile] = {}  # of this process: reading the directory takes seconds


def _read_chunk(
    reports: Reports, section: str, unheaded: bool, paths: Sequence[str]
) -> list[Found]:
    found = []
    for path in paths:
        content = _content(reports, path)
        if content is None:
            found.append(Found("", missing=True))
            continue
        decoded = decode_report(content)
        if decoded is None:
            found.append(Found("", undecodable=True))
            continue
        sections = find_sections(decoded.text)
        chosen = choose_text(sections, section, unheaded=unheaded)
        has_heading = bool(sections.findings or sections.impression)
        encoding = "" if decoded.encoding.startswith("utf") else decoded.encoding
        found.append(Found(chosen, unheaded=bool(chosen) and not has_heading, encoding=encoding))
    return found


def decode_report(content: bytes) -> Decoded | None:
    """The text of a report file in English: in Unicode, or as Windows writes it (cp1252).

    Returns:
        None for a file that is in neither without doubt.
    """
    decoded = decode_unicode(content)
    if decoded is not None:
        return None if "\0" in decoded.text else decoded
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return Decoded(text, "cp1252") if is_credible(text, "cp1252") else None


def _content(reports: Reports, path: str) -> bytes | None:
    try:
        if reports.path.is_dir():
            with open_regular(reports.path / path) as file:
                return file.read()
        if reports.path not in _archives:
            _archives[reports.path] = zipfile.ZipFile(reports.path)
        member = _archives[reports.path].getinfo(reports.prefix + path)
        if member.file_size > LONGEST:
            raise zipfile.BadZipFile(f"{member.file_size:,} bytes are no report")
        return _archives[reports.path].read(member)
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, *DAMAGE) as error:
        raise DataError(f"{reports.path}: {path} cannot be read: {error}.") from None


def _prefix(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if match := _MEMBER.match(name):
                    return match["prefix"]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} is no complete archive: {error}. Get it anew.") from None
    raise DataError(f"{archive} holds no report such as files/p10/p10000032/s50414267.txt.")
