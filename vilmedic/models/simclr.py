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
from vilmedic.models.contract import Batch, ContrastiveModel, Features


class SimCLR(ContrastiveModel):
    """An image encoder and a head, trained so that two views of an image are alike.

    "A Simple Framework for Contrastive Learning of Visual Representations", arXiv 2002.05709. The
    representation to use afterwards is that of the image encoder; the head is for the loss.

    Args:
        cnn: the image encoder; its output is averaged over positions if it has several.
        projection: the head.
        loss: how the views of a batch are compared.
        forward_batch_size: largest number of samples encoded at once, two images each; null encodes
            the whole batch.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {"views": (1, 2), "multi_image": (1,)}
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
            batch: `images` [B, 2, 3, H, W], two views a sample, or [B, 3, H, W], one plain image.

        Returns:
            `visual` [B, projection_dim] of the first view and, where there are two,
            `visual_second` of the other, and what the loss learns; in evaluation `visual_backbone`
            of the first view.

        Raises:
            ConfigError: if the data set gives no images, or several that are not two views.
        """
        views = self._views(batch)
        # Both views in one pass: batch statistics then tell nothing about which is which.
        backbone = self.cnn.pooled(views.flatten(0, 1))
        projected = self.projection.visual(backbone).unflatten(0, views.shape[:2])
        features: Features = {"visual": projected[:, 0], **self.learned()}
        if views.shape[1] == 2:
            features["visual_second"] = projected[:, 1]
        if not self.training:
            features["visual_backbone"] = backbone.unflatten(0, views.shape[:2])[:, 0]
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
    def _views(batch: Batch) -> Tensor:
        """The images as [B, V, 3, H, W], where V is 1 or 2."""
        if "images" not in batch:
            raise ConfigError(
                "SimCLR learns from images, but the data set gives none. Use "
                "dataset.proto=ImageDataset with dataset.views=2."
            )
        images = batch["images"]
        if "images_mask" in batch:
            raise ConfigError(
                "SimCLR takes one image a sample, but the data set gives several, as "
                "multi_image says. Set multi_image to 1."
            )
        views = images.unsqueeze(1) if images.ndim == 4 else images
        if views.shape[1] > 2:
            raise ConfigError(
                f"SimCLR compares two views of each image, but the data set gives "
                f"{views.shape[1]}. Set dataset.views=2."
            )
        return views
