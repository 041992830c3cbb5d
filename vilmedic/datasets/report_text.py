"""Report text processing: cleaning, words and sentences, in any language.

Results of published work depend on the rules of its cleaning to the letter, oddities included, so
those functions are our own, after what the published ones do; each says which work it follows.

Chinese characters, hiragana and the syllables of Thai, Lao, Burmese and Khmer each count as a word,
and so does a run of katakana: without a dictionary there is no better unit, and a whole clause as
one word would be seen once and never again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from vilmedic.errors import nearest

_NUMBERS = [(f"{before}{k}. ", ". ") for before in (". ", " ") for k in range(2, 6)]
_QUOTES_AND_SLASHES = str.maketrans("", "", "\"'/\\")
# The published character class contains the range from ":" to "[", so it also removes "<", "=",
# ">" and "@", and it keeps hyphens.
_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():<=>@\[\]{}]")
_LETTERS = re.compile(r"\w+")
_WORD_OR_PUNCTUATION = re.compile(r"\w+|[^\w\s]+")
# A number is tried from its first digit alone: the same matches, and long numbers are read once.
_SENTENCE_END_OR_NUMBER = re.compile(r"(?<![0-9])[0-9]+\.|\.")
_DECIMAL_MARK = re.compile(r"(?<=[0-9])([.,])(?=[0-9])")
_JOINERS = "\u200c\u200d"  # without width, but part of the spelling of Persian and Hindi words

MIN_WORDS = 2  # shorter sentences ("Stable.") say nothing alone; "No effusion." does
_ABBREVIATIONS = frozenset(
    ["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "fig", "pt", "pts"]
)
_ENDINGS = frozenset(
    first + last
    for name in _ABBREVIATIONS
    for first in (name[-2], name[-2].upper())
    for last in (name[-1], name[-1].upper())
)
_LOOK_BACK = 40  # characters, more than the longest abbreviation
# Runs of stops are taken whole, from their start, so that 100,000 of them are read once. The stops
# of Chinese and Japanese need no space behind them.
_STOP = re.compile(
    r"(?<![.!?\u0964\u061f])[.!?\u0964\u061f]+(?![.!?\u0964\u061f])(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61]+"
)
_LIST_NUMBER = re.compile(r"(?<!\S)(\d{1,2})\s?[.)]\s+(?=\S)")
_DIGIT = re.compile(r" \d")

_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIRAGANA = "\u3041-\u309f"
_KATAKANA = "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_SYLLABLES = (
    "\u0e01-\u0e3a\u0e40-\u0e4e"  # Thai
    "\u0e81-\u0ecf\u0edc-\u0edf"  # Lao
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d"  # Burmese
    "\u1780-\u17d3\u17d7\u17dc\u17dd"  # Khmer
)
_VOWELS_AND_TONES = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    "\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d"
    "\u109a-\u109d\u17b4-\u17d3\u17dd"
)
UNSPACED = f"[{_KATAKANA}]+|[{_HAN}{_HIRAGANA}]|[{_SYLLABLES}][{_VOWELS_AND_TONES}]*"
"""A word of a script without spaces, as a regular expression that Python and Oniguruma read."""
_WORD = re.compile(rf"{UNSPACED}|[^\W{_KATAKANA}{_HAN}{_HIRAGANA}{_SYLLABLES}]+")


def r2gen_clean_report(report: str) -> str:
    """Cleaning of MIMIC-CXR reports in R2Gen (Chen et al. 2020, arXiv:2010.16056).

    Drops de-identification marks, list numbers (1 to 5), quotes and punctuation, lower-cases, and
    puts ` . ` between sentences. As published, `1. ` goes even at the end of a longer number or
    word. A report with nothing left gives an empty text.
    """
    text = report.replace("\n", " ")
    for repeated in "_ .":
        text = re.sub(re.escape(repeated) + "{2,}", repeated, text)
    text = text.replace("1. ", "")
    for number, replacement in _NUMBERS:
        text = text.replace(number, replacement)
    sentences = [
        _PUNCTUATION.sub("", sentence.translate(_QUOTES_AND_SLASHES).strip())
        for sentence in text.strip().lower().split(". ")
    ]
    return " . ".join(sentences) + " ." if any(s.strip() for s in sentences) else ""


def ifcc_clean_report(report: str) -> str:
    """Cleaning in IFCC (Miura et al. 2021, arXiv:2010.10042): lower case, punctuation set apart."""
    return " ".join(_WORD_OR_PUNCTUATION.findall(report.lower()))


def gloria_clean_report_chexpert(report: str) -> str:
    """Cleaning of CheXpert reports in GLoRIA (Huang et al. 2021, ICCV).

    Splits sentences at full stops and list numbers, drops those of a single word, and keeps
    lower-case words only, without their non-ASCII characters.
    """
    kept: list[str] = []
    for sentence in _SENTENCE_END_OR_NUMBER.split(report.replace("\ufffd\ufffd", " ")):
        found = _LETTERS.findall(sentence.lower())
        if len(found) > 1:
            ascii_words = (word.encode("ascii", "ignore").decode() for word in found)
            kept.extend(word for word in ascii_words if word)
    return " ".join(kept)


class _Spaced(dict[int, str]):
    """Of each character what becomes of it: letters, marks and digits stay, others are spaces."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LMN" or character in _JOINERS
        self[code] = character if kept else " "
        return self[code]


_SPACED = _Spaced()


def multilingual_clean_report(report: str) -> str:
    """Lower-case words of any language with all their letters, and numbers, decimals whole.

    All else separates words and goes. A letter that can be written in two ways is written in one
    (Unicode NFC).
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", report).lower())
    pieces = _DECIMAL_MARK.split(text)
    pieces[::2] = [piece.translate(_SPACED) for piece in pieces[::2]]
    return " ".join(word for word in "".join(pieces).split() if word.strip(_JOINERS))


def remove_prior_references(report: str) -> str:
    """See `vilmedic.datasets.earlier_studies`, whose rules are read when they are needed."""
    from vilmedic.datasets.earlier_studies import remove_prior_references

    return remove_prior_references(report)


def remove_deidentification(report: str) -> str:
    """See `vilmedic.datasets.earlier_studies`."""
    from vilmedic.datasets.earlier_studies import remove_deidentification

    return remove_deidentification(report)


CLEANERS: dict[str, Callable[[str], str]] = {
    "remove_prior_references": remove_prior_references,
    "remove_deidentification": remove_deidentification,
    "r2gen_clean_report": r2gen_clean_report,
    "ifcc_clean_report": ifcc_clean_report,
    "gloria_clean_report_chexpert": gloria_clean_report_chexpert,
    "multilingual_clean_report": multilingual_clean_report,
}


def chain(processing: str | Sequence[str] | None) -> str | list[str] | None:
    """A cleaning in the form in which it is recorded and compared.

    Args:
        processing: the name of a cleaning, several in their order, or None for none.

    Returns:
        None, a name, or a list of at least two.

    Raises:
        ValueError: there is no cleaning of a name.
    """
    names = [processing] if isinstance(processing, str) else list(processing or ())
    for name in names:
        if name not in CLEANERS:
            raise ValueError(
                f"There is no processing named '{name}'. Allowed: {', '.join(CLEANERS)}."
                f"{nearest(name, CLEANERS)}"
            )
    return names if len(names) > 1 else names[0] if names else None


def chain_name(processing: str | Sequence[str]) -> str:
    """A cleaning as messages name it: `a` or `a, b`."""
    return processing if isinstance(processing, str) else ", ".join(processing)


def clean(processing: str | Sequence[str] | None, report: str) -> str:
    """Apply a cleaning by its name, or several one after the other; None leaves a report alone."""
    for name in (processing,) if isinstance(processing, str) else processing or ():
        report = CLEANERS[name](report).strip()
    return report


def words(text: str) -> list[str]:
    """The words of a text, without what lies between them."""
    return _WORD.findall(text)


def split_sentences(report: str) -> list[str]:
    """Split a report into sentences.

    List numbers (`1. ... 2. ...`) separate sentences and are dropped, with or without a full stop
    before them. Decimals (`3.5 cm`) and common abbreviations (`e.g.`, `Dr.`) do not. Texts with
    spaces around punctuation (`clear . no effusion .`) are understood as well. A sentence of fewer
    than two words is joined to the one before it (the first one to its successor).

    Returns:
        The sentences with their closing punctuation, in order; the whole report when it is one.
    """
    sentences: list[str] = []
    parts: list[str] = []  # of the sentence that is not complete
    total = 0  # its words
    counts: dict[str, int] = {}  # many pieces of a text with many are alike
    for item in _split_list(report):
        for piece in split_at_stops(item):
            count = counts.get(piece, -1)
            if count < 0:
                counts[piece] = count = len(words(piece))
            if parts and count and min(count, total) >= MIN_WORDS:
                sentences.append(" ".join(parts))
                parts, total = [], 0
            if count:
                parts.append(piece)
                total += count
    return [*sentences, " ".join(parts)] if parts else [report]


def _split_list(report: str) -> list[str]:
    """Cut a report at list numbers that count up from 1; `at grade 2. The` is no list."""
    items, start, expected = [], 0, 1
    for match in _LIST_NUMBER.finditer(report):
        if int(match[1]) != expected:
            continue
        if expected > 1 or _last_sign(report, match.start()) in ("", *".:;!?"):
            items.append(report[start : match.start()])
            start, expected = match.end(), expected + 1
    return [*items, report[start:]]


def _last_sign(text: str, end: int) -> str:
    """The last character before a place that is no white space."""
    while end and text[end - 1].isspace():
        end -= 1
    return text[end - 1 : end]


def split_at_stops(text: str) -> list[str]:
    """Cut a text behind its stops; some of the pieces may hold no word."""
    pieces, start = [], 0
    for match in _STOP.finditer(text):
        first, end = match.span()
        # Few stops need a closer look: those behind a space, or what may be an abbreviation.
        if text[first - 2 : first] in _ENDINGS or (first - 1 > start and text[first - 1].isspace()):
            spaced = text[first - 1] == " "
            before = text[max(start, first - _LOOK_BACK) : first].rsplit(None, 1)
            last = before[-1].rstrip().lower() if before else ""
            decimal = spaced and match[0] == "." and last.isdigit() and _DIGIT.match(text, end)
            if decimal or ("." in match[0] and last.lstrip("([") in _ABBREVIATIONS):
                continue
        pieces.append(text[start:end].strip())
        start = end
    pieces.append(text[start:].strip())
    return pieces
