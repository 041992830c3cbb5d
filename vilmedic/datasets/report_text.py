"""Cleaning of report text.

Published results depend on the exact cleaning rules, including their quirks. These functions
reimplement the published ones; each names the work that it follows.
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
# Matching starts only at the first digit: the same matches, and long numbers are read once.
_SENTENCE_END_OR_NUMBER = re.compile(r"(?<![0-9])[0-9]+\.|\.")
_DECIMAL_MARK = re.compile(r"(?<=[0-9])([.,])(?=[0-9])")
_JOINERS = "\u200c\u200d"  # zero-width, but part of the spelling of Persian and Hindi words


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
    """Character table: letters, marks and digits stay, others become spaces."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = unicodedata.category(character)[0] in "LMN" or character in _JOINERS
        self[code] = character if kept else " "
        return self[code]


_SPACED = _Spaced()


def multilingual_clean_report(report: str) -> str:
    """Lower-case words of any language with all their letters, and numbers, decimals whole.

    Everything else separates words and is removed. Letters are normalised to Unicode NFC.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", report).lower())
    pieces = _DECIMAL_MARK.split(text)
    pieces[::2] = [piece.translate(_SPACED) for piece in pieces[::2]]
    return " ".join(word for word in "".join(pieces).split() if word.strip(_JOINERS))


def remove_prior_references(report: str) -> str:
    """See `vilmedic.datasets.earlier_studies`, which is imported when it is needed."""
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
    """Return a cleaning in its canonical form, for records and comparisons.

    Args:
        processing: the name of a cleaning step, several in order, or None.

    Returns:
        None, a name, or a list of at least two.

    Raises:
        ValueError: a name is not that of a cleaning step.
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
    """Return a cleaning for messages: `a` or `a, b`."""
    return processing if isinstance(processing, str) else ", ".join(processing)


def clean(processing: str | Sequence[str] | None, report: str) -> str:
    """Apply cleaning steps by name, one after the other; None leaves a report unchanged."""
    for name in (processing,) if isinstance(processing, str) else processing or ():
        report = CLEANERS[name](report).strip()
    return report
