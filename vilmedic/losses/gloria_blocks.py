"""One block of GLoRIA's local similarity: some images against some reports of similar length."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vilmedic.blocks.linear import linear

Aggregation = Literal["sum", "max"]

EPS = 1e-8
MASKED = -1e30  # finite, so that zero attention times a masked score is zero and not nan
_REPORTS_PER_BLOCK = 16  # few enough that reports of similar length share a block
_PAIRS_PER_BLOCK = 512  # on an accelerator; on a CPU one image at a time stays in the cache


class Settings(NamedTuple):
    """What a similarity is computed with, tensors apart."""

    temp0: float
    temp1: float
    temp2: float
    aggregation: Aggregation
    block_size: int
    lengths: list[int]  # place of the last word of each report, counted from one
    counts: list[int]  # number of words of each report


class Reports(NamedTuple):
    """Reports of similar length, cut to the longest of them."""

    places: Tensor  # [J], their places in the batch
    words: Tensor  # [J * L, D], times temp0: the cosines do not depend on their lengths
    norms: Tensor  # [J, L], of the words, at least EPS; 1 where none counts
    mask: Tensor  # [J, L]
    padded: bool  # whether any of the mask is False


def group_reports(words: Tensor, mask: Tensor, settings: Settings, size: int) -> list[Reports]:
    """Sorts the reports by length, so that little of each block is padding."""
    lengths, counts = settings.lengths, settings.counts
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = []
    for start in range(0, len(order), size):
        members = order[start : start + size]
        longest = lengths[members[-1]]
        index = torch.tensor(members, device=words.device)
        rows = words[index, :longest] * settings.temp0
        norms = torch.linalg.vector_norm(rows, dim=2).clamp(min=EPS)
        # Their scores are MASKED: divided by the norm of an empty vector they would be infinite.
        norms = norms.masked_fill(~mask[index, :longest], 1.0)
        padded = any(counts[member] < longest for member in members)
        groups.append(Reports(index, rows.flatten(0, 1), norms, mask[index, :longest], padded))
    return groups


def block_shape(block_size: int, device: torch.device) -> tuple[int, int]:
    """Numbers of reports and of images that are computed at once."""
    reports = min(block_size, _REPORTS_PER_BLOCK)
    if device.type == "cpu":
        return reports, 1
    return reports, min(block_size, _PAIRS_PER_BLOCK) // reports


def compute_block(
    images: Tensor, gram: Tensor, reports: Reports, temp1: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, attention times Gram matrix, softmax over the words and attention."""
    words = reports.words.expand(len(images), -1, -1)
    scores = multiply(words, images).view(len(images), *reports.mask.shape, -1)
    if reports.padded:
        scores.masked_fill_(~reports.mask.unsqueeze(2), MASKED)
    over_words, attention = attend(scores, temp1)
    projected = multiply(attention.flatten(1, 2), gram).view_as(scores)
    return scores, projected, over_words, attention


def attend(scores: Tensor, temp1: float) -> tuple[Tensor, Tensor]:
    """Softmax over the words, and the attention over the regions that it sharpens."""
    over_words = torch.softmax(scores, dim=-2)
    return over_words, torch.softmax(over_words * temp1, dim=-1)


def cosine_of(
    attention: Tensor, scores: Tensor, projected: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine of each word with its attended context, and the norm of the context."""
    dots = torch.linalg.vecdot(attention, scores)
    squares = torch.linalg.vecdot(attention, projected)
    context = squares.clamp(min=0).sqrt().clamp(min=EPS)
    return dots / (norms * context), context


def logits_of(cosine: Tensor, reports: Reports, temp2: float) -> Tensor:
    """Scaled cosines, minus infinity for words that do not count."""
    return (cosine * temp2).masked_fill(~reports.mask, -torch.inf)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product, [I, M, K] times [I, K, N]."""
    if len(right) > 1:
        return torch.bmm(left, right)
    return linear(left[0], right[0].mT, None)[None]  # faster than `bmm` on a processor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the tensors, but float32 where that is a half-precision one."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
