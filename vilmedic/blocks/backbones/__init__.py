"""Backbones of image encoders: the shared interface, and one module per library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vilmedic.blocks.pretrained import Filled, ReadEncoder
from vilmedic.errors import ArgumentError, ConfigError, nearest

Kept = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """Request for a backbone.

    Args:
        name: the network, as its library calls it, or a folder.
        output_layer: the last layer that is kept.
        pretrained: published weights, random ones, or those of another run or of a file.
        config: settings of the network that differ from its defaults.
        filled: given when a checkpoint will fill the weights.
        read: reads the weights of another run or of a file.
    """

    name: str
    output_layer: str = "avgpool"
    pretrained: bool | str = False
    config: Mapping[str, Any] = field(default_factory=dict)
    filled: Filled | None = None
    read: ReadEncoder | None = None

    @property
    def published(self) -> bool:
        """Whether to load published weights."""
        return self.pretrained is True and self.filled is None

    @property
    def file(self) -> str | None:
        """The run or file that the weights come from."""
        return None if self.filled or isinstance(self.pretrained, bool) else self.pretrained

    @property
    def saved(self) -> dict[str, Any] | None:
        """The network settings in the checkpoint that fills the weights."""
        return None if self.filled is None else self.filled.config_of("cnn")


@dataclass(frozen=True)
class PublishedPixels:
    """Image preprocessing that published weights were trained with.

    Args:
        source: where it is documented.
        keys: values of `mean`, `std`, `resize`, `crop` and `interpolation`, where stated.
        notes: differences of the preprocessing here.
    """

    source: str
    keys: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Backbone:
    """A network that computes image features, cut after a layer.

    One class per library creates its networks and finds their outputs. The object is kept beside
    the network in the encoder, and copied with it.

    Args:
        network: the network.
        name: its name, for messages.

    Attributes:
        trained_size: height and width that it was trained for; None if not stated.
        usual_size: height and width of images for a trial pass.
        prefix: number of class and register tokens before the patch tokens.
        patch: height and width of a patch in pixels; None for a network without patches.
    """

    outputs: tuple[str, ...] = ()
    """Names of outputs that are not layers of the network."""

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network, self.name = network, name
        self.trained_size: tuple[int, int] | None = None
        self.usual_size: tuple[int, int] = (224, 224)
        self.prefix = 0
        self.patch: tuple[int, int] | None = None

    @staticmethod
    def fetch(wanted: Wanted) -> None:
        """Download the files that the backbone needs.

        Raises:
            ConfigError: they are not available.
        """

    @staticmethod
    def published_pixels(wanted: Wanted) -> PublishedPixels | None:
        """Return the preprocessing of its published weights; None if not documented."""
        return None

    def options(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return further arguments of the network for images of a size."""
        return {}

    def tap(self, layer: str, kept: Kept) -> None:
        """Record the output of a layer in `kept` whenever the network runs.

        Raises:
            ConfigError: there is no such layer.
        """
        find_layer(self.network, layer).register_forward_hook(Tap(layer, kept))

    def check_layer(self, layer: str, key: str) -> None:
        """Refuse a name that is not a layer.

        Raises:
            ConfigError: listing the layers there are.
        """
        if layer not in self.outputs:
            find_layer(self.network, layer, key, self.outputs)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the blocks in order, those of a stage one by one."""
        from vilmedic.blocks.repeated import inner_blocks, repeated_blocks

        found: list[nn.Module] = []
        for block in repeated_blocks(self.network):
            found += inner_blocks(block) or [block]
        return found

    def grid(self, tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return rows and columns of a number of patch tokens; None if they form no grid.

        What is left beside whole patches is left out by most networks. Those of stages fill it up
        to one more, and halve the grid from stage to stage; they have no class token.

        Args:
            tokens: class and register tokens included.
            size: height and width of the images.
        """
        if self.patch is None:
            return None
        pairs = list(zip(size, self.patch, strict=True))
        rows, columns = (side // patch for side, patch in pairs)
        if rows * columns + self.prefix == tokens:
            return rows, columns
        if self.prefix:
            return None
        rows, columns = (-(-side // patch) for side, patch in pairs)
        while rows * columns > 1:
            if rows * columns == tokens:
                return rows, columns
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return (1, 1) if tokens == 1 else None

    def as_map(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Positions of an output as a map, class and register tokens left out.

        Args:
            features: [B, C, H, W], or [B, T, C] of tokens.
            size: height and width of the images.

        Returns:
            [B, C, h, w].

        Raises:
            ConfigError: the tokens do not form a grid of patches.
        """
        if features.ndim == 4:
            return features
        grid = self.grid(features.shape[1], size) if features.ndim == 3 else None
        if grid is None:
            raise ConfigError(
                f"{self.name} gives {list(features.shape[1:])} for an image of {size[0]} x "
                f"{size[1]} pixels, which does not divide into patches."
            )
        return features[:, self.prefix :].transpose(1, 2).unflatten(2, grid)


class Removed(nn.Identity):
    """Stands where a layer was that lies behind the last one kept."""

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        """Its first input."""
        return input


@dataclass(eq=False)
class Tap:
    """Keeps the output of a layer whenever the network runs.

    An object rather than a function, so that a copy of the network keeps its outputs apart.

    Args:
        layer: its name.
        kept: where the output goes: [B, F] for a layer that leaves one position, [B, T, C] for one
            of tokens and [B, C, H, W] for others.
        channels_last: whether the layer gives [B, H, W, C].
    """

    layer: str
    kept: Kept
    channels_last: bool = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output; torch calls it after the layer."""
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.AdaptiveAvgPool2d) and value.shape[2:] == (1, 1):
            value = value.flatten(1)
        elif self.channels_last and value.ndim == 4:
            value = value.permute(0, 3, 1, 2)
        self.kept[self.layer] = value


def pool(features: Tensor) -> Tensor:
    """The mean over positions, [B, F], of features [B, F], [B, T, F] or [B, F, H, W]."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    return features.mean(dim=1) if features.ndim == 3 else features


def find_layer(
    network: nn.Module,
    layer: str,
    key: str = "output_layer",
    outputs: Sequence[str] = ("avgpool",),
) -> nn.Module:
    """The layer of a name, unless it does not exist or was cut off.

    Args:
        network: a network that was cut.
        layer: a top-level child or a dotted name.
        key: the configuration key that names it, for messages.
        outputs: names that are allowed beside those of layers.

    Raises:
        ConfigError: listing the layers there are.
    """
    named = dict(network.named_modules())
    if layer and isinstance(named.get(layer), nn.Module) and not isinstance(named[layer], Removed):
        return named[layer]
    top = [name for name, child in network.named_children() if not isinstance(child, Removed)]
    top += [name for name in outputs if name not in named]
    kept = [name for name, module in named.items() if not isinstance(module, Removed)]
    why = "lies behind output_layer" if layer in named else "does not exist"
    raise ArgumentError(
        {
            key: f"the layer '{layer}' of {type(network).__name__} {why}. "
            f"Allowed: {', '.join(top)}, or a layer inside one of them by its dotted name."
            f"{nearest(layer, [*kept, *outputs])}"
        }
    )


def cut_behind(network: nn.Module, layer: str, outputs: Sequence[str] = ("avgpool",)) -> None:
    """Replace everything behind a layer, so that it costs nothing and has no parameters.

    Raises:
        ConfigError: there is no such layer.
    """
    find_layer(network, layer, outputs=outputs)
    path = layer
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
