"""Projection of features to two dimensions (UMAP, t-SNE, PCA), and nearest neighbours."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["umap", "tsne", "pca"]
NAMES = {"umap": "UMAP", "tsne": "t-SNE", "pca": "PCA"}
FEWEST = 3
FEW = 100  # samples below which neighbourhoods are too small for UMAP

BLOCK = 1024  # rows of cosines held at a time

Features = NDArray[np.float32]
Points = NDArray[np.float32]


def fitting_method(method: Method | None, samples: int) -> Method:
    """Return the given method; by default UMAP, or PCA below a hundred samples."""
    return method or ("umap" if samples >= FEW else "pca")


def project(features: Features, *, method: Method, seed: int) -> Points:
    """Place samples in the plane so that neighbours by cosine similarity stay neighbours.

    UMAP (McInnes et al. 2018) with 15 neighbours or as many as there are, t-SNE (van der Maaten
    and Hinton 2008) with perplexity 30 or a third of the samples, or the first two principal
    components of the normalised features. The same seed gives the same map.

    Args:
        features: [N, D] with N at least 3.
        method: `umap`, `tsne` or `pca`.
        seed: seed of UMAP and t-SNE.

    Returns:
        Coordinates [N, 2].
    """
    unit = _unit(features)
    with warnings.catch_warnings():
        # Both warn about small or partly disconnected data; the map is still drawn.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        if method == "umap":
            points = _umap(unit, seed)
        elif method == "tsne":
            points = _tsne(unit, seed)
        else:
            points = _pca(unit)
    return points.astype(np.float32)


def nearest_samples(
    queries: Features, targets: Features, count: int, *, itself: bool
) -> tuple[NDArray[np.int64], Features]:
    """The samples whose targets are nearest to each query by cosine similarity.

    Args:
        queries: [N, D].
        targets: [N, D], of the same samples.
        count: how many, at most.
        itself: whether a sample may be its own neighbour, which shows whether its pair was found.

    Returns:
        Sample numbers and cosines, nearest first, both [N, k].
    """
    one, other = _unit(queries), _unit(targets)
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


def all_alike(features: Features) -> bool:
    """Return whether the normalised features [N, D] of all samples are equal.

    They count as equal if no feature has a standard deviation of 1e-6 or more; no map can then
    show anything.
    """
    return bool(_unit(features).std(axis=0).max() < 1e-6)


def _unit(features: Features) -> Features:
    """Features scaled to length 1."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: Features = (features / np.maximum(norms, 1e-12)).astype(np.float32)
    return scaled


def _umap(unit: NDArray[np.float32], seed: int) -> Points:
    # Imported here: umap compiles on import, which takes seconds.
    from umap import UMAP

    reducer = UMAP(
        n_neighbors=min(15, len(unit) - 1),
        metric="cosine",
        # The spectral start needs more samples than it has eigenvectors to find.
        init="spectral" if len(unit) >= 15 else "random",
        random_state=seed,
        n_jobs=1,
    )
    return np.asarray(reducer.fit_transform(unit))


def _tsne(unit: NDArray[np.float32], seed: int) -> Points:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(unit) - 1) / 3)
    start = _pca(unit)
    start = start / start[:, 0].std() * 1e-4
    reducer = TSNE(perplexity=perplexity, metric="cosine", init=start, random_state=seed, n_jobs=1)
    # Several threads add up the same forces in any order, and the map changes.
    with threadpool_limits(1):
        return np.asarray(reducer.fit_transform(unit))


def _pca(unit: NDArray[np.float32]) -> Points:
    centred = (unit - unit.mean(axis=0)).astype(np.float64)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    axes = min(2, len(s))
    # The sign of a component is arbitrary; the largest weight is made positive.
    signs = np.sign(vt[np.arange(axes), np.abs(vt[:axes]).argmax(axis=1)])
    points = u[:, :axes] * s[:axes] * signs
    return np.pad(points, ((0, 0), (0, 2 - axes)))
