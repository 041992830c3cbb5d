"""Table rows from DICOM headers, including headers with a wrong character set."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vilmedic.datasets.lines import brief
from vilmedic.encodings import as_utf8, decode_all, is_credible
from vilmedic.errors import DataError, nearest
from vilmedic.files import core_count, is_apple_double, open_regular, walk_files
from vilmedic.preparation.builders.folder_table import Row
from vilmedic.preparation.folder import Dropped
from vilmedic.tables import Missing

CHUNK = 200
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_TEXT = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_SEVERAL = frozenset({"LO", "PN", "SH", "UC"})  # a backslash separates values of these
_ESCAPE = b"\x1b"  # begins a change of the character set in texts by ISO 2022, nothing elsewhere


def read_headers(
    folder: Path,
    keywords: Sequence[str],
    missing: Missing,
    left_out: Dropped,
    workers: int = 0,
    encoding: str = "",
) -> list[Row]:
    """The header fields of every DICOM file with an image below a folder, in the order of paths.

    DICOM files are recognised by their name or by the marker of the format. They are read as in
    training, also without the preamble and the marker.

    Args:
        folder: where to look.
        keywords: standard names of fields, such as `PatientID`.
        missing: which values count as missing; counts them.
        left_out: receives the files that give no row.
        workers: processes, 0 for one per core.
        encoding: character set of all texts outside ASCII, whatever the headers declare.

    Raises:
        DataError: pydicom is not installed, a keyword is not in the standard, or nothing is there.
    """
    _check_keywords(keywords)

    def failed(error: OSError) -> None:
        left_out.add("folders that cannot be listed", str(error.filename))

    paths = []
    for path in walk_files(folder, failed):
        name = str(path.relative_to(folder))
        if is_apple_double(path) or not _is_dicom(path):
            left_out.add("files that are no DICOM", name)
        else:
            paths.append(name)
    if not paths:
        raise DataError(f"{folder} holds no DICOM file.")
    read = partial(_read_header, folder, tuple(keywords), encoding)
    workers = min(workers or core_count(), -(-len(paths) // CHUNK))
    if workers <= 1:
        headers = list(map(read, paths))
    else:
        with get_context("spawn").Pool(workers) as pool:
            headers = list(pool.imap(read, paths, chunksize=CHUNK))
    # Unknown character sets are found from the texts of all files together.
    unclear = [content for header in headers for content in header.unclear.values()]
    decoded = iter(decode_all(unclear) if unclear else ())
    rows = []
    for name, header in zip(paths, headers, strict=True):
        values, found, doubtful = dict(header.values), "", False
        for keyword in header.unclear:
            one = next(decoded)
            values[keyword] = split_values(one.text, keyword)
            found, doubtful = one.encoding, doubtful or one.doubtful
        if header.reason:
            left_out.add(header.reason, name, where=header.detail)
            continue
        kept = {
            keyword: [text for one in several or [""] if (text := missing.text(one, keyword))]
            for keyword, several in values.items()
        }
        rows.append(Row(str(folder / name), kept, name, encoding=found, doubtful=doubtful))
    return rows


def header_texts(header: Any, keyword: str, encoding: str = "") -> tuple[list[str], bytes | None]:
    """The values of a header field.

    Args:
        header: a pydicom data set.
        keyword: standard name of the field.
        encoding: character set of a text outside ASCII, whatever the header declares.

    Returns:
        The values; and, instead of them, the content of a text that is neither ASCII nor what its
        header declares nor UTF-8.

    Raises:
        DataError: it is not in the character set that was given.
    """
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    tag = Tag(keyword)
    element = header.get_item(tag)
    kind = getattr(element, "VR", None) or dictionary_VR(tag)
    content = getattr(element, "value", None)
    if not isinstance(element, RawDataElement) or kind not in _TEXT or not content:
        return _values(header.get(keyword)), None
    if encoding and not content.isascii():
        try:
            return split_values(content.decode(encoding), keyword), None
        except UnicodeDecodeError:
            raise DataError(f"{keyword} is not in the character set {encoding}") from None
    text = _declared_text(bytes(content), header, keyword)
    return ([], bytes(content)) if text is None else (split_values(text, keyword), None)


def split_values(text: str, keyword: str) -> list[str]:
    """Return the values in the text of a field, without padding."""
    from pydicom.datadict import dictionary_VR

    several = text.split("\\") if dictionary_VR(keyword) in _SEVERAL else [text]
    return [value for one in several if (value := one.strip(" \t\r\n\0"))]


def _is_dicom(path: Path) -> bool:
    from vilmedic.datasets.decode import is_dicom  # which loads torch

    try:
        return is_dicom(path)
    except OSError:
        return True  # to be named as a file that cannot be read


@dataclass(frozen=True)
class _Header:
    """The fields of a file, those of an unknown character set as bytes; or why it is left out."""

    values: dict[str, list[str]] = field(default_factory=dict)
    unclear: dict[str, bytes] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""


def _read_header(folder: Path, keywords: Sequence[str], encoding: str, path: str) -> _Header:
    from vilmedic.datasets.decode import is_marked

    pydicom = _pydicom()
    pixels = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXELS:
            pixels.append(length)
        return tag in _PIXELS

    tags = [pydicom.tag.Tag(name) for name in (*keywords, "Rows")]
    values: dict[str, list[str]] = {}
    unclear: dict[str, bytes] = {}
    try:
        with open_regular(folder / path) as file:
            marked = is_marked(file.read(132))
            file.seek(0)
            header = pydicom.filereader.read_partial(
                file, at_pixels, force=not marked, specific_tags=tags
            )
        for name in keywords:
            values[name], content = header_texts(header, name, encoding)
            if content is not None:
                unclear[name] = content
    except Exception as error:  # damaged files raise many kinds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return _Header(reason="DICOM files that cannot be read", detail=brief(lines[0]))
    if any(pixels) and "Rows" in header:
        return _Header(values, unclear)
    if marked:
        return _Header(reason="DICOM files without an image")
    return _Header(
        reason="DICOM files that cannot be read", detail="no image in it, or it is cut short"
    )


def _check_keywords(keywords: Sequence[str]) -> None:
    known = _pydicom().datadict.keyword_dict
    for name in keywords:
        if name not in known:
            raise DataError(f"'{name}' is no DICOM field.{nearest(name, known)}")


def _pydicom() -> Any:
    try:
        return importlib.import_module("pydicom")
    except ImportError:
        raise DataError(
            "Reading DICOM headers needs pydicom: pip install '.[dicom]' in the clone."
        ) from None


def _declared_text(content: bytes, header: Any, keyword: str) -> str | None:
    """Decode a text as its header declares, or as UTF-8 if it is valid; otherwise None."""
    if content.isascii() and _ESCAPE not in content:
        return content.decode("ascii")
    utf8 = as_utf8(content)
    encodings = _declared(header)
    if not encodings:
        return utf8
    if _ESCAPE in content and "2022" in str(header.get("SpecificCharacterSet")):
        return _with_escapes(content, encodings, keyword)
    try:
        text = content.decode(encodings[0])
    except (LookupError, UnicodeDecodeError):
        return _without_escapes(content, encodings[1:]) if utf8 is None else utf8
    if utf8 is not None and (_is_single_byte(encodings[0]) or _is_eastern(utf8)):
        return utf8
    if is_credible(text, encodings[0]):
        return text
    return _without_escapes(content, encodings[1:])


def _without_escapes(content: bytes, encodings: list[str]) -> str | None:
    """Decode a text in another declared set, which many programs write without the escape."""
    for name in encodings:
        try:
            text = content.decode(name)
        except (LookupError, UnicodeDecodeError):
            continue
        if is_credible(text, name):
            return text
    return None


def _declared(header: Any) -> list[str]:
    """Python's names of the character sets that a header declares, none for unknown ones."""
    from pydicom.charset import convert_encodings

    declared = header.get("SpecificCharacterSet")
    if not declared:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(convert_encodings(declared))
    except Exception:  # not in the standard
        return []


def _with_escapes(content: bytes, encodings: list[str], keyword: str) -> str | None:
    from pydicom.charset import decode_bytes
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import PN_DELIMS, TEXT_VR_DELIMS

    delimiters = PN_DELIMS if dictionary_VR(keyword) == "PN" else TEXT_VR_DELIMS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = decode_bytes(content, encodings, delimiters)
    except Exception:  # invalid escape
        return None
    return None if "\ufffd" in text or "\x1b" in text else text


def _is_single_byte(encoding: str) -> bool:
    return len(bytes(range(0xE0, 0xE8)).decode(encoding, errors="replace")) == 8


def _is_eastern(text: str) -> bool:
    """Return whether all non-ASCII characters take three bytes in UTF-8, which is no accident."""
    return all(character >= "\u0800" for character in text if not character.isascii())


def _values(value: Any) -> list[str]:
    from pydicom.multival import MultiValue

    several = value if isinstance(value, MultiValue) else [value]
    return [text for one in several if one is not None and (text := str(one).strip())]
