"""Slow, simple reference implementations of the losses, for tests and benchmarks.

Each follows its paper pair by pair and keeps all intermediate results. Not for training.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ntxent(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """NT-Xent as the double sum of Chen et al. 2020, equation 1.

    Args:
        first: features of one view, [B, D].
        second: features of the other view of the same images, [B, D].
        tau: temperature.

    Returns:
        Mean loss over the 2B views, scalar.
    """
    views = torch.cat([first, second])
    total, batch = len(views), len(first)
    terms = []
    for anchor in range(total):
        scores = {
            other: functional.cosine_similarity(views[anchor], views[other], dim=0) / tau
            for other in range(total)
            if other != anchor
        }
        positive = scores[(anchor + batch) % total]
        terms.append(torch.stack(list(scores.values())).exp().sum().log() - positive)
    return torch.stack(terms).mean()


def local_similarity(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    temp1: float,
    temp2: float,
    aggregation: str = "sum",
    temp0: float = 1.0,
) -> Tensor:
    """GLoRIA's local similarity, one image, one report and one word at a time.

    Args:
        regions: local image features, [I, D, N].
        words: word features, [J, L, D].
        mask: True for words that count, [J, L].
        temp1: sharpness of the attention over regions.
        temp2: sharpness of the aggregation over words.
        aggregation: `sum` or `max` over the words.
        temp0: sharpness of the choice of a region among the words.

    Returns:
        Similarities, [I, J].
    """
    rows = []
    for image in regions:
        row = []
        for report, valid in zip(words, mask, strict=True):
            kept = report[valid]
            over_words = torch.softmax(temp0 * image.T @ kept.T, dim=1)
            attention = torch.softmax(temp1 * over_words, dim=0)
            relevance = torch.stack(
                [
                    functional.cosine_similarity(word, image @ weights, dim=0, eps=1e-8)
                    for word, weights in zip(kept, attention.T, strict=True)
                ]
            )
            scores = torch.exp(temp2 * relevance)
            row.append(torch.log(scores.sum() if aggregation == "sum" else scores.max()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def cross_entropy_both_ways(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the diagonal over the rows and over the columns.

    Args:
        logits: scores of every image against every report, [B, B].

    Returns:
        The loss over images and the loss over reports, scalars.
    """
    target = torch.arange(len(logits), device=logits.device)
    return functional.cross_entropy(logits, target), functional.cross_entropy(logits.T, target)


def local_loss_report_by_report(
    regions: Tensor,
    words: Tensor,
    lengths: list[int],
    temp1: float = 4.0,
    temp2: float = 5.0,
    temp3: float = 10.0,
) -> Tensor:
    """GLoRIA's local loss as published code computes it: a loop over the reports.

    Every report is repeated for every image, the regions are transposed and copied for every
    report, and the attended context of every word in every image is materialised; autograd keeps
    all of it. It is the baseline of `benchmarks/gloria_loss.py`.

    Args:
        regions: local image features, [B, D, H, W].
        words: word features, [B, L, D].
        lengths: number of words of each report.
        temp1: sharpness of the attention over regions.
        temp2: sharpness of the aggregation over words.
        temp3: scale of the logits.

    Returns:
        Sum of the losses over images and over reports, scalar.
    """
    batch, width = regions.shape[:2]
    columns = []
    for report, length in zip(words, lengths, strict=True):
        query = report[:length].T.expand(batch, width, length).contiguous()
        context = regions.flatten(2)
        scores = torch.bmm(context.transpose(1, 2).contiguous(), query)
        over_words = torch.softmax(scores, dim=2).transpose(1, 2).contiguous()
        attention = torch.softmax(temp1 * over_words, dim=2)
        attended = torch.bmm(context, attention.transpose(1, 2).contiguous())

        query = query.transpose(1, 2).contiguous().view(batch * length, width)
        attended = attended.transpose(1, 2).contiguous().view(batch * length, width)
        norms = (query.norm(dim=1) * attended.norm(dim=1)).clamp(min=1e-8)
        relevance = ((query * attended).sum(dim=1) / norms).view(batch, length)
        columns.append(relevance.mul(temp2).exp().sum(dim=1).log())
    over_images, over_reports = cross_entropy_both_ways(temp3 * torch.stack(columns, dim=1))
    return over_images + over_reports
