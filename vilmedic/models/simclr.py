"""SimCLR: contrastive learning of images alone (Chen et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from torch import Tensor

from vilmedic.blocks.projection import VisualProjection, check_width
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.types import AtLeast
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.errors import ConfigError
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.contract import Batch, ContrastiveModel, Features, several_images


class SimCLR(ContrastiveModel):
    """An image encoder and a head, trained so that two views of an image are alike.

    "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709. The
    representation to use afterwards is that of the image encoder; the head is for the loss. Where
    studies have several images, the two views may be of two images of a study, as in "MedAug:
    Contrastive learning leveraging patient metadata improves representations for chest X-ray
    interpretation" (Vu et al. 2021, arXiv 2102.10663), or of all its images, whose features are
    averaged.

    Args:
        cnn: the image encoder; its output is averaged over positions if it has several.
        projection: the head.
        loss: how the views of a batch are compared.
        forward_batch_size: largest number of samples encoded at once, two images each; null encodes
            the whole batch.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (1, 2)}
    training_image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (2,)}
    contrast_needs: ClassVar[tuple[str, ...]] = ("visual", "visual_second")

    def __init__(
        self,
        *,
        cnn: VisionEncoder,
        projection: VisualProjection,
        loss: NTXentLoss,
        forward_batch_size: Annotated[int, AtLeast(1)] | None = None,
    ) -> None:
        super().__init__(forward_batch_size)
        check_width(
            "projection.visual_embedding_dim",
            projection.visual_embedding_dim,
            f"cnn ({cnn.backbone}, {cnn.output_layer})",
            cnn.out_features,
        )
        self.cnn = cnn
        self.projection = projection
        self.loss = loss

    def encode(self, batch: Batch) -> Features:
        """Embed the images of a batch.

        Args:
            batch: `images` [B, 2, 3, H, W], two views per sample, or [B, 3, H, W], one plain image;
                with `images_mask` [B, N] two views or one plain copy of N images, [B, N, 2, 3, H,
                W] or [B, N, 3, H, W], whose features are averaged.

        Returns:
            `visual` [B, projection_dim] of the first view and, where there are two,
            `visual_second` of the other, and what the loss learns; in evaluation `visual_backbone`
            of the first view.

        Raises:
            ConfigError: if the data set gives no images, or several that are not two views.
        """
        views, mask, counts = self._views(batch)
        shape = views.shape[:2]
        if mask is not None:
            mask = mask.repeat_interleave(shape[1], dim=0)
            counts = None if counts is None else [n for n in counts for _ in range(shape[1])]
        # Both views in one pass: batch statistics then tell nothing about which is which.
        backbone = self.cnn.pooled_images(views.flatten(0, 1), mask, counts)
        projected = self.projection.visual(backbone).unflatten(0, shape)
        features: Features = {"visual": projected[:, 0], **self.learned()}
        if shape[1] == 2:
            features["visual_second"] = projected[:, 1]
        if not self.training:
            features["visual_backbone"] = backbone.unflatten(0, shape)[:, 0]
        return features

    def contrast(self, features: Features, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss of `visual` and `visual_second`, both [B, D].

        Raises:
            ConfigError: if the data set gave one view of each image.
            ValueError: if there is a single sample.
        """
        if "visual_second" not in features:
            raise ConfigError(
                "SimCLR compares two views of each image, but the data set gives one. Set "
                "dataset.views=2 (dataset.proto=ImageDataset)."
            )
        learned = self.learned(features)
        return part.call(self.loss, features["visual"], features["visual_second"], **learned)

    def translate(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the original vilmedic under the names of today."""
        from vilmedic.checkpoints.older_formats import original_names

        return original_names(weights, self)

    @staticmethod
    def _views(batch: Batch) -> tuple[Tensor, Tensor | None, list[int] | None]:
        """The images as [B, V, 3, H, W] or [B, V, N, 3, H, W], where V is 1 or 2.

        With N images per sample also which of them exist, and how many each sample has.
        """
        if "images" not in batch:
            raise ConfigError(
                "SimCLR learns from images, but the data set gives none. Use "
                "dataset.proto=ImageDataset with dataset.views=2."
            )
        images, mask, counts = several_images(batch)
        if mask is None:
            views = images.unsqueeze(1) if images.ndim == 4 else images
        else:
            views = images.unsqueeze(1) if images.ndim == 5 else images.transpose(1, 2)
        if views.shape[1] > 2:
            raise ConfigError(
                f"SimCLR compares two views of each image, but the data set gives "
                f"{views.shape[1]}. Set dataset.views=2."
            )
        return views, mask, counts
