"""The global and local contrastive losses of GLoRIA (Huang et al. 2021, ICCV)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Between, Temperature, Weight
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.errors import ArgumentError
from vilmedic.losses.convirt import cross_entropy_both_ways, several_positives
from vilmedic.losses.gloria_local import local_similarity


def gloria_global_loss(
    visual: Tensor,
    linguistic: Tensor,
    temp3: float,
    part: Part = WHOLE,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrastive loss of whole images and whole reports.

    Half precision is widened to float32, under autocast as well.

    Args:
        visual: features of the images, [B, D].
        linguistic: features of their reports, [B, D], in the same order.
        temp3: scale of the cosine similarities.
        part: which pairs of a batch that is spread over processes these are; the others are
            gathered, and the averages of the results over the processes are those of the batch.
        targets: what `agreement` compares of each pair, [B] or [B, K]; None makes each report the
            positive of its own image alone. The terms are those of `convirt_loss`.

    Returns:
        The image-to-text and the text-to-image term, scalars.

    Raises:
        ValueError: if the shapes differ, or the batch holds fewer than two pairs.
    """
    if visual.ndim != 2 or visual.shape != linguistic.shape:
        raise ValueError(
            "gloria_global_loss takes two tensors [B, D] of the same shape, "
            f"not {list(visual.shape)} and {list(linguistic.shape)}."
        )
    _check_pairs(visual, linguistic, part)
    wide = torch.promote_types(torch.promote_types(visual.dtype, linguistic.dtype), torch.float32)
    with torch.autocast(visual.device.type, enabled=False):
        images = functional.normalize(visual.to(wide), dim=1, eps=1e-8)
        reports = functional.normalize(linguistic.to(wide), dim=1, eps=1e-8)
        return cross_entropy_both_ways(temp3 * images @ part.gather(reports).T, part, targets)


def gloria_local_loss(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    *,
    temp0: Temperature = 1.0,
    temp1: float,
    temp2: float,
    temp3: float,
    block_size: int = 4096,
    part: Part = WHOLE,
    word_counts: list[int] | None = None,
    region_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrastive loss of image regions and report words.

    Args:
        regions: local image features, [B, D, H, W] or [B, D, N]; of K images per sample together
            [B, D, K, H, W].
        words: word features, [B, L, D], in the same order.
        mask: True where a word counts, bool [B, L].
        temp0: sharpness of the softmax of a region over the words.
        temp1: sharpness of the attention over the regions.
        temp2: sharpness of the aggregation over the words.
        temp3: scale of the similarities.
        block_size: number of image-report pairs whose attention may be held in memory.
        part: which pairs of a batch that is spread over processes these are; the others are
            gathered, and the averages of the results over the processes are those of the batch.
            Words are exchanged rather than regions: a report has fewer words than an image has
            regions.
        word_counts: see `local_similarity`; those of the own reports.
        region_mask: see `local_similarity`.

    Returns:
        The image-to-text and the text-to-image term, scalars.

    Raises:
        ValueError: if the shapes do not fit, or the batch holds fewer than two pairs.
    """
    _check_pairs(regions, words, part)
    known = {} if word_counts is None else {"counts": word_counts}
    everything = part.gather_features({"words": words, "mask": mask, **known})
    similarity = local_similarity(
        regions,
        everything["words"],
        everything["mask"],
        temp0=temp0,
        temp1=temp1,
        temp2=temp2,
        block_size=block_size,
        word_counts=everything.get("counts"),
        region_mask=region_mask,
    )
    with torch.autocast(similarity.device.type, enabled=False):
        return cross_entropy_both_ways(temp3 * similarity, part)


class GLoRIALoss(nn.Module):
    """Weighted sum of the two local and the two global terms.

    Args:
        local_loss_weight: weight of the two local terms.
        global_loss_weight: weight of the two global terms.
        temp0: sharpness of the choice that a region makes among the words; 1 as published. With
            encoders that start from random weights the products of words and regions are so large
            that one word, mostly the opening token, takes every region, and no other word learns
            where to look; a few hundredths let them share.
        temp1: sharpness of the attention of a word over the image regions.
        temp2: sharpness of the aggregation over the words of a report.
        temp3: scale of the similarities that are contrasted.
        block_size: number of image-report pairs whose attention may be held in memory at once;
            smaller needs less memory, larger computes less of it twice.
    """

    def __init__(
        self,
        *,
        local_loss_weight: Weight = 1.0,
        global_loss_weight: Weight = 1.0,
        temp0: Temperature = 1.0,
        temp1: Temperature = 4.0,
        temp2: Temperature = 5.0,
        temp3: Temperature = 10.0,
        block_size: Annotated[int, Between(1, 16777216)] = 4096,
    ) -> None:
        super().__init__()
        if local_loss_weight == global_loss_weight == 0:
            raise ArgumentError({"": "local_loss_weight and global_loss_weight are both 0."})
        self.local_loss_weight = local_loss_weight
        self.global_loss_weight = global_loss_weight
        self.temp0 = temp0
        self.temp1 = temp1
        self.temp2 = temp2
        self.temp3 = temp3
        self.block_size = block_size

    def forward(
        self,
        regions: Tensor,
        words: Tensor,
        word_mask: Tensor,
        visual: Tensor,
        linguistic: Tensor,
        part: Part = WHOLE,
        word_counts: list[int] | None = None,
        targets: Tensor | None = None,
        region_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss and its four terms.

        Args:
            regions: local image features, [B, D, H, W], [B, D, N] or [B, D, K, H, W].
            words: word features, [B, L, D].
            word_mask: True for the opening token and every word, False for the closing token and
                padding, bool [B, L].
            visual: global image features, [B, D].
            linguistic: report features, [B, D].
            part: see `gloria_local_loss`.
            word_counts: see `gloria_local_loss`.
            targets: further positives of the global terms: see `gloria_global_loss`. The local
                terms compare words with regions, and keep to each report's own image.
            region_mask: see `gloria_local_loss`.

        Returns:
            Scalars: `loss`, and without gradient and unweighted `local_image_to_text`,
            `local_text_to_image`, `global_image_to_text` and `global_text_to_image`, and with
            targets what `several_positives` gives.
        """
        local_terms = gloria_local_loss(
            regions,
            words,
            word_mask,
            temp0=self.temp0,
            temp1=self.temp1,
            temp2=self.temp2,
            temp3=self.temp3,
            block_size=self.block_size,
            part=part,
            word_counts=word_counts,
            region_mask=region_mask,
        )
        global_terms = gloria_global_loss(visual, linguistic, self.temp3, part, targets)
        local = local_terms[0] + local_terms[1]
        whole = global_terms[0] + global_terms[1]
        loss = self.local_loss_weight * local + self.global_loss_weight * whole
        return {
            "loss": loss,
            "local_image_to_text": local_terms[0].detach(),
            "local_text_to_image": local_terms[1].detach(),
            "global_image_to_text": global_terms[0].detach(),
            "global_text_to_image": global_terms[1].detach(),
            **several_positives(targets, part),
        }

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"local_loss_weight={self.local_loss_weight}, "
            f"global_loss_weight={self.global_loss_weight}, temp0={self.temp0}, "
            f"temp1={self.temp1}, temp2={self.temp2}, temp3={self.temp3}, "
            f"block_size={self.block_size}"
        )


def _check_pairs(images: Tensor, reports: Tensor, part: Part) -> None:
    if len(images) != len(reports):
        raise ValueError(
            f"Given {len(images)} images and {len(reports)} reports; each image is contrasted with "
            "the reports of the others, so give one report for each image, in the same order."
        )
    total = part.count(images)
    if total < 2:
        raise ValueError(
            f"Given a batch of {total}; a contrastive loss needs at least two pairs, because the "
            "other pairs are what each one is contrasted with. Raise the batch size or drop a "
            "last batch of one."
        )
