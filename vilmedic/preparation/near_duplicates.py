"""Reports that say nearly the same."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vilmedic.datasets.report_text import words

WINDOW = 3  # words that are compared as one
BANDS, ROWS = 32, 4
THRESHOLD = 0.8


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
