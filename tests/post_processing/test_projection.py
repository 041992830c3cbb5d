from __future__ import annotations

import numpy as np
import pytest

from vilmedic.post_processing import projection
from vilmedic.post_processing.projection import Method, all_alike, nearest_samples, project


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projection_keeps_clusters(method: Method) -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(3, 20))
    group = np.arange(60) % 3
    x = (centres[group] + 0.1 * generator.normal(size=(60, 20))).astype(np.float32)
    scale = generator.uniform(0.1, 10, size=(60, 1)).astype(np.float32)
    points = project(x * scale, method=method, seed=0)
    assert points.shape == (60, 2)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(60) * 1e9
    assert (group[distance.argmin(axis=1)] == group).all()
    assert (project(x * scale, method=method, seed=0) == points).all()


def test_pca_keeps_the_largest_variance() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(50, 3)).astype(np.float32)
    points = project(x, method="pca", seed=0).astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    variances = np.linalg.eigvalsh(np.cov(unit.T))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[:2], rtol=1e-4)
    one = project(x[:, :1] + 5, method="pca", seed=0)
    assert one.shape == (50, 2)


def test_spread_is_zero_for_equal_features() -> None:
    assert all_alike(np.outer(np.arange(1, 5), np.ones(3)).astype(np.float32))
    assert not all_alike(np.eye(4, dtype=np.float32))


def test_neighbours_match_a_full_sort_of_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "BLOCK", 7)
    random = np.random.default_rng(0)
    one = random.standard_normal((30, 5)).astype(np.float32)
    other = random.standard_normal((30, 5)).astype(np.float32)
    for queries, targets, itself in ((one, one, False), (one, other, True)):
        index, cosine = nearest_samples(queries, targets, 4, itself=itself)
        for i in range(30):
            a = queries[i].astype(np.float64)
            b = targets.astype(np.float64)
            s = b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
            order = [int(j) for j in np.argsort(-s) if itself or j != i][:4]
            assert index[i].tolist() == order
            assert np.allclose(cosine[i], s[order], atol=1e-6)


def test_number_of_neighbours_is_limited_by_the_samples() -> None:
    x = np.eye(3, dtype=np.float32)
    index, _ = nearest_samples(x, x, 10, itself=False)
    assert index.shape == (3, 2)
