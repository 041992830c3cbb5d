"""Classifier: an image encoder, pretrained or not, fine-tuned on labels."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.types import (
    Above,
    AtMost,
    Dropout,
    Portion,
    Runtime,
    UsedWith,
    Weight,
    Width,
)
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import ArgumentError, ConfigError, nearest
from vilmedic.models.contract import (
    LOGITS,
    Batch,
    Model,
    Tower,
    visual_backbone,
    visual_tower,
)

Rate = Annotated[float, Above(0), AtMost(1000)]


class Classifier(Model):
    """An image encoder and a head that predicts the labels of an image.

    With several labels per sample, each is a binary task of its own (binary cross-entropy); with
    one, the classes exclude each other (cross-entropy). The loss is the mean over the samples of a
    batch and, with several labels, over the classes; a label that is unknown adds nothing to it.

    Args:
        spec: data properties: tokenizer, label names, normalisation.
        cnn: the image encoder; its output is averaged over positions if it has several. Its
            `pretrained` says where its weights come from: another run, a file, or ImageNet.
        hidden: width of a hidden layer of the head; null makes the head one linear layer.
        dropout: dropout in front of the last layer of the head.
        freeze: what of the encoder is kept as it is, batch statistics included: all of it (linear
            probing), none, or everything up to the end of a layer, such as layer2.
        encoder_lr: learning rate of the encoder; null takes trainor.optim_params.lr.
        head_lr: learning rate of the head; null takes trainor.optim_params.lr.
        layer_decay: factor of the learning rate from each block of the encoder to the one before
            it (0.75, say); the last block has that of the encoder, and 1 gives it to all (Clark et
            al. 2020, arXiv 2003.10555).
        positive_weights: factor of the loss of positive samples, by label, 1 for labels that are
            not named; with one label per sample, the factor of the loss of its samples. balanced
            weighs labels by the training split: negatives / positives of each label, or with one
            label per sample N / (L x samples of the class).
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (1,)}
    reads_labels: ClassVar[bool] = True
    further_parts: ClassVar[tuple[str, ...]] = ("head",)
    own_rates: ClassVar[tuple[str, ...]] = ("encoder_lr", "head_lr", "layer_decay")

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        cnn: VisionEncoder,
        hidden: Width | None = None,
        dropout: Dropout = 0.0,
        freeze: Annotated[str, UsedWith("cnn.lora", (None,))] = "none",
        encoder_lr: Rate | None = None,
        head_lr: Rate | None = None,
        layer_decay: Portion = 1.0,
        positive_weights: Literal["balanced"] | dict[str, Weight] | None = None,
    ) -> None:
        super().__init__()
        if not spec.labels:
            raise ConfigError(
                "dataset: Classifier learns labels, but the data set has none. Use "
                "dataset.proto=ImLabel or ImSeqLabel."
            )
        if len(spec.labels) < 2 and not spec.multi_label:
            raise ConfigError(
                f"dataset: all samples have the one label '{spec.labels[0]}', so there is nothing "
                "to classify. Set dataset.label.multi_label=true if samples may lack it."
            )
        self.labels, self.multi_label = spec.labels, spec.multi_label
        self.encoder_lr, self.head_lr, self.layer_decay = encoder_lr, head_lr, layer_decay
        self.cnn = cnn
        if freeze != "none" and cnn.adapted:
            raise ArgumentError(
                {
                    "freeze": f"given '{freeze}' beside cnn.lora, which keeps the encoder as it is "
                    "and trains its adapters. Leave freeze out."
                }
            )
        if freeze != "none":
            cnn.freeze_until(None if freeze == "all" else freeze)
        width = cnn.out_features
        layers: list[nn.Module] = []
        if hidden is not None:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        if dropout:
            layers.append(nn.Dropout(dropout))
        self.head = nn.Sequential(*layers, nn.Linear(width, len(spec.labels)))
        self.register_buffer("positive_weights", _weights(positive_weights, spec))
        self.positive_weights: Tensor

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Classify images.

        Args:
            batch: `images` [B, 3, H, W], or [B, N, 3, H, W] with `images_mask` [B, N] for several
                images per sample, whose features are averaged; `labels` float [B, L], with
                `labels_known` bool [B, L] where some are unknown, or int64 [B] with one per sample.

        Returns:
            `logits` [B, L]; `loss`, a scalar, where the batch has labels; in evaluation
            `visual_backbone` [B, F] as well.

        Raises:
            ConfigError: the data set gives no images, or no labels to train with.
        """
        features = visual_backbone(self.cnn, batch)
        if features is None:
            raise ConfigError(
                "Classifier looks at images, but the data set gives none. Use "
                "dataset.proto=ImLabel or ImSeqLabel."
            )
        logits = self.head(features)
        output = {LOGITS: logits}
        if not self.training:
            output["visual_backbone"] = features
        if "labels" in batch:
            output["loss"] = self._loss(logits.float(), batch["labels"], batch.get("labels_known"))
        elif self.training:
            raise ConfigError("Classifier learns labels, but the data set gives none.")
        return output

    def towers(self) -> dict[str, Tower]:
        """The image encoder."""
        return visual_tower(self.cnn)

    def learning_rates(self, base: float) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that are trained, in groups, each with its learning rate.

        Args:
            base: `trainor.optim_params.lr`.
        """
        if self.encoder_lr is None and self.head_lr is None and self.layer_decay == 1:
            return []
        encoder = self.encoder_lr or base
        blocks = [list(self.cnn.parameters())]
        if self.layer_decay < 1:
            blocks = self.cnn.parameters_by_block()
        groups = [
            (block, encoder * self.layer_decay ** (len(blocks) - 1 - number))
            for number, block in enumerate(blocks)
        ]
        groups.append((list(self.head.parameters()), self.head_lr or base))
        trained = [([p for p in one if p.requires_grad], rate) for one, rate in groups]
        return [(parameters, rate) for parameters, rate in trained if parameters]

    def _loss(self, logits: Tensor, labels: Tensor, known: Tensor | None) -> Tensor:
        if not self.multi_label:
            losses = functional.cross_entropy(logits, labels, reduction="none")
            # The mean over samples, whatever their weights, so that batches can be added up.
            return (losses * self.positive_weights[labels]).mean()
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.float(), pos_weight=self.positive_weights, reduction="none"
        )
        return (losses if known is None else losses * known).mean()


def _weights(given: str | dict[str, float] | None, spec: DataSpec) -> Tensor:
    """The weight of each label, [L].

    Raises:
        ConfigError: one is named that the data do not have.
    """
    weights = torch.ones(len(spec.labels))
    if isinstance(given, dict):
        for name, weight in given.items():
            if name not in spec.labels:
                raise ArgumentError(
                    {
                        f"positive_weights.{name}": "the data has no such label. Allowed: "
                        f"{', '.join(spec.labels)}.{nearest(name, spec.labels)}"
                    }
                )
            weights[spec.labels.index(name)] = weight
    elif given is not None and spec.positives:
        positives = torch.tensor(spec.positives, dtype=torch.float64)
        negatives = torch.tensor(spec.negatives, dtype=torch.float64)
        every = negatives if spec.multi_label else (positives + negatives) / len(spec.labels)
        # A label that is never there, or always, has nothing to be balanced with.
        usable = (positives > 0) & (negatives > 0)
        weights = torch.where(usable, every / positives.clamp(min=1), 1.0).float()
    return weights
