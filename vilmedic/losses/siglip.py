"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Between, Temperature
from vilmedic.device import block_numbers
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.losses.convirt import BLOCK, agreement, check_pairs, row_blocks, several_positives
from vilmedic.losses.learned import LearnedLoss


def siglip_loss(
    visual: Tensor,
    linguistic: Tensor,
    temperature: Tensor,
    bias: Tensor,
    part: Part = WHOLE,
    *,
    targets: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Classify every image and report of the batch as a pair or not.

    With s_ij the cosine similarity of image i and report j, and z_ij 1 for a pair and -1 otherwise,

        -1 / B * sum over i and j of log sigmoid(z_ij * (s_ij / temperature + bias))

    (section 3.2; algorithm 1). The terms are independent, so that logits are computed block by
    block, and with several processes each holds the reports of one other at a time; the backward
    pass computes them again. Half precision is widened to float32, under autocast as well.

    With `targets`, z_ij is 1 for all samples that agree, such as those with equal reports. Where
    the `agreement` p_ij is between 0 and 1, the term is the cross-entropy with this share,

        p_ij * log sigmoid(x_ij) + (1 - p_ij) * log sigmoid(-x_ij)

    with x_ij = s_ij / temperature + bias.

    Args:
        visual: embeddings of the images, [B, D], of any length.
        linguistic: embeddings of their reports, [B, D], in the same order.
        temperature: divides the similarities, a scalar above 0.
        bias: added to the logits, a scalar.
        part: which pairs of a batch that is spread over processes these are; the average of the
            result over the processes is that of the batch.
        targets: what `agreement` compares of each pair, [B] or [B, K]; None makes each report the
            positive of its own image alone.
        block: largest number of logits per block; None takes a size for the device.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    check_pairs("siglip_loss", visual, linguistic, part)
    wide = torch.promote_types(torch.promote_types(visual.dtype, linguistic.dtype), torch.float32)
    with torch.autocast(visual.device.type, enabled=False):
        images = functional.normalize(visual.to(wide), dim=1)
        reports = functional.normalize(linguistic.to(wide), dim=1)
        scale = 1 / temperature.to(wide)
        numbers = block or block_numbers(visual.device, BLOCK)
        loss: Tensor = _PairwiseSigmoid.apply(
            images, reports, scale, bias.to(wide), targets, part, numbers
        )
    return loss


class SigLIPLoss(LearnedLoss):
    """`siglip_loss` with a learned scale and bias.

    The logarithm of the scale is learned. The initial bias classifies nearly all pairs as negative,
    as nearly all are.

    Args:
        scale: factor on the cosine similarities to start with.
        bias: what is added to the logits to start with.
    """

    learns: ClassVar[tuple[str, ...]] = ("temperature", "bias")

    def __init__(
        self, *, scale: Temperature = 10.0, bias: Annotated[float, Between(-1000, 1000)] = -10.0
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = nn.Parameter(torch.tensor([float(bias)]))

    def learned(self) -> dict[str, Tensor]:
        """The scalars `temperature`, which is one over the scale, and `bias`."""
        return {"temperature": (-self.log_scale).exp().sum(), "bias": self.bias.sum()}

    def forward(
        self,
        visual: Tensor,
        linguistic: Tensor,
        part: Part = WHOLE,
        temperature: Tensor | None = None,
        bias: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss.

        Args:
            visual: embeddings of the images, [B, D].
            linguistic: embeddings of the reports, or of other views of the images, [B, D].
            part: see `siglip_loss`.
            temperature: what `learned` gave.
            bias: what `learned` gave.
            targets: see `siglip_loss`.

        Returns:
            Scalars `loss`, and without gradient `bias`, and with targets what `several_positives`
            gives.
        """
        own = self.learned() if temperature is None or bias is None else {}
        temperature = own["temperature"] if temperature is None else temperature
        bias = own["bias"] if bias is None else bias
        loss = siglip_loss(visual, linguistic, temperature, bias, part, targets=targets)
        return {"loss": loss, "bias": bias.detach(), **several_positives(targets, part)}

    def chance_loss(self, size: int) -> float:
        """Return the lowest loss of constant logits: those of a sigmoid of 1 / B.

        It is ln(B) + (B - 1) ln(B / (B - 1)), about one above that of a cross-entropy.
        """
        return math.log(size) + (size - 1) * math.log(size / (size - 1))


class _PairwiseSigmoid(torch.autograd.Function):
    """The loss of normalised embeddings, which alone are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        reports: Tensor,
        scale: Tensor,
        bias: Tensor,
        targets: Tensor | None,
        part: Part,
        numbers: int,
    ) -> Tensor:
        if targets is not None:
            numbers = max(1, numbers // 2)  # each block of logits has a block of agreements
        ctx.part, ctx.numbers = part, numbers
        ctx.save_for_backward(images, reports, scale, bias, targets)
        terms = images.new_zeros(len(images))
        for rank, (piece, theirs) in enumerate(_pieces(reports, targets, part)):
            for start, rows in row_blocks(images, piece, numbers):
                own = slice(start, start + len(rows))
                logits = torch.addmm(bias, rows * scale, piece.T)
                if targets is None or theirs is None:
                    _turn_pairs(logits, rank, start, part)
                else:
                    agreed = agreement(targets[own], theirs, logits.dtype)
                    terms[own] -= agreed.mul_(logits).sum(1)
                terms[own] -= functional.logsigmoid(-logits).sum(1)
        return part.mean(terms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        images, reports, scale, bias, targets = ctx.saved_tensors
        part: Part = ctx.part
        # The weight of a term in the mean is the gradient of `Part.mean`.
        world, total = max(1, len(part.sizes)), part.count(images)
        share = gradients[0] * (world / total)
        grad_images, grad_reports = torch.zeros_like(images), torch.zeros_like(reports)
        grad_bias = torch.zeros_like(bias)
        for rank, (piece, theirs) in enumerate(_pieces(reports, targets, part)):
            grad_piece = torch.zeros_like(piece)
            for start, rows in row_blocks(images, piece, ctx.numbers):
                own = slice(start, start + len(rows))
                slope = torch.addmm(bias, rows * scale, piece.T)
                if targets is None or theirs is None:
                    _turn_pairs(slope, rank, start, part)
                    slope.sigmoid_()
                    _turn_pairs(slope, rank, start, part)
                else:
                    slope.sigmoid_().sub_(agreement(targets[own], theirs, slope.dtype))
                slope *= share
                grad_bias += slope.sum()
                grad_images[own].addmm_(slope, piece)
                grad_piece.addmm_(slope.T, rows)
            grad_piece = part.add_up(grad_piece, rank)
            if part.alone or rank == part.rank:
                grad_reports = grad_piece
        grad_scale = (grad_images * images).sum()  # sum of gradients times similarities
        return grad_images * scale, grad_reports * scale, grad_scale, grad_bias, None, None, None


def _pieces(
    reports: Tensor, targets: Tensor | None, part: Part
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The reports of each process in turn, and their targets."""
    if targets is None:
        for piece in part.pieces(reports):
            yield piece, None
    else:
        yield from zip(part.pieces(reports), part.pieces(targets), strict=True)


def _turn_pairs(logits: Tensor, rank: int, start: int, part: Part) -> None:
    """Negate the terms of pairs, which are of a process's images and its own reports."""
    if part.alone or rank == part.rank:
        logits.diagonal(start).neg_()
