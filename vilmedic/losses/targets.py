"""Targets of contrastive losses: equal reports as positives, or soft targets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.config.declared import NO_ENCODER
from vilmedic.config.types import Runtime, Temperature, UsedWith
from vilmedic.datasets.aligned import REPORT_HASH, DataSpec
from vilmedic.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from vilmedic.blocks.pretrained import Filled
    from vilmedic.blocks.text import FrozenReports

log = logging.getLogger(__name__)


class Targets(nn.Module):
    """Targets of a batch, which losses compare to find further positives.

    Medical reports repeat, so that an image and the report of another sample are often no negative
    pair. The targets of a batch are a tensor with a row per pair, hashes of the reports or vectors,
    which losses compare by `vilmedic.losses.convirt.agreement`.

    Args:
        spec: the data properties: the label names, and the tokenizer.
        proto: identity makes the own report the only positive, same_text every equal one; soft
            spreads the target over all samples of the batch by how alike they are.
        by: labels compares sets of labels by their cosine, as MedCLIP does (Wang et al. 2022,
            arXiv 2210.10163); reports compares reports by their cosine under a frozen encoder.
        encoder: that of `by: reports`, the local folder or the hub name of a text encoder of
            transformers; the reports need its tokenizer. It is not trained and no checkpoint holds
            its weights: they are loaded again by this name, and have to be the same.
        temperature: of the softmax over the cosines; the lower, the more of the target is left to
            what is most alike.
        filled: given when a checkpoint fills the model; the encoder is then loaded when a loss is
            computed.
    """

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        proto: Literal["identity", "same_text", "soft"] = "soft",
        by: Annotated[Literal["labels", "reports"], UsedWith("proto", ("soft",))] = "labels",
        encoder: Annotated[str, UsedWith("by", ("reports",))] | None = None,
        temperature: Annotated[Temperature, UsedWith("proto", ("soft",))] = 0.1,
        filled: Runtime[Filled | None] = None,
    ) -> None:
        super().__init__()
        self.proto = proto
        self.by = by
        self.temperature = temperature
        self.labels = len(spec.labels)
        self.encoder = encoder
        self._spec = spec
        # Not a submodule, so that it is not in optimizer, averages, checkpoints or shards.
        self._reader: list[FrozenReports] = []
        self._told = False
        stated = (filled.config_of("targets") if filled else None) or {}
        self._sha256: str | None = stated.get("sha256")
        if self.needs != "input_ids":
            return
        if encoder is None:
            raise ArgumentError({"encoder": NO_ENCODER})
        if filled is None:
            self.load()

    @property
    def needs(self) -> str:
        """The key that the batch must hold."""
        if self.proto == "same_text":
            return REPORT_HASH
        return "labels" if self.by == "labels" else "input_ids"

    def load(self) -> None:
        """Load the frozen encoder, if there is one and it is not loaded yet.

        Raises:
            ConfigError: it is not available, or its weights are not those of the checkpoint.
        """
        if self.needs != "input_ids" or self._reader:
            return
        from vilmedic.blocks.text import FrozenReports

        assert self.encoder is not None
        try:
            reader = FrozenReports(self._spec, self.encoder)
        except ArgumentError as error:
            raise ArgumentError({"encoder": " ".join(error.arguments.values())}) from error
        if self._sha256 not in (None, reader.sha256):
            raise ArgumentError(
                {
                    "encoder": f"the weights in {self.encoder} are not those that this model was "
                    f"trained with (SHA-256 {reader.sha256[:12]}, not {self._sha256[:12]}). Put "
                    "those back, or start a new run."
                }
            )
        self._sha256 = reader.sha256
        self._reader.append(reader)

    def held_network(self) -> nn.Module | None:
        """The frozen encoder, loaded; None where there is none.

        Raises:
            ConfigError: it is not available, or its weights are not those of the checkpoint.
        """
        self.load()
        return self._reader[0] if self._reader else None

    def stated_network(self) -> dict[str, Any]:
        """Return the fields that a checkpoint holds instead of the frozen encoder's weights."""
        return {} if self._sha256 is None else {"encoder": self.encoder, "sha256": self._sha256}

    def forward(self, batch: dict[str, Any], like: Tensor) -> Tensor | None:
        """The targets of a batch: hashes int64 [B], or vectors [B, K] of the length 1 / sqrt(T).

        Args:
            batch: holds `report_hash`, `labels`, or `input_ids` and `attention_mask`.
            like: features of the batch, in whose floating-point type vectors are, float32 at least.

        Returns:
            None if the batch lacks their inputs, or in evaluation if the encoder of the reports is
            not available, which is logged once.

        Raises:
            ConfigError: it is not available in training.
        """
        if self.needs not in batch:
            return None
        if self.proto == "same_text":
            return batch[REPORT_HASH]
        wide = torch.promote_types(like.dtype, torch.float32)
        if self.by == "labels":
            known = batch.get("labels_known")
            vectors: Tensor | None = self._label_vectors(batch["labels"], known)
        else:
            vectors = self._report_vectors(batch, like.device, wide)
        if vectors is None:
            return None
        return functional.normalize(vectors.to(wide), dim=1) * self.temperature**-0.5

    def _label_vectors(self, labels: Tensor, known: Tensor | None) -> Tensor:
        """Return the labels of each sample, with a column for none, so that those are similar.

        An unknown label counts half: a sample that may have it is not one without labels.
        """
        if labels.ndim == 1:
            return labels[:, None] == torch.arange(self.labels, device=labels.device)
        if known is not None:
            labels = torch.where(known, labels, 0.5)
        none = labels.sum(1, keepdim=True) == 0
        return torch.cat([labels, none.to(labels.dtype)], dim=1)

    def _report_vectors(
        self, batch: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """Encode reports by the frozen encoder; None if it is not available in evaluation."""
        if self._told:
            return None
        try:
            self.load()
        except ConfigError as error:
            if self.training:
                raise
            log.warning("There is no loss: model.targets.%s", error)
            self._told = True
            return None
        reader = self._reader[0]
        if reader.network.device != device or reader.network.dtype != dtype:
            reader.to(device, dtype)
        return reader(batch["input_ids"], batch["attention_mask"])

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        if self.proto != "soft":
            return self.proto
        by: str = self.by
        if self.encoder is not None and by == "reports":
            folder = Path(self.encoder)
            by = f"reports under {folder.name if folder.is_absolute() else self.encoder}"
        return f"soft, by {by}, temperature {self.temperature:g}"
