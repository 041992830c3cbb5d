"""ConVIRT: contrastive learning of images and their reports (Zhang et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from torch import Tensor

from vilmedic.blocks.projection import PairedProjection, check_width
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.types import AtLeast, Runtime
from vilmedic.datasets.aligned import REPORT_FEATURES, DataSpec
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.errors import ConfigError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.models.contract import (
    Batch,
    ContrastiveModel,
    Features,
    Tower,
    make_targets,
    visual_backbone,
    visual_tower,
)

if TYPE_CHECKING:
    from vilmedic.losses.targets import Targets


class ConVIRT(ContrastiveModel):
    """An image encoder and a text encoder, each with a head into the space where they are compared.

    "Contrastive Learning of Medical Visual Representations from Paired Images and Text",
    arXiv 2010.00747.

    Args:
        spec: data properties: tokenizer, label names, normalisation.
        encoder: the text encoder.
        cnn: the image encoder; its output is averaged over positions if it has several.
        projection: the two heads.
        loss: how the two sets of embeddings are compared.
        targets: which pairs of a batch are positives: identity, the own ones alone; same_text,
            those of equal reports too; soft, all pairs by how alike they are.
        forward_batch_size: largest number of samples encoded at once; null encodes the whole batch.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (1,)}
    reads_reports: ClassVar[bool] = True

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        encoder: TextEncoder,
        cnn: VisionEncoder,
        projection: PairedProjection,
        loss: ConVIRTLoss,
        targets: Literal["identity", "same_text", "soft"] | Targets = "identity",
        forward_batch_size: Annotated[int, AtLeast(1)] | None = None,
    ) -> None:
        super().__init__(forward_batch_size, make_targets(targets, loss, spec))
        check_width(
            "projection.visual_embedding_dim",
            projection.visual_embedding_dim,
            f"cnn ({cnn.backbone}, {cnn.output_layer})",
            cnn.out_features,
        )
        check_width(
            "projection.textual_embedding_dim",
            projection.textual_embedding_dim,
            f"encoder ({encoder.proto or 'random BERT'})",
            encoder.hidden_size,
        )
        self.cnn = cnn
        self.encoder = encoder
        self.projection = projection
        self.loss = loss

    def encode(self, batch: Batch) -> Features:
        """Embed the images and the reports of a batch, each on its own.

        Args:
            batch: `images` [B, 3, H, W], or [B, N, 3, H, W] with `images_mask` [B, N] for several
                images per sample, whose features are averaged; `input_ids` and `attention_mask`
                [B, T]. Where images or reports are missing, so are their features.

        Returns:
            `visual` and `linguistic`, [B, projection_dim], and what the loss learns, and `targets`
            where there are some; in evaluation `visual_backbone` as well.
        """
        features: Features = self.learned()
        backbone = visual_backbone(self.cnn, batch)
        if backbone is not None:
            features["visual"] = self.projection.visual(backbone)
            features.update(self.targets_of(batch, features["visual"]))
            if not self.training:
                features["visual_backbone"] = backbone
        if "input_ids" in batch or REPORT_FEATURES in batch:
            features.update(self.encode_text(batch))
        return features

    def encode_text(self, batch: Batch) -> Features:
        """Embed reports: `input_ids` and `attention_mask` [B, T] to `linguistic` [B, D]."""
        reports = batch.get(REPORT_FEATURES)
        if reports is None:
            reports = self.encoder(batch["input_ids"], batch["attention_mask"])
        return {"linguistic": self.projection.linguistic(reports)}

    def towers(self) -> dict[str, Tower]:
        """The image encoder and the text encoder."""
        encoder = self.encoder

        def encode(batch: Batch) -> Tensor:
            reports: Tensor = encoder(batch["input_ids"], batch["attention_mask"])
            return reports

        config = encoder.network.config
        settings = f"{encoder.pooling} {config._attn_implementation} {config}"
        text = Tower("text encoder", encoder.network, encode, settings)
        return {**visual_tower(self.cnn), REPORT_FEATURES: text}

    def contrast(self, features: Features, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss of `visual` and `linguistic`, both [B, D].

        Raises:
            ConfigError: if the data set gave no images, no reports or not what targets need.
            ValueError: if there is a single pair.
        """
        missing = [name for name in ("visual", "linguistic") if name not in features]
        if missing:
            what = {"visual": "images", "linguistic": "reports"}[missing[0]]
            raise ConfigError(
                f"ConVIRT compares images with reports, but the data set gives no {what}. Use "
                "dataset.proto=ImSeq or ImSeqLabel."
            )
        given = {**self.learned(features), **self.given_targets(features)}
        return part.call(self.loss, features["visual"], features["linguistic"], **given)

    def translate(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the original vilmedic under the names of today."""
        from vilmedic.checkpoints.older_formats import original_names

        return original_names(weights, self, text="encoder.network.")
