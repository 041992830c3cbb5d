"""Networks of timm as backbones, by name or from a folder that timm wrote."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vilmedic.blocks.backbones import (
    Backbone,
    Kept,
    PublishedPixels,
    Tap,
    Wanted,
    cut_behind,
    find_layer,
)
from vilmedic.blocks.pretrained import DESCRIBED, exported, first_line, read_pretrained
from vilmedic.config.transformers_fields import TIMM
from vilmedic.errors import ArgumentError, CheckpointError, nearest
from vilmedic.manifest import WEIGHTS

try:
    import timm
    from timm.models import get_pretrained_cfg, is_model, list_models, list_pretrained
except ImportError as missing:
    raise ArgumentError(
        {
            "backbone": f"a backbone {TIMM}<name> needs the library timm, which the extra [timm] "
            "brings and which is not installed: pip install '.[timm]' in the clone."
        }
    ) from missing

log = logging.getLogger(__name__)

OUTPUTS = ("avgpool", "forward_features")
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
"""Arguments by which timm networks accept images of any size; the first one supported counts.

A network whose own size is not a multiple of its patch (ViTs of SigLIP at 384 pixels) accepts that
size alone.
"""
MOST_NAMES = 20


class TimmBackbone(Backbone):
    """A network of timm without its classifier.

    Its outputs are `avgpool` (the network without its classifier), `forward_features` (the method
    of that name), or any layer.
    """

    outputs = OUTPUTS

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__(network, name)
        self.usual_size = self.trained_size = _input_size(network)
        self.prefix = int(getattr(network, "num_prefix_tokens", 0))
        self.patch = _patch(network)
        self.channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"

    @classmethod
    def make(cls, wanted: Wanted) -> TimmBackbone:
        """A network that ends at a layer.

        Raises:
            ConfigError: the network, the layer or the weights are not available.
        """
        if wanted.saved is not None:
            try:
                found = _Found(str(wanted.saved["architecture"]), dict(wanted.saved["arguments"]))
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"backbone: what the checkpoint says of its network is damaged: {error}."
                ) from error
        else:
            found = _find(wanted)
        weights = None if not wanted.published else _read(_weights_file(found), found)
        network = _create(found, weights)
        layer = wanted.output_layer
        before = set(network.state_dict())
        if layer == "forward_features":
            network.forward = network.forward_features  # type: ignore[assignment]
        elif layer not in OUTPUTS:
            cut_behind(network, layer, OUTPUTS)
        if wanted.file is not None:
            with torch.device("meta"):
                whole = _create(found, None, classes=None)
            known = before | set(whole.state_dict())
            read_pretrained(wanted.read, "cnn", wanted.file, network).fill(network, cut=known)
        return cls(network, wanted.name)

    @staticmethod
    def fetch(wanted: Wanted) -> None:
        """Look for the network and download its weights.

        Raises:
            ConfigError: they are not available.
        """
        found = _find(wanted)
        if wanted.published:
            _weights_file(found)

    @staticmethod
    def published_pixels(wanted: Wanted) -> PublishedPixels | None:
        """Return the preprocessing in timm's `pretrained_cfg`."""
        found = _find(wanted)
        if not found.said:
            return None
        from timm.data.config import resolve_data_config

        source = f"the pretrained_cfg of {wanted.name}"
        try:
            said = resolve_data_config(pretrained_cfg=dict(found.said))
            side = min(said["input_size"][1:])
            mode = said.get("crop_mode") or "center"
            short = math.floor(side / said["crop_pct"]) if mode == "center" else side
            keys: dict[str, Any] = {"mean": list(said["mean"]), "std": list(said["std"])}
        except (ArithmeticError, LookupError, TypeError, ValueError, AssertionError) as error:
            log.warning(
                "%s cannot be read (%s): images stay as the configuration has them", source, error
            )
            return None
        notes = [] if mode == "center" else [f"its crop_mode is {mode}, here the middle is cut out"]
        if side > short:
            notes.append(f"it pads images to {side} pixels, which is left out here")
        keys |= {"resize": short, "crop": min(side, short)}
        if said["interpolation"] in ("bilinear", "bicubic"):
            keys["interpolation"] = said["interpolation"]
        else:
            notes.append(f"it resizes by {said['interpolation']}, here by bilinear")
        return PublishedPixels(source, keys, tuple(notes))

    def tap(self, layer: str, kept: Kept) -> None:
        """See `Backbone.tap`."""
        if layer in OUTPUTS:
            found = Tap(layer, kept, self.channels_last and layer != "avgpool")
            method = self.network.forward_features
            if layer == "avgpool" or self.network.forward == method:
                self.network.register_forward_hook(found)
            else:
                self.network.forward_features = _Tapped(found, method)  # type: ignore[assignment, arg-type]
            return
        module = find_layer(self.network, layer, outputs=OUTPUTS)
        module.register_forward_hook(Tap(layer, kept, self.channels_last))


@dataclass(eq=False)
class _Tapped:
    """A method of a network whose result is kept.

    Args:
        tap: keeps it.
        method: of the network, which is copied with it.
    """

    tap: Tap
    method: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method gives."""
        output = self.method(*args, **kwargs)
        self.tap(nn.Identity(), args, output)
        return output


@dataclass(frozen=True)
class _Found:
    """A network that timm can make.

    Args:
        architecture: its name without the tag of its weights.
        arguments: of its class.
        said: metadata of its published weights.
        folder: folder of the weights; None for weights on the hub.
        name: the name that was requested.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    said: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    name: str = ""


def _find(wanted: Wanted) -> _Found:
    """The network of a name or of a folder.

    Raises:
        ConfigError: there is none.
    """
    name = wanted.name.removeprefix(TIMM)
    if Path(name).is_dir():
        return _of_folder(Path(exported("backbone", name)), wanted)
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        close = nearest(architecture, list_models())
        raise ArgumentError(
            {
                "backbone": f"timm has no network '{architecture}', and there is no folder "
                f"{Path(name).absolute()}.{close} timm.list_models() lists all."
            }
        )
    tags = [one for one in list_pretrained(f"{architecture}.*") if one.startswith(architecture)]
    if tag and name not in tags:
        raise ArgumentError(
            {
                "backbone": f"timm has no weights '{tag}' of {architecture}.{nearest(name, tags)} "
                f"Allowed: {', '.join(tags[:MOST_NAMES]) or architecture}."
            }
        )
    known = get_pretrained_cfg(name)
    said = {} if known is None else known.to_dict()
    if wanted.published and not said.get("hf_hub_id"):
        raise ArgumentError(
            {
                "pretrained": f"timm has no weights of {name} on the hub. Set pretrained=false to "
                "start from random ones, or give the folder of a local copy as the backbone."
            }
        )
    return _Found(architecture, dict(wanted.config), said, name=name)


def _of_folder(folder: Path, wanted: Wanted) -> _Found:
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str(held["architecture"])
        arguments = dict(held.get("model_args") or {})
        said = dict(held.get("pretrained_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArgumentError(
            {
                "backbone": f"the folder {folder.absolute()} does not hold a network of timm "
                f"(config.json with its architecture, and {WEIGHTS}): {first_line(error)}"
            }
        ) from error
    if not is_model(architecture):
        raise ArgumentError(
            {
                "backbone": f"{folder} holds '{architecture}', which this timm "
                f"({timm.__version__}) does not have.{nearest(architecture, list_models())}"
            }
        )
    if held.get("global_pool") is not None:
        arguments.setdefault("global_pool", held["global_pool"])
    said.setdefault("num_classes", held.get("num_classes", 0))
    arguments = {key: one for key, one in arguments.items() if key != "num_classes"}
    return _Found(architecture, {**arguments, **wanted.config}, said, folder, name=str(folder))


def _weights_file(found: _Found) -> Path:
    """The file of the published weights, downloaded where it is not there.

    Raises:
        ConfigError: there is none.
    """
    if found.folder is not None:
        file = found.folder / WEIGHTS
        if file.is_file():
            return file
        raise ArgumentError(
            {"backbone": f"there is no {file.absolute()}. Other formats are not read here."}
        )
    repository, _, revision = str(found.said["hf_hub_id"]).partition("@")
    file_name = found.said.get("hf_hub_filename") or WEIGHTS
    if not file_name.endswith(".safetensors"):
        file_name = WEIGHTS
    try:
        return Path(hf_hub_download(repository, file_name, revision=revision or None))
    except Exception as error:  # the client raises errors of several libraries
        raise ArgumentError(
            {
                "pretrained": f"the weights of {found.name} could not be downloaded from the hub "
                f"({first_line(error)}). Download them once with a network (hf download "
                f"{repository}), set pretrained=false to start from random weights, or give the "
                f"folder of a local copy: backbone={TIMM}<folder>."
            }
        ) from error


def _read(file: Path, found: _Found) -> dict[str, Tensor]:
    """Weights in float32.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        state = load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArgumentError(
            {"backbone": f"{file} of {found.name} is damaged: {first_line(error)}."}
        ) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _create(
    found: _Found, weights: dict[str, Tensor] | None, *, classes: int | None = 0
) -> nn.Module:
    """A network with random weights or the ones given, without a classifier unless asked.

    Raises:
        ConfigError: its class does not take an argument, or the weights do not fit.
    """
    said = {k: v for k, v in found.said.items() if k not in ("source", "file", "url")}
    given = {**found.arguments, **({} if classes is None else {"num_classes": classes})}
    refused: Exception | None = None
    for more in ANY_SIZE:
        try:
            network: nn.Module = timm.create_model(
                found.architecture,
                pretrained=weights is not None,
                pretrained_cfg=dict(said) or None,
                pretrained_cfg_overlay=(
                    None if weights is None else {"state_dict": weights, "custom_load": False}
                ),
                **{**more, **given},
            )
        except TypeError as error:  # of an argument that the class does not know
            refused = error
        except Exception as error:  # timm and torch raise many kinds
            raise ArgumentError(
                {
                    "config" if found.arguments else "backbone": f"timm cannot make {found.name}"
                    f"{_with(found)}: {type(error).__name__}: {first_line(error)}."
                }
            ) from error
        else:
            if more and not _takes_its_own_size(network):
                continue
            kept = getattr(network, "pretrained_cfg", None)
            if isinstance(kept, dict):
                kept.pop("state_dict", None)
            arguments = {k: v for k, v in {**more, **given}.items() if k != "num_classes"}
            described = {"architecture": found.architecture, "arguments": arguments}
            setattr(network, DESCRIBED, described)
            return network
    raise ArgumentError(_refusal(found, refused)) from refused


def _takes_its_own_size(network: nn.Module) -> bool:
    """Whether a network that takes images of several sizes takes those that it is made for."""
    patch = _patch(network)
    return patch is None or not any(
        side % step for side, step in zip(_input_size(network), patch, strict=True)
    )


def _patch(network: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch in pixels; None for a network without patches."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch is None:
        return None
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    return int(height), int(width)


def _with(found: _Found) -> str:
    return f" with {found.arguments}" if found.arguments else ""


def _refusal(found: _Found, error: Exception | None) -> dict[str, str]:
    """Return what is wrong with the arguments of a network."""
    try:
        with torch.device("meta"):
            whole = timm.create_model(found.architecture)
        known = [*inspect.signature(type(whole).__init__).parameters][1:]
    except Exception:  # then without the list of arguments
        known = []
    unknown = [name for name in found.arguments if known and name not in known]
    if unknown:
        return {
            f"config.{name}": f"is not an argument of {found.architecture} in timm."
            f"{nearest(name, known)} Allowed: {', '.join(known)}."
            for name in unknown
        }
    return {"config": f"timm cannot make {found.name}{_with(found)}: {error}."}


def _input_size(network: nn.Module) -> tuple[int, int]:
    """Return the height and width that a network was trained for."""
    patches = getattr(network, "patch_embed", None)
    size = getattr(patches, "img_size", None) or getattr(network, "img_size", None)
    if size is None:
        said: Any = getattr(network, "pretrained_cfg", None) or {}
        size = tuple(said.get("input_size") or (3, 224, 224))[1:]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
