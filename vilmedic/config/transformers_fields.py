"""Fields of transformers configuration classes, allowed as `**settings` of an encoder."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import griffe

from vilmedic.config.namespaces import Bounds, bounded
from vilmedic.config.signature import (
    Param,
    Signature,
    bases,
    field_params,
    find_class,
    function_params,
    read_module,
)
from vilmedic.config.types import (
    ANY,
    Above,
    AnyOf,
    AtLeast,
    AtMost,
    Basic,
    Below,
    Between,
    Choice,
    ConfigOf,
)
from vilmedic.config.yaml_source import read_file_text
from vilmedic.errors import ConfigError

HF, TIMM = "hf:", "timm/"
"""Prefixes of backbone names of transformers and timm."""

BODIES = {"cxr-bert": "bert", "vit_mae": "vit"}
"""Model types around a known model, and that model, which is loaded instead.

CXR-BERT (Boecking et al. 2022, arXiv 2204.09817) is BERT with a head on top of its first token and
its own Python code. A masked autoencoder (He et al. 2021, arXiv 2111.06377) is a ViT that drops
patches at random and shuffles the others, in evaluation too.
"""


def body_of(stated: Mapping[str, Any]) -> str | None:
    """Return the model type of transformers for a type in `config.json`."""
    found = stated.get("model_type")
    return BODIES.get(found, found) if isinstance(found, str) else None


def model_name(backbone: str) -> str:
    """The folder, or the name in its library, of a backbone."""
    return backbone.removeprefix(HF).removeprefix(TIMM)


def backbone_of(model: Mapping[str, Any]) -> str:
    """Return the backbone of a model's image encoder; empty if its section has none."""
    encoder = model.get("cnn")
    return str(encoder.get("backbone")) if isinstance(encoder, dict) else ""


def model_type_of(mark: ConfigOf, siblings: dict[str, Any]) -> str | None:
    """Return the transformers model type of a node's settings.

    Args:
        mark: the mark of the settings in the signature.
        siblings: the node.

    Returns:
        The type; None if only the hub knows it.
    """
    source = siblings.get(mark.key)
    if source is None:
        return mark.default
    name = str(source).removeprefix(HF)
    if name != str(source) and config_signature(name) is not None:
        return name  # an architecture
    return body_of(stated_fields(name) or {})


def stated_fields(folder: str) -> dict[str, Any] | None:
    """Read the fields in `config.json` of a published model.

    Args:
        folder: its folder.

    Returns:
        None without such a file, as for a model on the hub.
    """
    try:
        found = json.loads(read_file_text(str(Path(folder) / "config.json")))
    except (ConfigError, ValueError, RecursionError):
        return None  # loading the model reports the problem
    return found if isinstance(found, dict) else None


def same_model(one: str, other: str) -> bool | None:
    """Return whether two folders hold a model of the same architecture with the same settings.

    Args:
        one: a folder.
        other: another one.

    Returns:
        None if unknown, because one of them is not available.
    """
    first, second = stated_fields(model_name(one)), stated_fields(model_name(other))
    if first is None or second is None:
        return None
    if body_of(first) != body_of(second):
        return False
    fields = config_signature(str(body_of(first)))
    defaults = {} if fields is None else {k: p.default for k, p in fields.params.items()}
    return all(
        first.get(name, defaults.get(name)) == second.get(name, defaults.get(name))
        for name in {*first, *second} - _NO_SETTINGS - {"model_type"}
        if name in defaults or (name in first and name in second)
    )


# in every config.json, or accepted by every class without being a field
_ALWAYS = (
    "model_type",
    "num_labels",
    "id2label",
    "label2id",
    "output_attentions",
)
# fields about the file and about heads, which do not change features
_NO_SETTINGS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
        "classifier_dropout",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "gradient_checkpointing",
    )
)
# weights are always float32, and trainor.precision sets the arithmetic
_FLOAT32 = frozenset(("dtype", "torch_dtype"))
# The first pattern that matches the whole name of a field applies, for any model.
_MODELS: dict[str, Bounds] = {
    r".*drop.*|.*_prob": (AtLeast(0), Below(1)),
    r"n(um)?_.*(layers?|heads)|n_layers?|.*_layers|.*_heads": (Between(1, 1024),),
    r"vocab_size": (Between(1, 16777216),),
    r".*_token_id": (Between(0, 16777216),),
    r"max_position_embeddings": (Between(1, 1048576),),
    r"chunk_size_feed_forward": (Between(0, 65536),),
    r"initializer_(range|factor)": (Above(0), AtMost(100)),
    r".*_eps(ilon)?": (Above(0), AtMost(1)),
    r"num_labels": (Between(0, 1000000),),
    r"(.*_)?(size|dim|channels|stride)|d_.*": (Between(1, 65536),),
}


def field_bounds(name: str) -> Bounds:
    """Return the bounds of a field, which its signature does not state."""
    return next((b for pattern, b in _MODELS.items() if re.fullmatch(pattern, name)), ())


@cache
def config_signature(model_type: str) -> Signature | None:
    """The fields of the configuration class of a model type, the common ones included.

    Args:
        model_type: as in a model's `config.json`: `bert`, `roberta`.

    Returns:
        The fields; None when transformers has no such file.
    """
    folder = model_type.replace("-", "_")
    name = f"transformers.models.{folder}.configuration_{folder}"
    module = read_module(name)
    if module is None:
        return None
    for member in module.members.values():
        if not isinstance(member, griffe.Class):
            continue
        stated = member.members.get("model_type")
        if isinstance(stated, griffe.Attribute) and str(stated.value).strip("'\"") == model_type:
            return _fields(member.path)
    return None


def _fields(path: str) -> Signature:
    """Annotated attributes and constructor arguments along the base classes."""
    found: dict[str, Param] = {}
    docstrings: list[griffe.Docstring] = []
    queue = [path]
    while queue:
        cls = find_class(queue.pop(0))
        if cls is None:
            continue
        fields = field_params(cls)
        constructor = cls.members.get("__init__")
        if isinstance(constructor, griffe.Function):
            fields |= function_params(constructor)[0]
        for name, param in fields.items():
            found.setdefault(name, replace(param, required=False))
        for name in _renamed(cls):
            found.setdefault(name, Param(name, ANY, required=False))
        if cls.docstring:
            docstrings.append(cls.docstring)
        if cls.name not in ("PreTrainedConfig", "PretrainedConfig"):
            queue += [base for base in bases(cls) if base.startswith("transformers.")]
    for name in _FLOAT32.intersection(found):
        found[name] = Param(name, AnyOf((Choice(("float32",)), Basic("null"))), required=False)
    found["attn_implementation"] = Param(
        "attn_implementation", AnyOf((Choice(("sdpa", "eager")), Basic("null"))), required=False
    )
    for name in _ALWAYS:
        found.setdefault(name, Param(name, ANY, required=False))
    return bounded(Signature(path, found, None, tuple(docstrings)), field_bounds)


def _renamed(cls: griffe.Class) -> list[str]:
    """Return older field names that a configuration class also accepts."""
    member = cls.members.get("attribute_map")
    if not isinstance(member, griffe.Attribute) or member.value is None:
        return []
    try:
        names = ast.literal_eval(str(member.value))
    except (ValueError, SyntaxError):
        return []
    return [str(name) for name in names]
