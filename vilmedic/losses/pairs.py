"""Cross-entropy of matched pairs both ways, of which one process may have only some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.distributed.gather import Part


def cross_entropy_both_ways(similarity: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Rank the partner of each sample of one kind among all of the other kind, and the other way.

    A column is spread over the processes; of each, its process is sent the logarithm of a sum of
    exponentials by every other: one number a sample and process.

    Args:
        similarity: scaled similarities of the own samples of one kind to all of the other kind,
            [own, total]; those of matched pairs are on the diagonal of [total, total].
        part: which samples of the batch the rows are.

    Returns:
        The terms of the rows and those of the columns; scalars whose averages over the processes
        are the means over the whole batch.
    """
    target = part.places(similarity)
    if part.alone:
        return (
            functional.cross_entropy(similarity, target),
            functional.cross_entropy(similarity.T, target),
        )
    rows = functional.cross_entropy(similarity, target, reduction="none")
    matched = similarity.gather(1, target.unsqueeze(1)).squeeze(1)
    columns = part.swap(torch.logsumexp(similarity, 0)).logsumexp(0) - matched
    return part.mean(rows), part.mean(columns)
