"""Contrast of matched pairs, of which one process may have only some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.distributed.gather import Part


def contrast_pairs(
    first: Tensor, second: Tensor, scale: float, part: Part
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of this process's pairs among those of all processes, both ways.

    Args:
        first: normalised embeddings of one kind, own ones, [own, D].
        second: normalised embeddings of the other kind, in the same order.
        scale: factor on the cosine similarities.
        part: which pairs of the batch these are.

    Returns:
        The terms that rank `second` for each of `first`, and the other way round; scalars whose
        averages over the processes are the means over the whole batch.
    """
    target = part.places(first.device)
    forth = scale * first @ part.gather(second).T
    back = scale * second @ part.gather(first).T
    return (
        part.mean(functional.cross_entropy(forth, target, reduction="none")),
        part.mean(functional.cross_entropy(back, target, reduction="none")),
    )


def contrast_rows(similarity: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Cross-entropy both ways from the similarities of own samples to all of the batch.

    The own samples are rows. A column is spread over the processes; of each, its process is sent
    the logarithm of a sum of exponentials by every other: one number a sample and process.

    Args:
        similarity: own samples of one kind against all of the other kind, [own, total].
        part: which samples of the batch the rows are.

    Returns:
        The terms of the rows and those of the columns of the own samples; scalars as above.
    """
    target = part.places(similarity.device)
    rows = functional.cross_entropy(similarity, target, reduction="none")
    matched = similarity.gather(1, target.unsqueeze(1)).squeeze(1)
    columns = part.swap(torch.logsumexp(similarity, 0)).logsumexp(0) - matched
    return part.mean(rows), part.mean(columns)
