"""Published ways of cleaning reports, written anew from what they do.

Results of published work depend on these rules to the letter, oddities included; each function
says which work it follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBERS = [(f"{before}{k}. ", ". ") for before in (". ", " ") for k in range(2, 6)]
_QUOTES_AND_SLASHES = str.maketrans("", "", "\"'/\\")
# The published character class contains the range from ":" to "[", so it also removes "<", "=",
# ">" and "@", and it keeps hyphens.
_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():<=>@\[\]{}]")
_WORD = re.compile(r"\w+")
_WORD_OR_PUNCTUATION = re.compile(r"\w+|[^\w\s]+")
_SENTENCE_END_OR_NUMBER = re.compile(r"[0-9]+\.|\.")


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
        words = _WORD.findall(sentence.lower())
        if len(words) > 1:
            ascii_words = (word.encode("ascii", "ignore").decode() for word in words)
            kept.extend(word for word in ascii_words if word)
    return " ".join(kept)


CLEANERS: dict[str, Callable[[str], str]] = {
    "r2gen_clean_report": r2gen_clean_report,
    "ifcc_clean_report": ifcc_clean_report,
    "gloria_clean_report_chexpert": gloria_clean_report_chexpert,
}
