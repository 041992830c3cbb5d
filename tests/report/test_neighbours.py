from __future__ import annotations

import numpy as np
import pytest

from vilmedic.report import neighbours
from vilmedic.report.neighbours import nearest_samples


def test_against_a_sort_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 7)
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


def test_no_more_neighbours_than_there_are() -> None:
    x = np.eye(3, dtype=np.float32)
    index, _ = nearest_samples(x, x, 10, itself=False)
    assert index.shape == (3, 2)
