"""The nearest samples of each sample, by the features themselves rather than by their map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]
BLOCK = 1024


def nearest_samples(
    queries: Features, targets: Features, count: int, *, itself: bool
) -> tuple[NDArray[np.int64], Features]:
    """The samples whose targets are nearest to each query by cosine similarity.

    Args:
        queries: [N, D].
        targets: [N, D], of the same samples.
        count: how many, at most.
        itself: whether a sample may be its own neighbour, which tells whether a pair was found.

    Returns:
        Sample numbers and cosines, nearest first, both [N, k].
    """
    one, other = unit(queries), unit(targets)
    k = min(count, len(other) - (0 if itself else 1))
    index = np.empty((len(one), k), dtype=np.int64)
    cosine = np.empty((len(one), k), dtype=np.float32)
    for start in range(0, len(one), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(one)))
        similarity = one[rows] @ other.T
        if not itself:
            similarity[np.arange(len(rows)), rows] = -np.inf
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1, kind="stable")
        index[rows] = np.take_along_axis(top, order, axis=1)
        cosine[rows] = np.take_along_axis(similarity, index[rows], axis=1)
    return index, cosine


def unit(features: Features) -> Features:
    """Features scaled to length 1."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: Features = (features / np.maximum(norms, 1e-12)).astype(np.float32)
    return scaled
