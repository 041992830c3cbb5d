"""Where the sentences of a report begin and end."""

from __future__ import annotations

import re

from vilmedic.datasets.scripts import words

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
        for piece in _split_at_stops(item):
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


def _split_at_stops(text: str) -> list[str]:
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
