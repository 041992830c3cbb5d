"""What becomes of the reports of a split on their way into a model."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Text that was decoded wrongly before: the sign that stands for what could not be decoded, and
# letters of UTF-8 read as Latin-1 or cp1252 ("Ã³" for "ó", "â€™" for an apostrophe).
_MISREAD = re.compile(r"\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass
class LostLetters:
    """Letters that cleaning drops.

    Attributes:
        share: of all letters of the reports, also those of whole sentences that are dropped.
        never: letters that never come through, with their number.
        lines: numbers of the reports that have such letters, from 0.
    """

    share: float = 0.0
    never: Counter[str] = field(default_factory=Counter)
    lines: list[int] = field(default_factory=list)


@dataclass
class UnknownWords:
    """Words that a tokenizer does not know.

    Attributes:
        share: of all words.
        words: those that are unknown, with their number.
        lines: numbers of the reports that have some, from 0.
    """

    share: float = 0.0
    words: Counter[str] = field(default_factory=Counter)
    lines: list[int] = field(default_factory=list)


def lost_letters(reports: Sequence[str], cleaned: Iterable[str]) -> LostLetters:
    """Compare the letters of reports before and after cleaning, small and capital ones as one.

    Args:
        reports: as the files have them.
        cleaned: the same after cleaning.
    """
    before, after = _letters(reports), _letters(cleaned)
    dropped = before - after
    never = Counter({letter: count for letter, count in dropped.items() if not after[letter]})
    lines = [n for n, text in enumerate(reports) if not never.keys().isdisjoint(_plain(text))]
    share = dropped.total() / before.total() if before else 0.0
    return LostLetters(share, never, lines if never else [])


def unknown_words(encodings: Sequence[Any], tokenizer: Any, texts: Sequence[str]) -> UnknownWords:
    """Find the words that a tokenizer has no id for; punctuation is no word.

    Args:
        encodings: of each report, as fast tokenizers give them.
        tokenizer: the one that they are from.
        texts: the reports.
    """
    found = UnknownWords()
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return found  # one that takes unknown words apart, down to single bytes
    is_word = np.zeros(len(tokenizer), bool)
    for token, number in tokenizer.get_vocab().items():
        is_word[number] = any(map(str.isalnum, token))
    is_word[tokenizer.all_special_ids] = False
    known = 0
    for line, (encoding, text) in enumerate(zip(encodings, texts, strict=True)):
        ids = np.array(encoding.ids, np.int64)
        known += int(is_word[ids].sum())
        spans = [encoding.offsets[place] for place in np.flatnonzero(ids == unknown)]
        words = [word for span in spans if any(map(str.isalnum, word := text[slice(*span)]))]
        if words:
            found.words.update(words)
            found.lines.append(line)
    total = found.words.total()
    found.share = total / (known + total) if total else 0.0
    return found


def misread(reports: Sequence[str]) -> list[int]:
    """The reports that were decoded wrongly before, by their looks."""
    return [line for line, text in enumerate(reports) if _MISREAD.search(text)]


def with_control_characters(reports: Sequence[str]) -> list[int]:
    """The reports that hold control characters, such as those that colour a terminal."""
    return [line for line, text in enumerate(reports) if _CONTROL.search(text)]


def _letters(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_plain(text))
    return Counter({c: n for c, n in counts.items() if unicodedata.category(c)[0] == "L"})


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
