"""Where the sentences of a report begin and end."""

from __future__ import annotations

import re

MIN_WORDS = 2  # shorter sentences ("Stable.") say nothing alone; "No effusion." does
_ABBREVIATIONS = frozenset(
    ["dr", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "cf", "approx", "fig", "pt", "pts"]
)
_STOP = re.compile(r"\s?[.!?]+(?=\s|$)")
_LIST_NUMBER = re.compile(r"(?<!\S)(\d{1,2})\s?[.)]\s+(?=\S)")
_WORD = re.compile(r"\w+")


def split_sentences(report: str) -> list[str]:
    """Split a report into sentences.

    List numbers (`1. ... 2. ...`) separate sentences and are dropped, with or without a full stop
    before them. Decimals (`3.5 cm`) and common abbreviations (`e.g.`, `Dr.`) do not. Texts with
    spaces around punctuation (`clear . no effusion .`) are understood as well. A sentence of fewer
    than two words is joined to the one before it (the first one to its successor).

    Returns:
        The sentences with their closing punctuation, in order; the whole report when it is one.
    """
    pieces = [piece for item in _split_list(report) for piece in _split_at_stops(item)]
    sentences: list[str] = []
    for piece in pieces:
        if sentences and min(_words(piece), _words(sentences[-1])) < MIN_WORDS:
            sentences[-1] = f"{sentences[-1]} {piece}"
        else:
            sentences.append(piece)
    return sentences or [report]


def _words(text: str) -> int:
    return len(_WORD.findall(text))


def _split_list(report: str) -> list[str]:
    """Cut a report at list numbers that count up from 1; `at grade 2. The` is no list."""
    items, start, expected = [], 0, 1
    for match in _LIST_NUMBER.finditer(report):
        before = report[: match.start()].rstrip()
        opens = expected > 1 or not before or before[-1] in ".:;!?"
        if int(match[1]) == expected and opens:
            items.append(report[start : match.start()])
            start, expected = match.end(), expected + 1
    return [*items, report[start:]]


def _split_at_stops(text: str) -> list[str]:
    pieces, start = [], 0
    for match in _STOP.finditer(text):
        before, after = text[start : match.start()], text[match.end() :]
        last = before.split()[-1].lower() if before.split() else ""
        spaced_decimal = match[0] == " ." and last.isdigit() and re.match(r" \d", after)
        if "." in match[0] and (last.lstrip("([") in _ABBREVIATIONS or spaced_decimal):
            continue
        pieces.append(text[start : match.end()].strip())
        start = match.end()
    pieces.append(text[start:].strip())
    return [piece for piece in pieces if _WORD.search(piece)]
