"""Loading transformers models by hub name or local folder, with errors that name the fix."""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)

from vilmedic.config.transformers_fields import BODIES
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.text import OWN_CODE, own_code, quiet
from vilmedic.errors import ArgumentError, CheckpointError, nearest

log = logging.getLogger(__name__)

ATTENTION = "sdpa"
"""Default attention implementation: torch's own kernels."""
DTYPES = ("dtype", "torch_dtype")  # fields that have no effect here
DESCRIBED = "described_as"
"""Attribute of a network that holds its settings, if it has no configuration."""
POOLER = "pooler."
"""Prefix of the weights of the part of a transformers model that only some pooling modes use."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


class EncoderWeights(Protocol):
    """The weights of an encoder in a file: the checkpoint of another run, or a plain state dict."""

    @property
    def of_run(self) -> bool:
        """Whether the file is the checkpoint of a system rather than a state dict."""

    def has(self, beginning: str) -> bool:
        """Whether it has weights whose names begin so."""

    def fill(
        self, network: nn.Module, *, cut: Collection[str] = (), head: str | None = None
    ) -> None:
        """Put the weights into a network.

        Args:
            network: the network to fill.
            cut: names of weights that were removed from the network, which the file may hold.
            head: name of the classifier, which may be missing or of another size.

        Raises:
            ConfigError: they do not fit.
        """

    def check_vocabulary(self, spec: DataSpec) -> None:
        """Refuse a text encoder with another vocabulary than that of this run.

        Raises:
            ConfigError: the vocabularies differ.
        """


ReadEncoder = Callable[[str, str, str, nn.Module], EncoderWeights]
"""Finds and reads the weights of an encoder: `vilmedic.checkpoints.encoders.read_encoder`."""


@dataclass(frozen=True)
class Filled:
    """Marks a model that a checkpoint will fill, so that published weights are not needed.

    Args:
        networks: the settings of each transformers or timm network in it, by the network's name
            in the model, as `network_configs` returns them; folders and the hub are not read.
        adapters: whether to build the adapters of `lora`, as for a resumed run; otherwise
            they are merged into the weights.
    """

    networks: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    adapters: bool = False

    def config_of(self, part: str) -> dict[str, Any] | None:
        """The configuration of the network in a part of the model, such as `encoder`."""
        found = [one for name, one in self.networks.items() if name.split(".")[0] == part]
        return found[0] if found else None


def read_pretrained(
    read: ReadEncoder | None, part: str, name: str, network: nn.Module
) -> EncoderWeights:
    """Read the weights that `pretrained` names, for the class that builds the encoder.

    Raises:
        ConfigError: they are not available.
    """
    if read is None:
        raise ArgumentError({"pretrained": f"given '{name}', but nothing is given that reads it."})
    return read("pretrained", name, part, network)


def network_configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the settings of each transformers or timm network in a model, as plain values.

    A network whose weights checkpoints leave out gives its `stated_network`.
    """
    found = {
        name: module.config.to_dict()
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
    }
    found |= {
        name: getattr(module, DESCRIBED)
        for name, module in model.named_modules()
        if hasattr(module, DESCRIBED)
    }
    for name, module in model.named_modules():
        stated: dict[str, Any] = getattr(module, "stated_network", dict)()
        if stated:
            found[name] = stated
    outer = {n: c for n, c in found.items() if not any(n.startswith(f"{o}.") for o in found)}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(outer, default=str))
    return plain


def load_config(
    key: str,
    name: str,
    settings: dict[str, Any],
    saved: dict[str, Any] | None = None,
    *,
    within: str = "",
) -> PretrainedConfig:
    """The configuration of a published model, with some of its fields changed.

    Python that comes with a model is never executed.

    Args:
        key: the argument that holds the name, for messages.
        name: a local folder or a hub name; for a backbone also an architecture, such as dinov2.
        settings: fields to change.
        saved: the configuration in a checkpoint, used instead of the folder.
        within: prefix of field names in the configuration, for messages.

    Raises:
        ConfigError: the model is not available, has no such field, or needs its own Python code.
            CheckpointError: the settings in the checkpoint are damaged.
    """
    if saved is not None:
        try:
            return AutoConfig.for_model(**saved)
        except Exception as error:  # whatever a class of transformers makes of other values
            raise CheckpointError(
                f"{key}: what the checkpoint says of its network is damaged: {first_line(error)}."
            ) from error
    name = exported(key, name)
    folder = Path(name)
    if key == "backbone" and name in CONFIG_MAPPING and not folder.is_dir():
        _with_settings(AutoConfig.for_model(name), name, settings, within)
        try:
            return AutoConfig.for_model(name, **settings)  # some fields follow from others
        except Exception as error:  # whatever a class of transformers makes of other values
            raise ArgumentError(
                {"config": f"{name} does not take {settings}: {first_line(error)}."}
            ) from error
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise ArgumentError(
            {
                key: f"there is no folder {folder.absolute()}, and '{name}' is not a hub name "
                f"(owner/model) either. Download the model into that folder or correct {key}."
            }
        )
    try:
        config = _body(name) or AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArgumentError({key: _not_found(key, name, error)}) from error
    except Exception as error:  # a damaged file: nested too deeply, not a mapping
        raise ArgumentError({key: _unusable(name, error)}) from error
    if type(config) not in MODEL_MAPPING:
        raise ArgumentError(
            {
                key: f"{name} is a {config.model_type} model, which transformers cannot load as "
                "one encoder. Give a model of text, or of images, alone."
            }
        )
    return _with_settings(config, name, settings, within)


def _with_settings(
    config: PretrainedConfig, name: str, settings: dict[str, Any], within: str
) -> PretrainedConfig:
    """A configuration with some of its fields changed.

    Raises:
        ConfigError: there is no such field, or it does not take the value.
    """
    known = config.to_dict()
    if given := [field for field in DTYPES if field in settings]:
        raise ArgumentError(
            {
                f"{within}{given[0]}": "weights are float32 here, in whatever precision a file has "
                "them. Leave it out; trainor.precision and ensemblor.precision set that of the "
                "computation."
            }
        )
    unknown = [field for field in settings if field not in known]
    if unknown:
        raise ArgumentError(
            {
                within + field: f"is not a setting of {type(config).__name__}, which {name} uses."
                f"{nearest(field, known)}"
                for field in unknown
            }
        )
    for field_name, value in settings.items():
        setattr(config, field_name, value)
    return config


def _body(name: str) -> PretrainedConfig | None:
    """Return the configuration of the known model inside another one.

    Python code that comes with it is never read. The weights carry the names of the inner model;
    other weights in the file belong to heads that are not used.
    """
    stated, _ = PretrainedConfig.get_config_dict(name)
    if not isinstance(stated, dict) or stated.get("model_type") not in BODIES:
        return None
    body = AutoConfig.for_model(BODIES[stated["model_type"]])
    log.info(
        "%s is a %s: its %s body is used, without its heads%s",
        name,
        stated["model_type"],
        body.model_type,
        " and its Python code" if stated.get("auto_map") else "",
    )
    known = body.to_dict().keys() - {"model_type", "architectures", *DTYPES}
    return AutoConfig.for_model(
        body.model_type, **{field: value for field, value in stated.items() if field in known}
    )


def load_model(
    key: str,
    name: str,
    config: PretrainedConfig,
    *,
    pooler: bool | None,
    weights: bool = True,
    attention: str = ATTENTION,
) -> PreTrainedModel:
    """A published model with its weights; safetensors are preferred, pickles are not executed.

    Weights are float32, in whatever precision the file has them. Of an encoder-decoder it is the
    encoder.

    Args:
        key: the argument that holds the name, for messages.
        name: a local folder or a hub name.
        config: the result of `load_config`.
        pooler: whether the pooled output is used; if not, a class that allows it gets no pooler.
            None uses the default of the class, if the file has weights for it.
        weights: whether to load the weights, or to leave them random.
        attention: attention implementation, `sdpa` or `eager`; classes without `sdpa` use
            `eager`.

    Raises:
        ConfigError: the weights are not available or do not fit the configuration.
    """
    architecture: Any = MODEL_MAPPING[type(config)]
    options: dict[str, Any] = {}
    has_pooler = inspect.signature(architecture.__init__).parameters.get("add_pooling_layer")
    if has_pooler is not None:
        own_choice = getattr(config, "add_pooling_layer", has_pooler.default)
        options["add_pooling_layer"] = own_choice if pooler is None else pooler
    kernels = getattr(architecture, "_supports_sdpa", False)
    options["attn_implementation"] = attention if kernels else "eager"
    if not weights:
        config.dtype = torch.float32
        return _encoder(AutoModel.from_config(config, trust_remote_code=False, **options))
    name = exported(key, name)
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                dtype=torch.float32,
                trust_remote_code=False,
                **options,
            )
    except OSError as error:
        raise ArgumentError({key: _not_found(key, name, error)}) from error
    except Exception as error:  # readers of files raise errors of many libraries
        raise ArgumentError({key: _unusable(name, error)}) from error
    network = _encoder(model)
    own = {id(value) for value in (*network.parameters(), *network.buffers())}
    used = {place for place, value in model.state_dict(keep_vars=True).items() if id(value) in own}
    fresh = sorted(set(info["missing_keys"]) & used)
    if pooler is None and any(place.startswith(POOLER) for place in fresh):
        fresh = leave_out_pooler(network, name, fresh)
    if fresh:
        log.warning(
            "%s has no weights for %s; they start at random values, and stay so where they are "
            "frozen.",
            name,
            ", ".join(fresh),
        )
    return network


def leave_out_pooler(network: PreTrainedModel, name: str, fresh: Collection[str]) -> list[str]:
    """Remove the pooler of a model without weights for it, if the class allows that.

    Args:
        network: the model; its configuration records the removal.
        name: the file or the model, for messages.
        fresh: names of all weights that are missing.

    Returns:
        The names that are still missing.
    """
    if "add_pooling_layer" not in inspect.signature(type(network).__init__).parameters:
        return list(fresh)
    log.info("%s has no weights for its pooler: the mean over positions is taken", name)
    network.pooler = None  # type: ignore[assignment]
    network.config.add_pooling_layer = False
    return [place for place in fresh if not place.startswith(POOLER)]


def exported(key: str, name: str) -> str:
    """Return the folder of the encoder in an exported folder after verifying it; keep other names.

    Raises:
        ConfigError: the export is damaged or has no such encoder.
    """
    from vilmedic.manifest import IMAGE_ENCODER, TEXT_ENCODER, exported_part

    try:
        return exported_part(name, IMAGE_ENCODER if key == "backbone" else TEXT_ENCODER)
    except CheckpointError as error:
        raise ArgumentError({key: str(error)}) from error


def _encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the encoder part of a model, in float32."""
    encodes = model.get_encoder() if model.config.is_encoder_decoder else model
    return encodes.float()


def _not_found(key: str, name: str, error: Exception) -> str:
    if OWN_CODE in str(error):
        usable = "Without it nothing of it can be used."
        if (Path(name) / "tokenizer.json").is_file():
            usable = (
                "Without it its tokenizer can be used, as there is a tokenizer.json: the data set "
                f"takes tokenizer={name}."
            )
        elif not Path(name).is_dir():
            usable = "Without it no more than its tokenizer can be used, if it has tokenizer.json."
        allowed = f"Allowed for {key}: a model whose architecture transformers has."
        return own_code(name, f"{usable} {allowed}")
    if Path(name).is_dir():
        return (
            f"the folder {Path(name).absolute()} does not hold a transformers model "
            f"(config.json and model.safetensors or pytorch_model.bin): {first_line(error)}"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached or has no such model"
    return (
        f"there is no folder {Path(name).absolute()}, '{name}' is not in the local cache of "
        f"the hub, and {why}. Download the model once with a network (hf download {name}), or set "
        f"{key} to the folder of a local copy."
    )


def _unusable(name: str, error: Exception) -> str:
    """Return why existing weights cannot be loaded."""
    if isinstance(error, RuntimeError) and "mismatch" in str(error):
        return (
            f"the weights of {name} do not fit its settings: {first_line(error)}. "
            "Leave out the settings that change the shape of weights."
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"pytorch_model.bin of {name} is damaged, or holds Python objects, which are "
            "never executed here. Take the model's model.safetensors, or fetch it again."
        )
    reason = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
    return (
        f"the model {name} cannot be loaded ({reason}): its files are damaged, or do not "
        "fit its settings. Fetch it again, or leave out its settings."
    )


def first_line(error: Exception) -> str:
    """Return the first line of a transformers message; the others are its own advice."""
    return str(error).strip().partition("\n")[0].rstrip(".")
