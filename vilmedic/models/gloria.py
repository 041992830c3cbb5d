"""GLoRIA: contrastive learning of images and regions, reports and words (Huang et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.blocks.backbones import pool
from vilmedic.blocks.projection import VisualEmbedder, check_width
from vilmedic.blocks.text import WordEncoder
from vilmedic.blocks.vision import VisionEncoder, by_sample, existing_places, mean_of_images
from vilmedic.config.types import AtLeast, Runtime, Side
from vilmedic.datasets.aligned import DataSpec
from vilmedic.device import WORDS
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.errors import ArgumentError, ConfigError
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.gloria_local import attention_maps, local_similarity
from vilmedic.models.contract import (
    Batch,
    ContrastiveModel,
    Features,
    make_targets,
    several_images,
)

if TYPE_CHECKING:
    from vilmedic.losses.targets import Targets


class GLoRIA(ContrastiveModel):
    """An image encoder and a text encoder, compared as wholes and word by region.

    "GLoRIA: A Multimodal Global-Local Representation Learning Framework for Label-efficient
    Medical Image Recognition", ICCV 2021. Everything is compared in the space of the text encoder.

    Args:
        spec: data properties: tokenizer, label names, normalisation.
        encoder: the text encoder.
        cnn: the image encoder; its output is averaged over positions if it has several.
        visual_embedder: widths of the image features that are mapped into the space of the text.
        loss: how the embeddings are compared.
        upsample: pixels a side to which images are enlarged first; null leaves them as they are.
        local_layer: the layer of the image encoder whose positions are the regions.
        targets: which pairs of a batch are positives: identity, the own ones alone; same_text,
            those of equal reports too; soft, all pairs by how alike they are.
        forward_batch_size: largest number of samples encoded at once; null encodes the whole batch.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (1,)}
    reads_reports: ClassVar[bool] = True
    contrast_needs: ClassVar[tuple[str, ...]] = (
        "visual",
        "linguistic",
        "regions",
        "words",
        "word_mask",
    )

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec],
        encoder: WordEncoder,
        cnn: VisionEncoder,
        visual_embedder: VisualEmbedder,
        loss: GLoRIALoss,
        upsample: Side | None = 299,
        local_layer: str = "layer3",
        targets: Literal["identity", "same_text", "soft"] | Targets = "identity",
        forward_batch_size: Annotated[int, AtLeast(1)] | None = None,
    ) -> None:
        super().__init__(forward_batch_size, make_targets(targets, loss, spec))
        if not isinstance(loss, GLoRIALoss):  # attention and local similarity ask its temperatures
            raise ArgumentError({"loss": f"given {type(loss).__name__}. Allowed: GLoRIALoss."})
        _check_visual(cnn, local_layer, visual_embedder)
        width = encoder.hidden_size
        self.cnn = cnn
        self.encoder = encoder
        self.global_embedder = nn.Linear(visual_embedder.feature_dim, width)
        self.local_embedder = nn.Conv2d(visual_embedder.interm_feature_dim, width, 1, bias=False)
        self.loss = loss
        self.upsample = upsample
        self.local_layer = local_layer

    def encode(self, batch: Batch) -> Features:
        """Embed the images and the reports of a batch, each on its own.

        Args:
            batch: `images` [B, 3, H, W], or [B, N, 3, H, W] with `images_mask` [B, N] for several
                images per sample; `input_ids`, `attention_mask` and `word_ids` [B, T]. Where images
                or reports are missing, so are their features.

        Returns:
            Of images `visual` [B, D] and `regions` [B, D, h, w], `targets` where there are some,
            and in evaluation `visual_backbone` [B, F]; of reports what `encode_text` gives. Of
            several images per sample the means, and the regions of all side by side, [B, D, N, h,
            w], with `region_mask` [B, N], which says which of the images there are.

        Raises:
            ConfigError: if there are several views of an image.
        """
        features: Features = {}
        if "images" in batch:
            images, mask, counts = several_images(batch)
            if images.ndim != (4 if mask is None else 5):
                raise ConfigError(
                    "GLoRIA takes images [B, 3, H, W], or several per sample with a mask, but got "
                    f"{list(images.shape)}. Leave out views."
                )
            places = None
            if mask is not None:
                places = existing_places(mask, counts)
                images = images.flatten(0, 1)[places]
            if self.upsample is not None:
                size = (self.upsample, self.upsample)
                images = functional.interpolate(
                    images, size=size, mode="bilinear", align_corners=True
                )
            layers = self.cnn.features(images, [self.local_layer, self.cnn.output_layer])
            backbone = self.cnn.dropout(pool(layers[self.cnn.output_layer]))
            if mask is not None and places is not None:
                backbone = mean_of_images(backbone, mask, places)
            features["visual"] = self.global_embedder(backbone)
            features.update(self.targets_of(batch, features["visual"]))
            regions = self.cnn.regions(layers[self.local_layer], images)
            features["regions"] = self.local_embedder(regions)
            if mask is not None and places is not None:
                each = by_sample(features["regions"], mask, places)
                features |= {"regions": each.transpose(1, 2), "region_mask": mask}
            if not self.training:
                features["visual_backbone"] = backbone
        if "input_ids" in batch:
            features.update(self.encode_text(batch))
        return features

    def encode_text(self, batch: Batch) -> Features:
        """Embed reports.

        Args:
            batch: `input_ids`, `attention_mask` and `word_ids`, [B, T].

        Returns:
            `linguistic` [B, D]; `words` [B, T, D]; `word_mask` [B, T], which leaves out the closing
            special token and what lies behind it.
        """
        encoded = self.encoder(batch["input_ids"], batch["attention_mask"], batch["word_ids"])
        return {
            "linguistic": encoded.report,
            "words": encoded.words,
            "word_mask": encoded.mask,
        }

    def contrast(self, features: Features, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss of what `encode` gives for images and reports.

        Raises:
            ConfigError: if the data set gave no images, no reports or not what targets need.
            ValueError: if there is a single pair.
        """
        missing = [name for name in self.contrast_needs if name not in features]
        if missing:
            what = "images" if missing[0] == "visual" else "reports"
            raise ConfigError(
                f"GLoRIA compares images with reports, but the data set gives no {what}. Use "
                "dataset.proto=ImSeq or ImSeqLabel."
            )
        given: dict[str, Any] = {name: features[name] for name in self.contrast_needs}
        if "region_mask" in features:
            given["region_mask"] = features["region_mask"]
        counts: Any = features.get(WORDS)
        if counts is not None and "word_counts" in signature(self.loss.forward).parameters:
            given["word_counts"] = [count - self.encoder.closing for count in counts]
        return part.call(self.loss, **given, **self.given_targets(features))

    def chance_loss(self, size: int) -> float:
        """ln(B) for each direction of the global and of the local loss, weighted as these are."""
        weights = self.loss.global_loss_weight + self.loss.local_loss_weight
        return 2 * weights * math.log(size)

    def temperature_of(self, features: Features) -> float:
        """The temperature of the published form, which multiplies by `temp3`, as a divisor."""
        return 1 / self.loss.temp3

    def translate(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the original vilmedic and of the official repository under today's names."""
        from vilmedic.checkpoints.older_formats import original_names, without_pooler

        text = "encoder.text.network."
        return without_pooler(original_names(weights, self, text=text), text)

    def local_similarity(
        self,
        regions: Tensor,
        words: Tensor,
        word_mask: Tensor,
        *,
        aggregation: Literal["sum", "max"],
        region_mask: Tensor | None = None,
    ) -> Tensor:
        """How well the words of every report find themselves in every image.

        With `sum`, the similarity of the loss, the opening special token is a word among the
        others. Published evaluations, whose aggregation is `max`, leave it out, of the choice that
        regions make among the words too; it stays where a report has no other word.

        Args:
            regions: [I, D, h, w], or [I, D, N, h, w] of N images per sample.
            words: [J, L, D].
            word_mask: [J, L].
            aggregation: how the words of a report count together.
            region_mask: which of the images a sample has, [I, N].

        Returns:
            [I, J].
        """
        mask = word_mask
        if aggregation == "max":
            mask = word_mask.clone()
            mask[:, : self.encoder.opening] = False
            mask = torch.where(mask.any(dim=1, keepdim=True), mask, word_mask)
        return local_similarity(
            regions,
            words,
            mask,
            temp0=self.loss.temp0,
            temp1=self.loss.temp1,
            temp2=self.loss.temp2,
            aggregation=aggregation,
            region_mask=region_mask,
        )

    def attention(self, regions: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """Where in its image each word of a report looks: a_nl of the paper, equation 2.

        Args:
            regions: [B, D, h, w]; of several images per sample, [B, D, N, h, w], the first counts.
            words: [B, L, D].
            word_mask: [B, L].

        Returns:
            Weights of the regions for each word, which add up to 1; zero for words that do not
            count, [B, L, h, w].
        """
        if regions.ndim == 5:
            regions = regions[:, :, 0]
        weights = attention_maps(
            regions, words, word_mask, temp0=self.loss.temp0, temp1=self.loss.temp1
        )
        return weights.unflatten(2, regions.shape[2:])


def _check_visual(cnn: VisionEncoder, local_layer: str, widths: VisualEmbedder) -> None:
    """Refuse a layer without regions, and widths that do not fit the image encoder."""
    found = cnn.region_shape(local_layer)
    if found is None or found[1] * found[2] < 2:
        raise ArgumentError(
            {
                "local_layer": f"'{local_layer}' of {cnn.backbone} gives no map of regions, but "
                f"{list(cnn.shape(local_layer)[1:])} for an image. Name a layer with positions, "
                "such as layer3 of a ResNet, blocks.8 or forward_features of a ViT of timm, or "
                "last_hidden_state of a model of transformers."
            }
        )
    check_width(
        "visual_embedder.interm_feature_dim",
        widths.interm_feature_dim,
        f"local_layer ({cnn.backbone}, {local_layer})",
        found[0],
    )
    check_width(
        "visual_embedder.feature_dim",
        widths.feature_dim,
        f"cnn ({cnn.backbone}, {cnn.output_layer})",
        cnn.out_features,
    )
