"""The contrastive loss of SimCLR (Chen et al. 2020, arXiv 2002.05709)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Temperature
from vilmedic.distributed.gather import WHOLE, Part


def ntxent_loss(first: Tensor, second: Tensor, tau: float, part: Part = WHOLE) -> Tensor:
    """Normalised, temperature-scaled cross-entropy between two views of a batch of images.

    With s_ij the cosine similarity of views i and j, the term of a view i whose other view is j is

        -log(exp(s_ij / tau) / sum over k != i of exp(s_ik / tau))

    (equation 1), averaged over all 2B views. One [2B, 2B] tensor is kept for backward and no mask:
    the diagonal of the similarities is overwritten. Half precision is widened to float32, under
    autocast as well.

    Args:
        first: embeddings of one view of each image, [B, D], of any length.
        second: embeddings of the other view, [B, D], in the same order.
        tau: temperature, above 0.
        part: which images of a batch that is spread over processes these are; the others are
            gathered, and the average of the result over the processes is that of the batch.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if the shapes differ, the batch holds fewer than two images or tau is not
            above 0.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            "ntxent_loss takes two tensors [B, D] of the same shape, "
            f"not {list(first.shape)} and {list(second.shape)}."
        )
    size = part.count(first)
    if size < 2:
        raise ValueError(
            f"ntxent_loss was given a batch of {size} and needs at least two images: the "
            "views of the other images are what each view is contrasted with. Raise the batch "
            "size or drop a last batch of one."
        )
    if not tau > 0:
        raise ValueError(f"ntxent_loss takes a tau above 0, not {tau}.")
    wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        one = functional.normalize(first.to(wide), dim=1)
        other = functional.normalize(second.to(wide), dim=1)
        views = torch.cat([one, other])
        everything = views if part.alone else torch.cat([part.gather(one), part.gather(other)])
        logits = (views / tau) @ everything.T
        itself = torch.cat([part.places(one), part.places(other) + size])
        logits.scatter_(1, itself.unsqueeze(1), -torch.inf)
        # Both views of an image have the same positive, so the mean over B is that over 2B.
        positives = (one * other).sum(1) / tau
        return part.mean(logits.logsumexp(1), each=2) - part.mean(positives)


class NTXentLoss(nn.Module):
    """`ntxent_loss` with its setting.

    Args:
        tau: temperature that divides the cosine similarities.
    """

    def __init__(self, *, tau: Temperature = 0.5) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, first: Tensor, second: Tensor, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss.

        Args:
            first: embeddings of one view of each image, [B, D].
            second: embeddings of the other view, [B, D].
            part: see `ntxent_loss`.

        Returns:
            The scalar `loss`.
        """
        return {"loss": ntxent_loss(first, second, self.tau, part)}

    def chance_loss(self, size: int) -> float:
        """ln(2B - 1): each view is contrasted with all others except itself."""
        return math.log(2 * size - 1)

    def extra_repr(self) -> str:
        """The setting, as `print(model)` shows it."""
        return f"tau={self.tau}"
