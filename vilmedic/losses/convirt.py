"""The bidirectional contrastive loss of ConVIRT (Zhang et al. 2020, arXiv 2010.00747)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Share, Temperature
from vilmedic.distributed.gather import WHOLE, Part


def convirt_loss(
    visual: Tensor,
    linguistic: Tensor,
    tau: float | Tensor,
    lambda_: float,
    part: Part = WHOLE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Contrast every image with every report of the batch, and every report with every image.

    With s_ij the cosine similarity of image i and report j, the image-to-text term (equation 2) is
    the cross-entropy of s_i. / tau with target i, the text-to-image term (equation 3) that of
    s_.i / tau, both averaged over the batch; the loss (equation 4) weighs them with lambda_ and
    1 - lambda_. Half precision is widened to float32, under autocast as well: at tau = 0.1 the
    rounding of bfloat16 would be as large as the differences that are learned.

    Args:
        visual: embeddings of the images, [B, D], of any length.
        linguistic: embeddings of their reports, [B, D], in the same order.
        tau: temperature, above 0; a scalar tensor if it is learned.
        lambda_: weight of the image-to-text term, from 0 to 1.
        part: which pairs of a batch that is spread over processes these are; the others are
            gathered, and the averages of the results over the processes are those of the batch.

    Returns:
        The loss, the image-to-text term and the text-to-image term, three scalars.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    check_pairs("convirt_loss", visual, linguistic, part)
    wide = torch.promote_types(visual.dtype, torch.float32)
    with torch.autocast(visual.device.type, enabled=False):
        images = functional.normalize(visual.to(wide), dim=1)
        reports = functional.normalize(linguistic.to(wide), dim=1)
        logits = images @ part.gather(reports).T / tau
        image_to_text, text_to_image = cross_entropy_both_ways(logits, part)
        loss = lambda_ * image_to_text + (1 - lambda_) * text_to_image
    return loss, image_to_text, text_to_image


class ConVIRTLoss(nn.Module):
    """`convirt_loss` with its settings.

    Args:
        tau: temperature that divides the cosine similarities.
        lambda_: weight of the image-to-text term; the text-to-image term gets the rest.
    """

    def __init__(self, *, tau: Temperature = 0.1, lambda_: Share = 0.75) -> None:
        super().__init__()
        self.tau = tau
        self.lambda_ = lambda_

    def forward(self, visual: Tensor, linguistic: Tensor, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss and its two terms.

        Args:
            visual: embeddings of the images, [B, D].
            linguistic: embeddings of the reports, [B, D].
            part: see `convirt_loss`.

        Returns:
            Scalars `loss`, and without gradient `image_to_text` and `text_to_image`.
        """
        loss, image_to_text, text_to_image = convirt_loss(
            visual, linguistic, self.tau, self.lambda_, part
        )
        return {
            "loss": loss,
            "image_to_text": image_to_text.detach(),
            "text_to_image": text_to_image.detach(),
        }

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return f"tau={self.tau}, lambda_={self.lambda_}"


def check_pairs(name: str, first: Tensor, second: Tensor, part: Part = WHOLE) -> None:
    """Check that the inputs are a batch of pairs.

    Args:
        name: the loss, for messages.
        first: one side of each pair, [B, D].
        second: the other side, [B, D].
        part: which pairs of a batch that is spread over processes these are.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"{name} takes two tensors [B, D] of the same shape, "
            f"not {list(first.shape)} and {list(second.shape)}."
        )
    if part.count(first) < 2:
        raise ValueError(
            f"{name} needs at least two pairs in a batch, because the other pairs are what each "
            "one is compared with: raise the batch size or drop a last batch of one."
        )


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
