"""Section parser of radiology reports.

Headings stand at the start of a line in capitals with a colon (`FINDINGS:`), in small letters when
the word is well known (`Findings:`), alone on a line without a colon, or after a full stop in the
middle of one. They are misspelt now and then (`IMPRESSOIN:`), and a semicolon or a dash stands in
place of the colon (`FINDINGS;`, `IMPRESSION - `). The conventions about which text is taken are
those of the sections published with MIMIC-CXR (Johnson et al. 2019): the last section of a name
that is not empty counts, a joint heading of findings and impression is an impression, and a heading
that names the examination (`PORTABLE CHEST:`) opens the findings when no other does.

Beyond them, a heading that is no administrative one and stands inside findings or impression
(`LUNGS:`) belongs to their text instead of ending it.
"""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

FINDINGS, IMPRESSION = "findings", "impression"

_NAMES = {
    FINDINGS: ["findings", "finding", "findings in detail", "report", "description"],
    IMPRESSION: [
        "impression",
        "impressions",
        "conclusion",
        "conclusions",
        "opinion",
        "summary",
        "findings and impression",
        "findings/impression",
        "impression and findings",
        "final impression",
    ],
    "comparison": ["comparison", "comparisons", "comparison exam", "comparison film", "prior"],
    "indication": [
        "indication",
        "indications",
        "clinical indication",
        "reason for exam",
        "reason for examination",
        "reason for study",
    ],
    "history": [
        "history",
        "clinical history",
        "clinical information",
        "patient history",
        "clinical data",
    ],
    "technique": ["technique", "procedure", "views", "protocol"],
    "examination": ["examination", "exam", "type of examination", "study", "date of exam"],
    "recommendation": ["recommendation", "recommendations"],
    "notification": ["notification", "notifications", "communication"],
    "addendum": ["addendum", "final addendum"],
    "wet read": ["wet read", "wetread", "preliminary report"],
    "title": ["final report", "end of impression", "narrative"],
    "note": ["note", "dictated by", "signed by", "attending", "accession number"],
}
_END = "end of impression"
_KNOWN = {name: section for section, names in _NAMES.items() for name in names}
# Headings that are one in small letters too; "Note:" and "Views:" begin sentences as often.
_ANY_CASE = frozenset(
    name
    for section in (FINDINGS, IMPRESSION, "comparison", "indication", "history", "recommendation")
    for name in _NAMES[section]
    if name not in ("report", "description", "opinion", "summary", "prior")
) | {"technique", "examination", "notification"}
MOST_SPELLINGS = 1000
"""Names of a report that are compared with known ones letter by letter; the rest must be exact."""
_LONG = [name for name in _KNOWN if len(name) >= 7]  # short words are near each other by chance
_VIEWS = re.compile(
    r"\b(chest|portable|views?|pa and lat\w*|lateral and pa|ap and lateral|frontal|cxr|"
    r"radiographs?|upright|semi-upright|babygram)\b"
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9 ()/,.&'-]{0,70}")
_TITLE = r"(?P<title>FINDINGS?(?: AND IMPRESSION)?|IMPRESSIONS?|CONCLUSIONS?)[ \t]*"
_TITLES = (
    re.compile(rf"^[ \t]*{_TITLE}(?:;|-[ \t])", re.MULTILINE),
    re.compile(rf"(?<=[.!?;)])[ \t]+{_TITLE}(?::|;|-[ \t])"),
)
_RULE = re.compile(r"^[ \t]*[_=*-]{5,}[ \t]*$", re.MULTILINE)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"[^\W\d_]{2,}")
_DENIAL = re.compile(r"\b(?:no|not|without)\s+\w")  # "NO ACUTE FINDINGS: clear lungs" is a sentence


@dataclass(frozen=True)
class Sections:
    """The texts of a report, each on one line; empty where the report has none.

    Attributes:
        findings: what is seen.
        impression: what it means.
        rest: of a report with neither heading, the text that describes the image.
    """

    findings: str = ""
    impression: str = ""
    rest: str = ""


class _Heading(NamedTuple):
    name: str
    section: str
    start: int
    end: int
    known: bool


def find_sections(report: str) -> Sections:
    """Find the findings and the impression of a report.

    Args:
        report: the whole text, with its line ends.

    Returns:
        The sections, with white space run together.
    """
    text = _RULE.sub("", report.replace("\r\n", "\n").replace("\r", "\n"))
    pieces = _pieces(text)
    last = {FINDINGS: "", IMPRESSION: ""}
    for section, body in pieces:
        if section in last and _WORD.search(body):
            last[section] = body
    findings, impression = map(_one_line, last.values())
    rest = "" if findings or impression else _unheaded(pieces)
    return Sections(findings, impression, rest)


def choose_text(sections: Sections, section: str, *, unheaded: bool = True) -> str:
    """The text that is trained on.

    Args:
        sections: of one report.
        section: `findings`, `impression`, or `both`: the impression, then the findings, if
            present (a text encoder that cuts long reports then keeps the conclusion).
        unheaded: with `both`, take the text of a report that has neither.

    Returns:
        The text on one line, empty when there is none.
    """
    if section == FINDINGS:
        return sections.findings
    if section == IMPRESSION:
        return sections.impression
    both = " ".join(part for part in (sections.impression, sections.findings) if part)
    return both or (sections.rest if unheaded else "")


def _pieces(text: str) -> list[tuple[str, str]]:
    """Sections in their order, each with its text; the first one has no heading.

    Those without a word are left out, but for the last one.
    """
    pieces = []
    current, start = "", 0
    for _, section, begin, end, known in _until_the_end(_headings(text)):
        if not known and current in (FINDINGS, IMPRESSION):
            continue
        if _WORD.search(text, start, begin):
            pieces.append((current, text[start:begin]))
        current, start = section, end
    return [*pieces, (current, text[start:])]


def _headings(text: str) -> Iterator[_Heading]:
    """Headings in their order, one at a time: a text may have one on every line."""
    titles = []
    for pattern in _TITLES:
        for match in pattern.finditer(text):
            name = _normal(match["title"])
            titles.append(_Heading(name, _KNOWN[name], match.start(), match.end(), True))
    if not titles:
        return _line_headings(text)
    place = attrgetter("start")
    return heapq.merge(_line_headings(text), sorted(titles, key=place), key=place)


def _until_the_end(headings: Iterator[_Heading]) -> Iterator[_Heading]:
    """Headings without the summaries that follow the end of an impression."""
    impression = closed = ended = False
    for heading in headings:
        if heading.section == IMPRESSION:
            impression = True
            if ended and "impression" not in heading.name:
                heading = heading._replace(section="other")
        elif heading.name == _END and not closed:
            ended, closed = impression, True
        yield heading


def _line_headings(text: str) -> Iterator[_Heading]:
    """Headings at the start of a line, or alone on one."""
    start = compared = 0
    for line in text.split("\n"):
        colon = line.find(":", 0, 80)
        if colon > 0:
            named = _named(line[:colon].strip(), compared < MOST_SPELLINGS)
            compared += 1
            if named is not None:
                name, section, known = named
                yield _Heading(name, section, start, start + colon + 1, known)
        elif colon < 0 and line and 0 < len(alone := line.strip()) < 32 and alone[0].isupper():
            name = _normal(alone)
            capitals = alone.upper() == alone
            if name in _KNOWN and (capitals or alone in ("Findings", "Impression", "Conclusion")):
                yield _Heading(name, _KNOWN[name], start, start + len(line), True)
        start += len(line) + 1


@lru_cache(maxsize=4096)
def _named(text: str, misspelt: bool) -> tuple[str, str, bool] | None:
    """Name, section, and whether it is a known one, of what stands before a colon.

    Args:
        text: the words at the start of a line.
        misspelt: whether names that are nearly known ones count.

    Returns:
        None for what is no heading.
    """
    if not _NAME.fullmatch(text):
        return None
    name = _normal(text)
    if _DENIAL.search(name):
        return None
    if text.upper() != text and not _in_small_letters(text, name, misspelt):
        return None
    return name, *_classify(name, misspelt)


def _in_small_letters(text: str, name: str, misspelt: bool) -> bool:
    """Return whether a name in small letters is a heading, even a misspelt one."""
    if not text[0].isupper():
        return False
    if name in _ANY_CASE or not misspelt:
        return name in _ANY_CASE
    return bool(difflib.get_close_matches(name, _ANY_CASE, n=1, cutoff=0.85))


def _normal(name: str) -> str:
    return " ".join(name.lower().replace("(s)", "").replace(" / ", "/").split()).strip(" .-")


def _classify(name: str, misspelt: bool) -> tuple[str, bool]:
    """The section that a heading opens, and whether it is known by name."""
    if name in _KNOWN:
        return _KNOWN[name], True
    near = difflib.get_close_matches(name, _LONG, n=1, cutoff=0.82) if misspelt else []
    if near:
        return _KNOWN[near[0]], True
    for word, section in (("impression", IMPRESSION), ("comparison", "comparison")):
        if word in name:
            return section, True
    if "findings" in name and len(name) < 25:
        return FINDINGS, True
    return (FINDINGS if _VIEWS.search(name) else "other"), False


def _unheaded(pieces: list[tuple[str, str]]) -> str:
    """Of a report without findings or impression, the text that most likely describes the image.

    It is what follows the first paragraph of the last section (that paragraph belongs to its
    heading), else the last section that reads like a description, else the text before any heading.
    """
    section, body = pieces[-1]
    paragraphs = [part for part in _PARAGRAPH.split(body.strip("\n")) if _WORD.search(part)]
    if section and len(paragraphs) > 1:
        return _one_line(" ".join(paragraphs[1:]))
    for section, body in reversed(pieces):
        if section in ("", "title", "other", "comparison", "technique", "examination"):
            text = _one_line(body)
            if len(_WORD.findall(text)) >= 5:
                return text
    return ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
