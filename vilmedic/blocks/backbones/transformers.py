"""Vision models of transformers as backbones: ViT, DINOv2, ConvNeXt, Swin and their relatives."""

from __future__ import annotations

import inspect
import logging
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from vilmedic.blocks.backbones import (
    Backbone,
    Kept,
    PublishedPixels,
    Tap,
    Wanted,
    find_layer,
    pool,
)
from vilmedic.blocks.pretrained import (
    POOLER,
    exported,
    first_line,
    leave_out_pooler,
    load_config,
    load_model,
    read_pretrained,
)
from vilmedic.config.transformers_fields import HF
from vilmedic.datasets.text import quiet
from vilmedic.errors import ArgumentError, nearest

log = logging.getLogger(__name__)

HUB_OUTPUTS = ("avgpool", "last_hidden_state", "pooler_output")
TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Attributes of transformers embeddings that hold the tokens before the patches."""
POOLERS: dict[str, bool | None] = {"last_hidden_state": False, "pooler_output": True}
"""Whether an output needs the pooler of a class where it is optional; others use it if present."""
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class TransformersBackbone(Backbone):
    """A vision model of transformers.

    Its outputs are `pooler_output` and `last_hidden_state`, as the class defines them, and
    `avgpool`: the pooler's output or, if the class or its weights have none, the mean over
    positions. Regions come from `last_hidden_state` or from a block by its dotted name.
    """

    outputs = HUB_OUTPUTS

    def __init__(self, network: PreTrainedModel, name: str) -> None:
        super().__init__(network, name)
        config = network.config
        self.trained_size = _pair(getattr(config, "image_size", None))
        self.usual_size = self.trained_size or self.usual_size
        self.patch = _pair(getattr(config, "patch_size", None))
        embeddings = getattr(network, "embeddings", None)
        given = [getattr(embeddings, token, None) for token in TOKENS]
        self.prefix = sum(
            1 if token.ndim == 1 else token.shape[1] for token in given if token is not None
        )
        parameters = inspect.signature(network.forward).parameters
        self.interpolates = "interpolate_pos_encoding" in parameters

    @classmethod
    def make(cls, wanted: Wanted) -> TransformersBackbone:
        """A model that gives an output.

        Raises:
            ConfigError: the model or its weights are not available, or it has no such output.
        """
        if wanted.output_layer not in HUB_OUTPUTS:
            raise ArgumentError(
                {
                    "output_layer": f"'{wanted.output_layer}' is not an output of a transformers "
                    f"model. Allowed: {', '.join(HUB_OUTPUTS)}."
                    f"{nearest(wanted.output_layer, HUB_OUTPUTS)}"
                }
            )
        name = _name(wanted)
        config = load_config("backbone", name, dict(wanted.config), wanted.saved, within="config.")
        network = load_model(
            "backbone",
            name,
            config,
            pooler=POOLERS.get(wanted.output_layer),
            weights=wanted.published,
        )
        if network.main_input_name != "pixel_values":
            raise ArgumentError(
                {"backbone": f"{name}, a {config.model_type} model, does not take images alone."}
            )
        if wanted.file is not None:
            file = read_pretrained(wanted.read, "cnn", wanted.file, network)
            poolers = [place for place in network.state_dict() if place.startswith(POOLER)]
            if poolers and wanted.output_layer not in POOLERS and not file.has(POOLER):
                leave_out_pooler(network, wanted.file, poolers)
            file.fill(network, head="classifier")
        return cls(network, name)

    @staticmethod
    def fetch(wanted: Wanted) -> None:
        """Look for the model, its weights and its image processor.

        Raises:
            ConfigError: the model is not available.
        """
        if wanted.published:
            load_config("backbone", _name(wanted), dict(wanted.config), within="config.")

    @staticmethod
    def published_pixels(wanted: Wanted) -> PublishedPixels | None:
        """Return the preprocessing of its image processor."""
        name = wanted.name.removeprefix(HF)
        places = [name]
        if Path(name).is_dir():
            inside = exported("backbone", name)
            places = [inside, name] if inside != name else [name, str(Path(name).parent)]
        for place in places:
            names = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)
            if Path(name).is_dir() and not any((Path(place) / one).is_file() for one in names):
                continue
            try:
                with quiet():
                    processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
                return processed(f"the image processor of {place}", processor)
            except Exception as error:  # transformers raises errors of many kinds
                log.warning(
                    "The image processor of %s cannot be read (%s): images stay as the "
                    "configuration has them",
                    place,
                    textwrap.shorten(first_line(error), 160, placeholder=" ..."),
                )
                return None
        log.warning(
            "%s has no %s: images stay as the configuration has them", name, IMAGE_PROCESSOR_NAME
        )
        return None

    def options(self, size: tuple[int, int]) -> dict[str, Any]:
        """Interpolate positions for images of another size, if the class supports it."""
        if self.interpolates and self.trained_size not in (None, size):
            return {"interpolate_pos_encoding": True}
        return {}

    def tap(self, layer: str, kept: Kept) -> None:
        """See `Backbone.tap`."""
        if layer in HUB_OUTPUTS:
            self.network.register_forward_hook(_OutputTap(layer, kept))
        else:
            find_layer(self.network, layer, outputs=self.outputs).register_forward_hook(
                Tap(layer, kept)
            )


class _OutputTap(Tap):
    """Records one of the outputs of a model."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pooled = output.get("pooler_output")
        if self.layer == "last_hidden_state" or pooled is None:
            value = output.last_hidden_state
            self.kept[self.layer] = value if self.layer == "last_hidden_state" else pool(value)
        else:
            self.kept[self.layer] = pooled.flatten(1)


def processed(source: str, processor: Any) -> PublishedPixels:
    """Return the steps of a transformers image processor as keys of a data set.

    Args:
        source: its name, for messages.
        processor: an image processor.
    """
    said: Mapping[str, Any] = processor.to_dict()
    keys: dict[str, Any] = {}
    notes = []
    scaled = bool(said.get("do_rescale"))
    factor = 255 * said.get("rescale_factor", 1 / 255) if scaled else 255.0
    offset = 1.0 if scaled and said.get("rescale_offset") else 0.0
    mean, std = [0.0], [1.0]
    if said.get("do_normalize") and said.get("image_mean") and said.get("image_std"):
        mean, std = _listed(said["image_mean"]), _listed(said["image_std"])
    if said.get("include_top"):  # EfficientNet divides by its deviation twice
        std = [value**2 for value in std]
    keys["mean"] = [round((value + offset) / factor, 9) for value in mean]
    keys["std"] = [round(value / factor, 9) for value in std]
    size, cut = _size(said.get("size")), _size(said.get("crop_size"))
    if said.get("do_resize") and size is not None:
        short, stretched = size, "shortest_edge" not in said["size"]
        crop = cut if said.get("do_center_crop") and cut is not None else short
        if "crop_pct" in said and said["crop_pct"] and not stretched:
            stretched = short >= 384
            short = short if stretched else int(short / said["crop_pct"])
        if crop > short:
            notes.append(f"it pads images to {crop} pixels, which is left out here")
            crop = short
        keys |= {"resize": short, "crop": crop}
        if stretched:
            notes.append("it stretches images to a square, of which the middle is cut out here")
        resample = said.get("resample")
        if resample in INTERPOLATIONS:
            keys["interpolation"] = INTERPOLATIONS[resample]
        else:
            notes.append(f"it resizes by the method {resample} of pillow, here by bilinear")
    return PublishedPixels(source, keys, tuple(notes))


def _size(given: Any) -> int | None:
    """The short side of a size; None where it states none."""
    if isinstance(given, int):
        return given
    if not isinstance(given, Mapping):
        return None
    sides = [given.get(key) for key in ("shortest_edge", "height", "width")]
    return min((int(side) for side in sides if side), default=None)


def _listed(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list | tuple) else [values]


def _pair(size: Any) -> tuple[int, int] | None:
    if not size:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _name(wanted: Wanted) -> str:
    """The folder or the hub name of a model, or its architecture.

    Raises:
        ConfigError: it is none of these.
    """
    name = wanted.name.removeprefix(HF)
    if wanted.saved is not None or "/" in name or Path(name).is_dir():
        return name
    known = sorted(
        {*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, *MODEL_FOR_BACKBONE_MAPPING_NAMES}
    )
    if name not in known:
        raise ArgumentError(
            {
                "backbone": f"'{name}' is neither a folder nor a hub name (owner/model) nor an "
                f"architecture of transformers for images.{nearest(name, known)} Those are: "
                f"{', '.join(known)}."
            }
        )
    if wanted.published:
        raise ArgumentError(
            {
                "pretrained": f"{HF}{name} is an architecture without weights. Set "
                "pretrained=false to start from random ones, or name a folder or a model of the "
                "hub (owner/model) as the backbone."
            }
        )
    return name
