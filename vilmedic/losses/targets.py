"""Targets of contrastive losses: equal reports as positives, or soft targets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.types import Runtime, Temperature, UsedWith
from vilmedic.datasets.aligned import REPORT_HASH, DataSpec


class Targets(nn.Module):
    """What of each pair of a batch is compared to find further positives.

    Medical reports repeat, so that many a pair of an image and the report of another sample is no
    negative. The targets of a batch are a tensor with a row for each pair, which losses compare by
    `vilmedic.losses.convirt.agreement`: hashes of the reports, or vectors.

    Args:
        spec: the data properties: the label names.
        proto: identity makes the own report the only positive, same_text every equal one; soft
            spreads the target over all samples of the batch by how alike they are.
        by: labels compares sets of labels by their cosine, as MedCLIP does (Wang et al. 2022,
            arXiv 2210.10163).
        temperature: of the softmax over the cosines; the lower, the more of the target is left to
            what is most alike.
    """

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        proto: Literal["identity", "same_text", "soft"] = "soft",
        by: Annotated[Literal["labels"], UsedWith("proto", ("soft",))] = "labels",
        temperature: Annotated[Temperature, UsedWith("proto", ("soft",))] = 0.1,
    ) -> None:
        super().__init__()
        self.proto = proto
        self.by = by
        self.temperature = temperature
        self.labels = len(spec.labels)

    @property
    def needs(self) -> str:
        """What the batch has to hold."""
        return REPORT_HASH if self.proto == "same_text" else "labels"

    def forward(self, batch: dict[str, Any], like: Tensor) -> Tensor | None:
        """The targets of a batch: hashes int64 [B], or vectors [B, K] of the length 1 / sqrt(T).

        Args:
            batch: holds `report_hash` or `labels`.
            like: features of the batch, in whose floating-point type vectors are, float32 at least.

        Returns:
            None when the batch lacks what they are made of.
        """
        if self.needs not in batch:
            return None
        if self.proto == "same_text":
            return batch[REPORT_HASH]
        vectors = self._label_vectors(batch["labels"], batch.get("labels_known"))
        vectors = vectors.to(torch.promote_types(like.dtype, torch.float32))
        return functional.normalize(vectors, dim=1) * self.temperature**-0.5

    def _label_vectors(self, labels: Tensor, known: Tensor | None) -> Tensor:
        """The labels of each sample, and whether it has none, so that such ones are alike.

        A label that is unknown counts half: a sample that may have it is not one without labels.
        """
        if labels.ndim == 1:
            return labels[:, None] == torch.arange(self.labels, device=labels.device)
        if known is not None:
            labels = torch.where(known, labels, 0.5)
        none = labels.sum(1, keepdim=True) == 0
        return torch.cat([labels, none.to(labels.dtype)], dim=1)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        if self.proto != "soft":
            return self.proto
        return f"soft, by {self.by}, temperature {self.temperature:g}"
