"""Conversion of checkpoints of older projects to the format of this one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vilmedic.config.yaml_source import read_file
from vilmedic.errors import CheckpointError

logger = logging.getLogger(__name__)

ZOO_CONFIG = "config.yml"  # beside the one checkpoint of a folder of the original's model zoo
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel training and torch.compile add to weight names."""


def unify(contents: Any, path: Path) -> dict[str, Any]:
    """A checkpoint as `{"model": weights, "config": configuration, ...}`.

    Understood are this project's own and those of the original vilmedic, which have this shape,
    dalle-pytorch's training files (`hparams`, `vae_params`, `weights`), those of the official
    GLoRIA repository (`hyper_parameters`, `state_dict`), and weights alone.

    Args:
        contents: what `load_plain` returned.
        path: the file, for messages.

    Returns:
        `config` holds the model settings of the file under `model`, in configuration keys; it is
        absent for weights alone.

    Raises:
        CheckpointError: there are no weights in it.
    """
    if _are_weights(contents):
        return {"model": contents}
    if isinstance(contents, dict) and "state_dict" in contents and "model" not in contents:
        said = _official_gloria(contents.get("hyper_parameters"), path)
        contents = {"model": contents["state_dict"], "config": {"model": said}}
    if not isinstance(contents, dict) or not ("model" in contents or "weights" in contents):
        raise CheckpointError(f"{path}: not a checkpoint: it has neither 'model' nor 'weights'.")
    if "model" not in contents:
        hparams = contents.get("hparams") or {}
        if "vae_params" in contents:
            hparams = {"dalle": hparams, "vae": contents["vae_params"] or {}}
        contents = {"model": contents["weights"], "config": {"model": hparams}}
    if not _are_weights(contents["model"]):
        what = contents["model"]
        shown = what if isinstance(what, str) else type(what).__name__
        raise CheckpointError(f"{path}: there are no weights in it, but: {shown}")
    return contents


def older_names(
    weights: Mapping[str, Tensor], wanted: Sequence[str], prefixes: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return weights under the names of the current model.

    Args:
        weights: weights by their names in a file.
        wanted: the names that a model has.
        prefixes: prefixes of older formats, newest format first.

    Returns:
        The wanted weights if one of the prefixes gives all of them; otherwise all weights without
        the prefixes of training.
    """
    bare = dict(weights)
    while bare and (
        wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in bare)), None)
    ):
        bare = {name.removeprefix(wrapper): value for name, value in bare.items()}
    for prefix in filter(None, prefixes):
        if all(prefix + name in bare for name in wanted):
            return {name: bare[prefix + name] for name in wanted}
    return bare


def original_names(
    weights: Mapping[str, Tensor], model: nn.Module, *, text: str = ""
) -> dict[str, Tensor]:
    """Weights of a contrastive model of older projects under the names of today.

    The original vilmedic numbers the layers of an image encoder (`visual.cnn.<i>`, later
    `visual.model.<i>`) in the order of the network of torchvision that they are taken from; the
    official GLoRIA repository keeps torchvision's names (`img_encoder.model`). The text encoder is
    `linguistic.encoder` or `text_encoder.model`; a pooler beside it (`linguistic.pooler`) is the
    one that was used. Weights of this project stay as they are.

    Args:
        weights: weights by their names in a file, without the prefixes of training.
        model: the model to fill; its `cnn.network` has the layers by name.
        text: prefix of the names of its text encoder, `encoder.network.`; empty without one.
    """
    bare = {name.removeprefix("gloria."): value for name, value in weights.items()}
    if not any(name.startswith(_ORIGINAL) for name in bare):
        return dict(weights)
    network: Any = model.cnn.network  # type: ignore[union-attr]
    layers = [name for name, _ in network.named_children()]

    def layer(match: re.Match[str]) -> str:
        number = int(match[1])
        return f"cnn.network.{layers[number] if number < len(layers) else number}."

    named: dict[str, Tensor] = {}
    # Sorted, so that of two poolers the one that was used comes last.
    for name in sorted(bare):
        todays = _LAYER.sub(layer, name)
        for old, new in (*_PREFIXES, *((before, text) for before in _TEXT)):
            if todays.startswith(old):
                todays = new + todays.removeprefix(old)
                break
        if not todays.endswith("embeddings.position_ids"):  # the numbers 0, 1, 2, ...
            named[todays] = bare[name]
    types = f"{text}embeddings.token_type_embeddings.weight"
    wanted = model.state_dict()
    if types in wanted and types not in named and f"{text}embeddings.LayerNorm.weight" in named:
        # The original's encoder without `proto` has no token types, which equals embeddings of 0.
        named[types] = torch.zeros_like(wanted[types])
    return named


def without_pooler(weights: Mapping[str, Tensor], text: str) -> dict[str, Tensor]:
    """Return the weights without a pooler that the model does not use, and log its removal.

    Args:
        weights: by the names of today.
        text: prefix of the names of the text encoder.
    """
    unused = [name for name in weights if name.startswith(f"{text}pooler.")]
    if unused:
        logger.info("Left out, as the model uses no pooler: %s", ", ".join(unused))
    return {name: value for name, value in weights.items() if name not in unused}


def zoo_file(folder: Path) -> Path | None:
    """The checkpoint of a folder of the original's model zoo: one .pth and config.yml."""
    # not Path.is_file, which raises for invalid names
    files = list(folder.glob("*.pth")) if os.path.isfile(folder / ZOO_CONFIG) else []
    return files[0] if len(files) == 1 else None


def zoo_config(path: Path) -> dict[str, Any] | None:
    """The configuration beside a checkpoint of the original's model zoo; None elsewhere.

    Raises:
        ConfigError: it cannot be read.
    """
    if zoo_file(path.parent) != path:
        return None
    return read_file(str(path.parent / ZOO_CONFIG)).data


_LAYER = re.compile(r"visual\.(?:cnn|model)\.(\d+)\.")
_PREFIXES = (
    ("visual.cnn.", "cnn.network."),
    ("visual.model.", "cnn.network."),
    ("vis_proj.", "projection.visual."),
    ("lin_proj.", "projection.linguistic."),
    ("img_encoder.model.", "cnn.network."),
    ("img_encoder.", ""),
)
_TEXT = ("linguistic.encoder.", "linguistic.", "text_encoder.model.")
_ORIGINAL = ("visual.cnn.", "visual.model.", "linguistic.", "img_encoder.", "text_encoder.")
_BACKBONES = {"resnext_50": "resnext50_32x4d", "resnext_100": "resnext101_32x8d"}


def _official_gloria(said: Any, path: Path) -> dict[str, Any]:
    """Convert model settings of the official GLoRIA repository to configuration keys."""
    said = said.get("cfg", said) if isinstance(said, Mapping) else {}
    node = said.get("model") or {}
    vision, text = (node.get(part) or {} for part in ("vision", "text"))
    usual = {"aggregate_method": "sum", "norm": False, "agg_tokens": True}
    other = [f"{key} is {text[key]}" for key in usual if text.get(key, usual[key]) != usual[key]]
    if other:
        raise CheckpointError(
            f"{path}: groups tokens into words in another way than GLoRIA here: {', '.join(other)}."
        )
    backbone = str(vision.get("model_name", ""))
    found: dict[str, Any] = {"proto": "GLoRIA"}
    if backbone:
        found["cnn"] = {"backbone": _BACKBONES.get(backbone, backbone.replace("_", ""))}
    if "last_n_layers" in text:
        found["encoder"] = {"last_n_layers": text["last_n_layers"]}
    if "gloria" in node:
        found["loss"] = dict(node["gloria"])
    return found


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(inner, Tensor) for inner in value.values())
    )
