"""Image encoders: a backbone of torchvision, timm or transformers, cut after a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vilmedic.blocks.backbones import (
    PublishedPixels,
    Wanted,
    find_layer,
    pool,
)
from vilmedic.blocks.pretrained import Filled, ReadEncoder, first_line
from vilmedic.config.transformers_fields import HF, TIMM
from vilmedic.config.types import ConfigOf, Dropout, Frozen, Runtime, UsedWith
from vilmedic.errors import ArgumentError, ConfigError

if TYPE_CHECKING:  # imported by the methods that need them
    from vilmedic.blocks.lora import LoRA
    from vilmedic.blocks.repeated import Layer


class VisionEncoder(nn.Module):
    """Image encoder: the part of a backbone up to `output_layer`.

    Later layers are removed, so that no parameter is unused; the names of the rest stay those of
    its library, under `network.`.

    Args:
        backbone: a classification network of torchvision (resnet50); timm/<name or folder>, a
            network of timm; hf:<name or folder>, a vision model of transformers by its hub name or
            its folder, or an architecture of them (hf:dinov2) to start at random.
        output_layer: last layer kept: a top-level child or a dotted name (layer4, features.5).
            avgpool means what the library pools: the input of the classifier; for timm, the
            network without it, and forward_features what it pools; for transformers,
            last_hidden_state, pooler_output or avgpool, which is the latter, or the mean over
            positions where there is none.
        config: settings of the backbone that are other than usual: fields of the configuration
            class of transformers, or arguments of the class of timm.
        dropout_out: dropout of the output.
        permute: arrangement of spatial outputs: batch_first is [B, HW, C], spatial_first is
            [HW, B, C] and no_permute is [B, C, H, W].
        freeze: keep the backbone as it is, its batch statistics included; a number keeps what
            comes before the first block, and that many blocks.
        lora: train low-rank adapters of its linear layers instead of its weights.
        pretrained: true takes the published ImageNet weights, false random ones; or the directory
            or a checkpoint of another run, whose image encoder is taken; or the path of a file
            with a state dict of the backbone.
        filled: given when a checkpoint fills the weights afterwards, so that none are loaded here.
        read_encoder: reads the weights that `pretrained` names.

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
        config: Annotated[dict[str, Any] | None, ConfigOf(default=None, key="backbone")] = None,
        dropout_out: Dropout = 0.0,
        permute: Literal["batch_first", "spatial_first", "no_permute"] = "batch_first",
        freeze: bool | Frozen = False,
        lora: Annotated[LoRA | None, UsedWith("freeze", (False,))] = None,
        pretrained: bool | str = True,
        filled: Runtime[Filled | None] = None,
        read_encoder: Runtime[ReadEncoder | None] = None,
    ) -> None:
        super().__init__()
        if lora is not None:
            from vilmedic.blocks.lora import check_alone

            check_alone(freeze)
        self.backbone = backbone
        self.output_layer = output_layer
        self.permute = permute
        self.freeze = freeze
        wanted = Wanted(
            name=backbone,
            output_layer=output_layer,
            pretrained=False if filled is not None else pretrained,
            config=config or {},
            filled=filled,
            read=read_encoder,
        )
        self.source = source_of(wanted).make(wanted)
        self.network = self.source.network
        self._tapped: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._try(wanted)
        if backbone.startswith((HF, TIMM)):
            self._leave_out_unused(output_layer)
        self.dropout = nn.Dropout(dropout_out)
        self._frozen: list[nn.Module] = []
        if freeze is True:
            self.freeze_until(None)
        elif freeze:
            from vilmedic.blocks.repeated import freeze_first

            self._frozen = freeze_first(self.layers(), freeze, backbone)
        self.adapted = lora is not None and (filled is None or filled.adapters)
        if lora is not None and self.adapted:
            with torch.no_grad():
                state = self._parameters_on_meta()
                lora.adapt(self.network, backbone, lambda: self._run_on_meta(state))
        self.train()
        self.out_features = self.width(output_layer)

    @staticmethod
    def fetch(
        *,
        backbone: str,
        pretrained: bool | str = True,
        config: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Download the published weights that the constructor with these arguments takes.

        Raises:
            ConfigError: they are not available.
        """
        wanted = Wanted(name=backbone, pretrained=pretrained, config=config or {})
        source_of(wanted).fetch(wanted)

    @staticmethod
    def published_pixels(
        *,
        backbone: str,
        pretrained: bool | str = True,
        config: dict[str, Any] | None = None,
        **_: Any,
    ) -> PublishedPixels | None:
        """Return the image preprocessing that the published weights were trained with.

        For a backbone timm/<name> or hf:<name>; None for others, and if it is not documented.

        Raises:
            ConfigError: there is no such backbone.
        """
        wanted = Wanted(name=backbone, pretrained=pretrained, config=config or {})
        if pretrained is not True or not backbone.startswith((HF, TIMM)):
            return None
        return source_of(wanted).published_pixels(wanted)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Switch between training and evaluation; frozen parts stay in evaluation mode."""
        super().train(mode)
        if self.freeze is True:
            self.network.eval()
        for module in self._frozen:
            module.training = False
        return self

    def freeze_until(self, layer: str | None) -> None:
        """Keep the backbone as it is up to the end of a layer, batch statistics included.

        Args:
            layer: a top-level child or a dotted name; None freezes all of the backbone.

        Raises:
            ConfigError: if the layer does not exist or was cut off.
        """
        last = (
            self.network
            if layer is None
            else find_layer(self.network, layer, "freeze", self.source.outputs)
        )
        inside = set(last.modules())
        reached = False
        for module in self.network.modules():
            reached = reached or module is last
            if reached and module not in inside:
                break
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if module in inside or last not in set(module.modules()):  # a parent continues after it
                self._frozen.append(module)
        self.train(self.training)

    def layers(self) -> list[Layer]:
        """The layers of the backbone in order: the embedding first, the head last.

        Names are those inside `network`. What lies behind `output_layer` was removed and is in
        none of them.
        """
        from vilmedic.blocks.repeated import layers_of

        return layers_of(self.network, self.source.blocks())

    def parameters_by_block(self) -> list[list[nn.Parameter]]:
        """The parameters of the backbone by block, in order, for rates that differ by depth.

        What comes before the first block is a group of its own; the head belongs to the last block.
        """
        from vilmedic.blocks.repeated import HEAD

        layers = [list(layer.parameters.values()) for layer in self.layers()]
        if len(layers) > 1 and self.layers()[-1].name == HEAD:
            layers[-2:] = [layers[-2] + layers[-1]]
        return layers

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
        """One vector per image, [B, F]: the output, averaged over positions if it has several."""
        features = self.features(images, [self.output_layer])[self.output_layer]
        return self.dropout(pool(features))

    def pooled_images(
        self, images: Tensor, mask: Tensor | None, counts: list[int] | None = None
    ) -> Tensor:
        """One vector per sample, [B, F], of one image or the mean over several.

        Args:
            images: [B, 3, H, W], or [B, N, 3, H, W] with a mask.
            mask: which of the images exist, bool [B, N]; only these are encoded.
            counts: existing images per sample; without it the GPU is synchronised.

        Raises:
            ConfigError: if there are several images, but no mask.
        """
        if images.ndim == 4:
            return self.pooled(images)
        if mask is None:
            raise ConfigError(
                f"This model takes images [B, 3, H, W], or several per sample with a mask, but got "
                f"{list(images.shape)} without one. Views are for SimCLR: leave out views."
            )
        places = existing_places(mask, counts)
        return mean_of_images(self.pooled(images.flatten(0, 1)[places]), mask, places)

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
        size = (int(images.shape[-2]), int(images.shape[-1]))
        options = self.source.options(size)
        try:
            return self._outputs(
                layers,
                lambda: self.network(
                    images.contiguous(memory_format=torch.channels_last), **options
                ),
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            made_for = self.source.trained_size
            if made_for is None or made_for == size or self._takes(size):
                raise
            raise ConfigError(
                f"{self.backbone} does not take images of {size[0]} x {size[1]} pixels ({error}). "
                f"It is made for {made_for[0]} x {made_for[1]}: set the crop of the images to that."
            ) from error

    def regions(self, features: Tensor, images: Tensor) -> Tensor:
        """The positions of a layer's output as a map, class and register tokens left out.

        Args:
            features: what `features` gave for the layer.
            images: what it was given, [B, 3, H, W].

        Returns:
            [B, C, h, w].

        Raises:
            ConfigError: the layer gives neither a feature map nor a grid of patches.
        """
        return self.source.as_map(features, (int(images.shape[-2]), int(images.shape[-1])))

    def region_shape(self, layer: str) -> tuple[int, int, int] | None:
        """Channels, rows and columns of a layer's positions for an image of the usual size.

        None when the layer has no positions.

        Raises:
            ConfigError: there is no such layer.
        """
        self.source.check_layer(layer, "local_layer")
        try:
            found = self.source.as_map(torch.empty(self.shape(layer)), self.source.usual_size)
        except ConfigError:
            return None
        return (found.shape[1], found.shape[2], found.shape[3])

    def _try(self, wanted: Wanted) -> None:
        """Set the memory layout, and refuse a network that does not run on an image alone.

        Raises:
            ConfigError: it needs other inputs, or its settings are inconsistent.
        """
        try:
            # Convolutions run faster in this layout, on CPU and GPU alike.
            self.network.to(memory_format=torch.channels_last)
            self.shape(self.output_layer)
        except ConfigError:
            raise
        except Exception as error:  # networks raise many kinds
            height, width = self.source.usual_size
            settings = f" with {dict(wanted.config)}" if wanted.config else ""
            raise ArgumentError(
                {
                    "config" if wanted.config else "backbone": f"{self.backbone}{settings} does "
                    f"not encode an image of {height} x {width} pixels alone "
                    f"({type(error).__name__}: {first_line(error)})."
                }
            ) from error

    def _leave_out_unused(self, layer: str) -> None:
        """Freeze parameters that the output does not depend on, such as a mask token.

        Data-parallel processes wait for the gradient of each trainable parameter.
        """
        given = dict(self.network.named_parameters())
        state = {name: value.detach().to("meta").requires_grad_() for name, value in given.items()}
        output = self._on_meta(layer, state)
        found = torch.autograd.grad(output.sum(), list(state.values()), allow_unused=True)
        for value, gradient in zip(given.values(), found, strict=True):
            if gradient is None:
                value.requires_grad_(False)

    def width(self, layer: str) -> int:
        """Number of channels of a layer's output."""
        shape = self.shape(layer)
        return shape[2] if len(shape) == 3 else shape[1]

    def shape(self, layer: str) -> torch.Size:
        """Return the shape of a layer's output for one image, without computing it."""
        with torch.no_grad():
            return self._on_meta(layer, self._parameters_on_meta()).shape

    def _takes(self, size: tuple[int, int]) -> bool:
        """Whether an image of a size goes through the network when there is memory for it."""
        try:
            with torch.no_grad():
                self._run_on_meta(self._parameters_on_meta(), size)
        except (ValueError, AssertionError, RuntimeError):
            return False
        finally:
            self._kept.clear()
        return True

    def _parameters_on_meta(self) -> dict[str, Tensor]:
        return {name: value.to("meta") for name, value in self.network.named_parameters()}

    def _on_meta(self, layer: str, state: dict[str, Tensor]) -> Tensor:
        """Return a layer's output for one image of the usual size, on meta tensors."""
        return self._outputs([layer], lambda: self._run_on_meta(state))[layer]

    def _run_on_meta(self, state: dict[str, Tensor], size: tuple[int, int] | None = None) -> None:
        """Run one image of the usual or another size through the network, on meta tensors."""
        state = state | {k: v.to("meta") for k, v in self.network.named_buffers()}
        size = size or self.source.usual_size
        images = torch.empty(1, 3, *size, device="meta")
        training = self.network.training
        self.network.eval()
        functional_call(self.network, state, (images,), self.source.options(size))
        self.network.train(training)

    def _outputs(self, layers: list[str], run: Callable[[], object]) -> dict[str, Tensor]:
        """The outputs of layers in a run of the network.

        Each layer gets its tap the first time that it is asked for, and keeps it.
        """
        for layer in layers:
            if layer not in self._tapped:
                self.source.tap(layer, self._kept)
                self._tapped.add(layer)
        try:
            run()
            if missing := [layer for layer in layers if layer not in self._kept]:
                raise ArgumentError(
                    {
                        "": f"the layer '{missing[0]}' of {type(self.network).__name__} is a "
                        "container without an output of its own; name one of the layers inside it."
                    }
                )
            return {layer: self._kept[layer] for layer in layers}
        finally:
            self._kept.clear()

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"backbone={self.backbone}, output_layer={self.output_layer}, "
            f"permute={self.permute}, freeze={self.freeze}"
        )


def source_of(wanted: Wanted) -> type[Any]:
    """The class of the library that a backbone comes from.

    Raises:
        ConfigError: the library is not installed.
    """
    name = wanted.name
    # each loads its library only if needed
    if name.startswith(TIMM):
        from vilmedic.blocks.backbones.timm import TimmBackbone

        return TimmBackbone
    if name.startswith(HF) or "/" in name or Path(name).is_dir() or wanted.saved:
        from vilmedic.blocks.backbones.transformers import TransformersBackbone

        return TransformersBackbone
    from vilmedic.blocks.backbones.torchvision import TorchvisionBackbone

    return TorchvisionBackbone


def existing_places(mask: Tensor, counts: list[int] | None = None) -> Tensor:
    """Return the indices of existing images among those of all samples, in order, int64 [M].

    Args:
        mask: which of the images exist, bool [B, N].
        counts: existing images per sample; without it the GPU is synchronised.
    """
    count = int(mask.sum()) if counts is None else sum(counts)
    return (~mask).flatten().byte().argsort(stable=True)[:count]


def by_sample(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Scatter results of existing images, [M, ...], to [B, N, ...], zero for missing ones."""
    padded = values.new_zeros(mask.numel(), *values.shape[1:])
    return padded.index_copy(0, places, values).unflatten(0, mask.shape)


def mean_of_images(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """The mean over the images of each sample, [M, F] to [B, F]."""
    total = by_sample(values, mask, places).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
