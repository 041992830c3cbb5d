"""Image encoders: torchvision backbones cut after a layer, and transformers vision models."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models
from torchvision.models import WeightsEnum
from transformers import PreTrainedModel

from vilmedic.blocks.pretrained import Filled, ReadEncoder, load_config, load_model, read_pretrained
from vilmedic.blocks.repeated import HEAD, Layer, freeze_first, layers_of
from vilmedic.config.types import Dropout, Frozen, Runtime
from vilmedic.errors import ArgumentError, ConfigError, nearest

HUB_OUTPUTS = ("avgpool", "last_hidden_state", "pooler_output")


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
        freeze: keep the backbone as it is, its batch statistics included; a number keeps what
            comes before the first block, and that many blocks.
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
        dropout_out: Dropout = 0.0,
        permute: Literal["batch_first", "spatial_first", "no_permute"] = "batch_first",
        freeze: bool | Frozen = False,
        pretrained: bool | str = True,
        filled: Runtime[Filled | None] = None,
        read_encoder: Runtime[ReadEncoder | None] = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_layer = output_layer
        self.permute = permute
        self.freeze = freeze
        self.network = load_backbone(backbone, output_layer, pretrained, filled, read_encoder)
        # Convolutions run faster in this layout, on CPU and GPU alike.
        self.network.to(memory_format=torch.channels_last)
        self.trained_size = image_size(self.network)
        self._tapped: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        forward = inspect.signature(self.network.forward).parameters
        self.interpolates = "interpolate_pos_encoding" in forward
        self.dropout = nn.Dropout(dropout_out)
        self._frozen: list[nn.Module] = []
        if freeze is True:
            self.freeze_until(None)
        elif freeze:
            self._frozen = freeze_first(self.layers(), freeze, backbone)
        self.train()
        self.out_features = self.width(output_layer)

    @staticmethod
    def fetch(*, backbone: str, pretrained: bool | str = True, **_: Any) -> None:
        """Download the ImageNet weights that the constructor with these arguments takes.

        Raises:
            ConfigError: they cannot be had.
        """
        if pretrained is not True:
            return
        if is_hub_name(backbone):
            load_config("backbone", backbone, {})
        elif backbone in models.list_models(module=models):
            weights = published_weights(backbone)
            if not cached_file(weights).is_file():
                with downloading(backbone):
                    weights.get_state_dict(progress=True, check_hash=True)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Switch between training and evaluation; what is frozen stays in evaluation."""
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
        last = self.network if layer is None else find_layer(self.network, layer, "freeze")
        inside = set(last.modules())
        reached = False
        for module in self.network.modules():
            reached = reached or module is last
            if reached and module not in inside:
                break
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if module in inside or last not in set(module.modules()):  # a parent goes on behind it
                self._frozen.append(module)
        self.train(self.training)

    def layers(self) -> list[Layer]:
        """The layers of the backbone in order: the embedding first, the head last.

        Names are those inside `network`. What lies behind `output_layer` was removed and is in
        none of them.
        """
        return layers_of(self.network, _members(self.network))

    def parameters_by_block(self) -> list[list[nn.Parameter]]:
        """The parameters of the backbone by block, in order, for rates that differ by depth.

        What comes before the first block is a group of its own; the head belongs to the last block.
        """
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
        """One vector an image, [B, F]: the output, averaged over positions if it has several."""
        features = self.features(images, [self.output_layer])[self.output_layer]
        return self.dropout(pool(features))

    def pooled_images(
        self, images: Tensor, mask: Tensor | None, counts: list[int] | None = None
    ) -> Tensor:
        """One vector a sample, [B, F], of one image or the mean over several.

        Args:
            images: [B, 3, H, W], or [B, N, 3, H, W] with a mask.
            mask: which of the images exist, bool [B, N]; only these are encoded.
            counts: how many of each sample exist; without it a GPU has to be waited for.

        Raises:
            ConfigError: if there are several images, but no mask.
        """
        if images.ndim == 4:
            return self.pooled(images)
        if mask is None:
            raise ConfigError(
                f"This model takes images [B, 3, H, W], or several a sample with a mask, but got "
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
        options: dict[str, Any] = {}
        if self.trained_size not in (None, tuple(images.shape[-2:])) and self.interpolates:
            options["interpolate_pos_encoding"] = True
        try:
            return self._outputs(
                layers,
                lambda: self.network(
                    images.contiguous(memory_format=torch.channels_last), **options
                ),
            )
        except ValueError as error:
            if self.trained_size is None:
                raise
            raise ConfigError(
                f"{self.backbone} does not take images of {images.shape[-2]} x "
                f"{images.shape[-1]} pixels ({error}). It is made for {self.trained_size[0]} x "
                f"{self.trained_size[1]}: set the crop of the images to that."
            ) from error

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
        with torch.no_grad():
            outputs = self._outputs(
                [layer], lambda: functional_call(self.network, state, (images,))
            )
        self.network.train(training)
        return outputs[layer].shape

    def _outputs(self, layers: list[str], run: Callable[[], object]) -> dict[str, Tensor]:
        """The outputs of layers in a run of the network.

        Each layer gets its tap the first time that it is asked for, and keeps it.
        """
        for layer in layers:
            if layer not in self._tapped:
                _tap(self.network, layer, self._kept)
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


def load_backbone(
    name: str,
    output_layer: str,
    pretrained: bool | str,
    filled: Filled | None = None,
    read: ReadEncoder | None = None,
) -> nn.Module:
    """A backbone that ends at a layer.

    Args:
        name: a classification network of torchvision, a hub name or a local folder.
        output_layer: the last layer kept.
        pretrained: published weights, random ones, or those of another run or of a file.
        filled: given when a checkpoint fills the weights afterwards.
        read: reads the weights of another run or of a file.

    Raises:
        ConfigError: if the backbone, the layer or the weights cannot be had.
    """
    if filled is not None:
        pretrained = False
    if is_hub_name(name) or (filled is not None and filled.config_of("cnn")):
        return _hub_backbone(name, output_layer, pretrained, filled, read)
    known = models.list_models(module=models)
    if name not in known:
        raise ArgumentError(
            {
                "backbone": f"'{name}' is neither a classification network of torchvision nor a "
                f"folder nor a hub name (owner/model).{nearest(name, known)} torchvision has: "
                f"{', '.join(known)}."
            }
        )
    network = _torchvision_network(name, published=pretrained is True)
    whole = set(network.state_dict())
    file = None
    if isinstance(pretrained, str):
        file = read_pretrained(read, "cnn", pretrained, network)
    head = _head(network)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # second classifiers, used in training only
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
    _cut(network, output_layer)
    if file is not None:
        file.fill(network, cut=whole, head=None if file.of_run else head)
    return network


def _members(network: nn.Module) -> list[nn.Module]:
    """The members of the outermost containers of at least two members with parameters."""
    found: list[nn.Module] = []
    for child in network.children():
        members = [m for m in child.children() if any(True for _ in m.parameters())]
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(members) > 1:
            found += members
        else:
            found += _members(child)
    return found


def existing_places(mask: Tensor, counts: list[int] | None = None) -> Tensor:
    """The places of the images that exist among those of all samples, in their order, int64 [M].

    Args:
        mask: which of the images exist, bool [B, N].
        counts: how many of each sample exist; without it a GPU has to be waited for.
    """
    count = int(mask.sum()) if counts is None else sum(counts)
    return (~mask).flatten().byte().argsort(stable=True)[:count]


def by_sample(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """What was made of the images that exist, [M, ...], as [B, N, ...], zero for the others."""
    padded = values.new_zeros(mask.numel(), *values.shape[1:])
    return padded.index_copy(0, places, values).unflatten(0, mask.shape)


def mean_of_images(values: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """The mean over the images of each sample, [M, F] to [B, F]."""
    total = by_sample(values, mask, places).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1)


def find_layer(network: nn.Module, layer: str, key: str = "output_layer") -> nn.Module:
    """The layer of a name, unless it does not exist or was cut off.

    Args:
        network: what `load_backbone` returned.
        layer: a top-level child or a dotted name.
        key: the configuration key that names it, for messages.

    Raises:
        ConfigError: listing the layers there are.
    """
    named = dict(network.named_modules())
    if layer and isinstance(named.get(layer), nn.Module) and not isinstance(named[layer], Removed):
        return named[layer]
    top = [name for name, child in network.named_children() if not isinstance(child, Removed)]
    top += ["avgpool"] if "avgpool" not in named else []
    kept = [name for name, module in named.items() if not isinstance(module, Removed)]
    why = "lies behind output_layer" if layer in named else "does not exist"
    raise ArgumentError(
        {
            key: f"the layer '{layer}' of {type(network).__name__} {why}. "
            f"Allowed: {', '.join(top)}, or a layer inside one of them by its dotted name."
            f"{nearest(layer, [*kept, 'avgpool'])}"
        }
    )


def pool(features: Tensor) -> Tensor:
    """The mean over positions, [B, F], of features [B, F], [B, T, F] or [B, F, H, W]."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


def image_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width that a model of transformers was made for; None where none is stated."""
    size = (
        getattr(network.config, "image_size", None)
        if isinstance(network, PreTrainedModel)
        else None
    )
    if not size:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


class Removed(nn.Identity):
    """Stands where a layer was that lies behind the last one kept."""


def _head(network: nn.Module) -> str:
    """Name of the classifier, which torchvision puts last."""
    return list(dict(network.named_children()))[-1]


def _cut(network: nn.Module, output_layer: str) -> None:
    """Replace everything behind a layer, so that it costs nothing and has no parameters."""
    path = output_layer
    if output_layer == "avgpool" and not hasattr(network, "avgpool"):
        children = [child for child, _ in network.named_children()]
        network.add_module(children[-1], Removed())
        return
    find_layer(network, output_layer)
    while path:
        parent_name, _, child_name = path.rpartition(".")
        parent = network.get_submodule(parent_name)
        # Inside other modules the order of children need not be that of execution.
        if parent is network or isinstance(parent, nn.Sequential | nn.ModuleList):
            children = [child for child, _ in parent.named_children()]
            for child in children[children.index(child_name) + 1 :]:
                iterated = isinstance(parent.get_submodule(child), nn.ModuleList)
                parent.add_module(child, nn.ModuleList() if iterated else Removed())
        path = parent_name


def _torchvision_network(name: str, *, published: bool) -> nn.Module:
    with warnings.catch_warnings():  # two networks announce a change of their random start
        warnings.simplefilter("ignore", FutureWarning)
        if not published:
            return models.get_model(name, weights=None)
        with downloading(name):
            return models.get_model(name, weights=published_weights(name))


def is_hub_name(backbone: str) -> bool:
    """Whether a backbone is a model of transformers, by hub name or folder."""
    return "/" in backbone or Path(backbone).is_dir()


def published_weights(name: str) -> WeightsEnum:
    """The ImageNet weights of a network of torchvision.

    They are the first published ones, as published results used them; some networks have others.
    """
    choices: Any = models.get_model_weights(name)
    found: WeightsEnum = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
    return found


def cached_file(weights: WeightsEnum) -> Path:
    """The folder of weights that torch has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Turn what a download of the ImageNet weights of a network raises into a message.

    Raises:
        ConfigError: they cannot be had.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cache = cached_file(published_weights(name))
        raise ArgumentError(
            {
                "pretrained": f"the ImageNet weights of {name} could not be downloaded "
                f"({error}). Set pretrained=false to start from random weights, or "
                f"pretrained=<path> to a file with a state dict of {name}, or put {cache.name} "
                f"where torch looks for it: {cache}"
            }
        ) from error


def _hub_backbone(
    name: str,
    output_layer: str,
    pretrained: bool | str,
    filled: Filled | None,
    read: ReadEncoder | None,
) -> nn.Module:
    if output_layer not in HUB_OUTPUTS:
        raise ArgumentError(
            {
                "output_layer": f"'{output_layer}' is not an output of a transformers model. "
                f"Allowed: {', '.join(HUB_OUTPUTS)}.{nearest(output_layer, HUB_OUTPUTS)}"
            }
        )
    saved = None if filled is None else filled.config_of("cnn")
    config = load_config("backbone", name, {}, saved)
    network = load_model(
        "backbone",
        name,
        config,
        pooler=output_layer != "last_hidden_state",
        weights=pretrained is True,
    )
    if network.main_input_name != "pixel_values":
        raise ArgumentError(
            {"backbone": f"{name}, a {config.model_type} model, does not take images alone."}
        )
    if isinstance(pretrained, str):
        read_pretrained(read, "cnn", pretrained, network).fill(network, head="classifier")
    return network


@dataclass(eq=False)
class _Tap:
    """Keeps the output of a layer whenever the network runs.

    An object rather than a function, so that a copy of the network keeps its outputs apart.

    Args:
        layer: its name.
        kept: where the output goes: [B, F] for a layer that leaves one position, [B, T, C] for one
            of tokens and [B, C, H, W] for others.
        channels_last: whether the layer gives [B, H, W, C].
    """

    layer: str
    kept: dict[str, Tensor]
    channels_last: bool = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.AdaptiveAvgPool2d) and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        elif self.channels_last:
            value = value.permute(0, 3, 1, 2)
        self.kept[self.layer] = value


class _HubTap(_Tap):
    """The same for a model of transformers, of whose outputs one is asked for."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pooled = output.get("pooler_output")
        if self.layer == "last_hidden_state" or pooled is None:
            value = output.last_hidden_state
            self.kept[self.layer] = value if self.layer == "last_hidden_state" else pool(value)
        else:
            self.kept[self.layer] = pooled.flatten(1)


class _InputTap(_Tap):
    """The same for the input of a classifier."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        self.kept[self.layer] = pool(args[0])


def _tap(network: nn.Module, layer: str, kept: dict[str, Tensor]) -> None:
    """Have the output of a layer put into `kept` whenever the network runs."""
    if isinstance(network, PreTrainedModel):
        network.register_forward_hook(_HubTap(layer, kept))
    elif layer == "avgpool" and not hasattr(network, "avgpool"):
        network.get_submodule(_head(network)).register_forward_pre_hook(_InputTap(layer, kept))
    else:
        # Swin transformers keep channels last up to there.
        last = hasattr(network, "permute") and layer.split(".")[0] in ("features", "norm")
        find_layer(network, layer).register_forward_hook(_Tap(layer, kept, last))
