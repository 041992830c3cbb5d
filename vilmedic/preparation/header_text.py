"""Texts in DICOM headers, also of files that do not say their character set or say a wrong one."""

from __future__ import annotations

import warnings
from typing import Any

from vilmedic.encodings import as_utf8, is_credible
from vilmedic.errors import DataError

_TEXT = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
_SEVERAL = frozenset({"LO", "PN", "SH", "UC"})  # a backslash separates values of these
_ESCAPE = b"\x1b"  # begins a change of the character set in texts by ISO 2022, nothing elsewhere


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
    """The values in the text of a field, without what fills it up."""
    from pydicom.datadict import dictionary_VR

    several = text.split("\\") if dictionary_VR(keyword) in _SEVERAL else [text]
    return [value for one in several if (value := one.strip(" \t\r\n\0"))]


def _declared_text(content: bytes, header: Any, keyword: str) -> str | None:
    """The text as its header declares it, or as UTF-8 where that is what it is; else None."""
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
    """The text in one of the other declared sets, which many programs write without the escape."""
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
    except Exception:  # names that the standard does not have
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
    except Exception:  # an escape that is none
        return None
    return None if "\ufffd" in text or "\x1b" in text else text


def _is_single_byte(encoding: str) -> bool:
    return len(bytes(range(0xE0, 0xE8)).decode(encoding, errors="replace")) == 8


def _is_eastern(text: str) -> bool:
    """Whether all that is not ASCII takes three bytes in UTF-8, which no other text happens to."""
    return all(character >= "\u0800" for character in text if not character.isascii())


def _values(value: Any) -> list[str]:
    from pydicom.multival import MultiValue

    several = value if isinstance(value, MultiValue) else [value]
    return [text for one in several if one is not None and (text := str(one).strip())]
