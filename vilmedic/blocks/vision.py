"""Image encoders: torchvision backbones cut after a layer, and transformers vision models."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vilmedic.blocks.backbones import capture, image_size, load_backbone, pool
from vilmedic.blocks.pretrained import Filled
from vilmedic.config.types import Dropout, Runtime
from vilmedic.errors import ConfigError, nearest

PERMUTATIONS = ("batch_first", "spatial_first", "no_permute")


class VisionEncoder(nn.Module):
    """Images to features, with the part of a backbone that ends at `output_layer`.

    What lies behind the layer is removed, so that no parameter goes unused; the names of the rest
    stay those of torchvision, under `network.`.

    Args:
        backbone: a classification network of torchvision (resnet50), or the hub name or local
            folder of a vision model of transformers.
        output_layer: last layer kept: a top-level child or a dotted name (layer4, features.5).
            avgpool means the input of the classifier where a backbone has no layer of that name;
            for transformers, last_hidden_state, pooler_output or avgpool, which is the latter, or
            the mean over positions where there is none.
        dropout_out: dropout of the output.
        permute: arrangement of spatial outputs: batch_first is [B, HW, C], spatial_first is
            [HW, B, C] and no_permute is [B, C, H, W].
        freeze: keep the backbone as it is, its batch statistics included.
        pretrained: true takes the published ImageNet weights, false random ones; or the directory
            or a checkpoint of another run, whose image encoder is taken; or the path of a file
            with a state dict of the backbone.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.

    A transformer of transformers that was trained at another image size gets its positions
    interpolated where its class can do that.

    Attributes:
        out_features: width F or C of the output.
    """

    def __init__(
        self,
        *,
        backbone: str,
        output_layer: str = "avgpool",
        dropout_out: Dropout = 0.0,
        permute: Literal["batch_first", "spatial_first", "no_permute"] = "batch_first",
        freeze: bool = False,
        pretrained: bool | str = True,
        filled: Runtime[Filled | None] = None,
    ) -> None:
        super().__init__()
        if permute not in PERMUTATIONS:
            raise ConfigError(
                f"model.cnn.permute: '{permute}' is not allowed; choose {', '.join(PERMUTATIONS)}."
                f"{nearest(permute, PERMUTATIONS)}"
            )
        self.backbone = backbone
        self.output_layer = output_layer
        self.permute = permute
        self.freeze = freeze
        self.network = load_backbone(backbone, output_layer, pretrained, filled)
        # Convolutions run faster in this layout, on CPU and GPU alike.
        self.network.to(memory_format=torch.channels_last)
        self.trained_size = image_size(self.network)
        forward = inspect.signature(self.network.forward).parameters
        self.interpolates = "interpolate_pos_encoding" in forward
        self.dropout = nn.Dropout(dropout_out)
        if freeze:
            self.network.requires_grad_(False)
        self.train()
        self.out_features = self.width(output_layer)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Switch between training and evaluation; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self.freeze:
            self.network.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: normalised images, [B, 3, H, W].

        Returns:
            [B, F] when the layer leaves one position (avgpool); otherwise [B, HW, C], [HW, B, C]
            or [B, C, H, W], as `permute` says, where tokens count as positions.
        """
        features = self.dropout(self.features(images, [self.output_layer])[self.output_layer])
        if features.ndim == 2 or self.permute == "no_permute":
            return features
        positions = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
        return positions.transpose(0, 1) if self.permute == "spatial_first" else positions

    def pooled(self, images: Tensor) -> Tensor:
        """One vector an image, [B, F]: the output, averaged over positions if it has several."""
        features = self.features(images, [self.output_layer])[self.output_layer]
        return self.dropout(pool(features))

    def features(self, images: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """The outputs of several layers in one pass, without permutation and dropout.

        Args:
            images: normalised images, [B, 3, H, W].
            layers: names of layers that are kept: `output_layer` or ones before it.

        Returns:
            The output of each layer: [B, F], [B, C, H, W] or, for layers of tokens, [B, T, C].

        Raises:
            ConfigError: if a layer does not exist, was cut off or has no output of its own, or the
                backbone does not take images of this size.
        """
        options: dict[str, Any] = {}
        if self.trained_size not in (None, tuple(images.shape[-2:])) and self.interpolates:
            options["interpolate_pos_encoding"] = True
        with capture(self.network, layers) as outputs:
            try:
                self.network(images.contiguous(memory_format=torch.channels_last), **options)
            except ValueError as error:
                if self.trained_size is None:
                    raise
                raise ConfigError(
                    f"model.cnn.backbone: {self.backbone} does not take images of "
                    f"{images.shape[-2]} x {images.shape[-1]} pixels ({error}). It is made for "
                    f"{self.trained_size[0]} x {self.trained_size[1]}: set dataset.image.crop to "
                    "that."
                ) from error
        return outputs

    def width(self, layer: str) -> int:
        """Number of channels of a layer's output."""
        shape = self.shape(layer)
        return shape[2] if len(shape) == 3 else shape[1]

    def shape(self, layer: str) -> torch.Size:
        """Shape of a layer's output for one image, found without computing anything."""
        state: dict[str, Any] = {
            name: tensor.to("meta")
            for name, tensor in [*self.network.named_parameters(), *self.network.named_buffers()]
        }
        size = self.trained_size or getattr(self.network, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        images = torch.empty(1, 3, height, width, device="meta")
        training = self.network.training
        self.network.eval()
        with torch.no_grad(), capture(self.network, [layer]) as outputs:
            functional_call(self.network, state, (images,))
        self.network.train(training)
        return outputs[layer].shape

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"backbone={self.backbone}, output_layer={self.output_layer}, "
            f"permute={self.permute}, freeze={self.freeze}"
        )
