"""Report statistics of a split: truncation, unknown words, near duplicates."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vilmedic.datasets.lines import words

# Text that was decoded wrongly before: the sign that stands for what could not be decoded, and
# letters of UTF-8 read as Latin-1 or cp1252 ("Ã³" for "ó", "â€™" for an apostrophe).
_MISREAD = re.compile(r"\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WINDOW = 3  # words that are compared as one
BANDS, ROWS = 32, 4
THRESHOLD = 0.8


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
    """Return the reports with control characters, such as the ones that colour a terminal."""
    return [line for line, text in enumerate(reports) if _CONTROL.search(text)]


def normal_form(report: str) -> str:
    """Words in lower case, without what lies between them: what exact duplicates share."""
    return " ".join(words(report.lower()))


def duplicate_groups(reports: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Group reports that are the same, and those that are nearly the same.

    Two reports are nearly the same when the sets of their runs of three words have a Jaccard
    similarity of at least 0.8, estimated from 128 hashes (Broder 1997, "On the resemblance and
    containment of documents"). Pairs are found by bands of four hashes, which miss one in 5,000 of
    the pairs at the threshold. Chains of near-duplicates are one group.

    Args:
        reports: N reports.

    Returns:
        For each report the number of its group of exact and of near duplicates, int64 [N] each.
    """
    numbers: dict[str, int] = {}
    exact = np.array([numbers.setdefault(normal_form(r), len(numbers)) for r in reports], np.int64)
    if not numbers:
        return exact, exact
    signatures = _signatures(list(numbers))
    first, second = _similar_pairs(signatures)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(len(numbers),) * 2)
    near = connected_components(graph, directed=False)[1].astype(np.int64)
    return exact, near[exact]


def repeated_share(groups: np.ndarray) -> float:
    """The share of samples that repeat an earlier one of their group; 0 when there are none."""
    return 1 - len(np.unique(groups)) / len(groups) if len(groups) else 0.0


def _letters(texts: Iterable[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_plain(text))
    return Counter({c: n for c, n in counts.items() if unicodedata.category(c)[0] == "L"})


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """The smallest values of 128 hash functions over the runs of words, uint32 [N, 128]."""
    hashes: list[int] = []
    starts = []
    for text in texts:
        starts.append(len(hashes))
        parts = text.split()
        for place in range(max(1, len(parts) - WINDOW + 1)):
            hashes.append(crc32(" ".join(parts[place : place + WINDOW]).encode()))
    values = np.array(hashes, dtype=np.uint64)
    random = np.random.default_rng(0)
    factors = random.integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**63, BANDS * ROWS, dtype=np.uint64)
    signatures = np.empty((len(texts), BANDS * ROWS), np.uint32)
    for column, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        hashed = ((values * factor + offset) >> np.uint64(32)).astype(np.uint32)
        signatures[:, column] = np.minimum.reduceat(hashed, starts)
    return signatures


def _similar_pairs(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that share a band and agree in enough columns."""
    pairs = []
    for band in range(BANDS):
        part = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * ROWS))).ravel()
        _, group = np.unique(keys, return_inverse=True)
        order = np.argsort(group, kind="stable")
        same = group[order][1:] == group[order][:-1]
        # Each member is compared with the one before it and with the first one of its band.
        heads = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(order)), 0))
        pairs.append(np.stack([order[:-1][same], order[1:][same]]))
        pairs.append(np.stack([order[heads[1:][same]], order[1:][same]]))
    found = np.unique(np.concatenate(pairs, axis=1), axis=1)
    agree = np.concatenate(
        [
            (signatures[block[0]] == signatures[block[1]]).mean(axis=1)
            for block in np.array_split(found, 1 + found.shape[1] // 2**16, axis=1)
        ]
    )
    first, second = found[:, agree >= THRESHOLD]
    return first, second
