"""Classification networks of torchvision as backbones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum

from vilmedic.blocks.backbones import (
    Backbone,
    Kept,
    Removed,
    Tap,
    Wanted,
    cut_behind,
    find_layer,
    pool,
)
from vilmedic.blocks.pretrained import read_pretrained
from vilmedic.errors import ArgumentError, nearest


class TorchvisionBackbone(Backbone):
    """A classification network of torchvision; `avgpool` is the input of the classifier."""

    outputs = ("avgpool",)

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__(network, name)
        size = getattr(network, "image_size", None)
        if size:
            self.usual_size = (size, size)
        patch = getattr(network, "patch_size", None)
        if isinstance(patch, int) and hasattr(network, "class_token"):
            self.patch, self.prefix = (patch, patch), 1

    @classmethod
    def make(cls, wanted: Wanted) -> TorchvisionBackbone:
        """A network that ends at a layer.

        Raises:
            ConfigError: the network, the layer or the weights are not available.
        """
        name = wanted.name
        known = models.list_models(module=models)
        if name not in known:
            raise ArgumentError(
                {
                    "backbone": f"'{name}' is neither a classification network of torchvision nor "
                    f"a folder nor a hub name (owner/model).{nearest(name, known)} torchvision "
                    f"has: {', '.join(known)}. Networks of timm are written timm/<name>, models of "
                    "transformers hf:<name or folder>."
                }
            )
        if wanted.config:
            raise ArgumentError(
                {
                    "config": f"{name} is a network of torchvision, which are taken as they are. "
                    "Leave it out, or take a backbone timm/<name> or hf:<name>."
                }
            )
        network = _network(name, published=wanted.published)
        whole = set(network.state_dict())
        file = None
        if wanted.file is not None:
            file = read_pretrained(wanted.read, "cnn", wanted.file, network)
        head = _head(network)
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # second classifiers, for training only
            if hasattr(network, auxiliary):
                setattr(network, auxiliary, None)
        if wanted.output_layer == "avgpool" and not hasattr(network, "avgpool"):
            network.add_module(head, Removed())
        else:
            cut_behind(network, wanted.output_layer)
        if file is not None:
            file.fill(network, cut=whole, head=None if file.of_run else head)
        return cls(network, name)

    @staticmethod
    def fetch(wanted: Wanted) -> None:
        """Download the ImageNet weights.

        Raises:
            ConfigError: they are not available.
        """
        if wanted.published and wanted.name in models.list_models(module=models):
            weights = published_weights(wanted.name)
            if not cached_file(weights).is_file():
                with downloading(wanted.name):
                    weights.get_state_dict(progress=True, check_hash=True)

    def tap(self, layer: str, kept: Kept) -> None:
        """See `Backbone.tap`."""
        network = self.network
        if layer == "avgpool" and not hasattr(network, "avgpool"):
            head = network.get_submodule(_head(network))
            head.register_forward_pre_hook(_InputTap(layer, kept))
            return
        # Swin transformers keep channels last up to there.
        last = hasattr(network, "permute") and layer.split(".")[0] in ("features", "norm")
        find_layer(network, layer).register_forward_hook(Tap(layer, kept, last))

    def blocks(self) -> Sequence[nn.Module]:
        """The members of the outermost containers of at least two members with parameters."""
        return _members(self.network)


class _InputTap(Tap):
    """Records the input of a classifier."""

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        self.kept[self.layer] = pool(args[0])


def published_weights(name: str) -> WeightsEnum:
    """The ImageNet weights of a network of torchvision.

    These are torchvision's first weights, which published results used; some have newer ones.
    """
    choices: Any = models.get_model_weights(name)
    found: WeightsEnum = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
    return found


def cached_file(weights: WeightsEnum) -> Path:
    """The folder of weights that torch has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Turn an error while downloading ImageNet weights into a message.

    Raises:
        ConfigError: they are not available.
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


def _network(name: str, *, published: bool) -> nn.Module:
    with warnings.catch_warnings():  # two networks warn that their initialisation will change
        warnings.simplefilter("ignore", FutureWarning)
        if not published:
            return models.get_model(name, weights=None)
        with downloading(name):
            return models.get_model(name, weights=published_weights(name))


def _head(network: nn.Module) -> str:
    """Name of the classifier, which torchvision puts last."""
    return list(dict(network.named_children()))[-1]


def _members(network: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in network.children():
        members = [m for m in child.children() if any(True for _ in m.parameters())]
        if isinstance(child, nn.Sequential | nn.ModuleList) and len(members) > 1:
            found += members
        else:
            found += _members(child)
    return found
