"""Reference losses with several positives per pair, and targets to test them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

HASHES = torch.tensor([7, -3, 7, 2**62, 7, -3])
"""Of six reports, three are equal, two are equal and one is unique."""


def vectors(temperature: float = 0.5) -> Tensor:
    """Soft targets of six pairs, two of them similar; [6, 3], with norm 1 / sqrt(T)."""
    labels = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    rows = torch.tensor(labels, dtype=torch.float64)
    return functional.normalize(rows, dim=1) * temperature**-0.5


def agreements(targets: Tensor, temperature: float = 0.5) -> list[list[float]]:
    """Agreement of each two pairs: equal hashes, or exp(cosine - 1)."""
    if targets.ndim == 1:
        return [[float(one == other) for other in targets.tolist()] for one in targets.tolist()]
    cosines = functional.cosine_similarity(targets[:, None], targets[None], dim=2)
    return ((cosines - 1) / temperature).exp().tolist()


def slow_both_ways(logits: Tensor, agreed: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Cross-entropies of rows and columns with the normalised agreements as targets."""
    size = len(logits)
    means = []
    for scores, shares in ((logits, agreed), (logits.T, list(zip(*agreed, strict=True)))):
        total = logits.new_zeros(())
        for i in range(size):
            everything = sum(scores[i, j].exp() for j in range(size))
            for j in range(size):
                share = shares[i][j] / sum(shares[i])
                total = total - share * torch.log(scores[i, j].exp() / everything)
        means.append(total / size)
    return means[0], means[1]


def cosines(visual: Tensor, linguistic: Tensor) -> Tensor:
    """All cosines, one by one: [B, B]."""
    return torch.stack(
        [
            torch.stack([functional.cosine_similarity(v, w, dim=0) for w in linguistic])
            for v in visual
        ]
    )
