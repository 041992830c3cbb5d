"""How a checkpoint of DALLE differs from the model it is to fill, and the names of older ones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vilmedic.models.dalle_settings import REFUSED, TransformerSettings

POSITIONS = "transformer.pos_emb"
DEFAULTED = ("heads", "dim_head", "attn_types")
"""Settings that no weight tells; what a file leaves out had its default, which never changed."""
STATED = ("text_seq_len", "num_text_tokens")
"""Settings that count where a file states them, as those behind them do."""
SWITCHES = ("rotary_emb", "shift_tokens", "share_input_output_emb")
WITHOUT_EFFECT = ("sparse_attn", "optimize_for_inference")
"""Options that dalle-pytorch ignores, or that change how it computes and not what."""
_INNER = re.compile(r"(transformer\.layers\.layers\.\d+\.[01]\.)(?:fn\.){2,}(.*)")


def setting_differences(
    config: Any, settings: TransformerSettings, num_text_tokens: int
) -> list[str]:
    """Where the transformer of a checkpoint is not the one that is configured.

    Args:
        config: the configuration in the file, if there is one; its node `model.dalle` counts.
        settings: what is configured.
        num_text_tokens: size of the text vocabulary.

    Returns:
        A line for each difference, and for each option that is not offered.
    """
    node = ((config or {}).get("model") or {}).get("dalle") or {}
    if not node:
        return []
    defaults = inspect.signature(TransformerSettings).parameters
    stated = {name: node.get(name, defaults[name].default) for name in DEFAULTED}
    stated |= {name: node[name] for name in (*STATED, *SWITCHES) if node.get(name) is not None}
    stated["attn_types"] = _repeated(stated["attn_types"], settings.depth)
    own = vars(settings) | {"num_text_tokens": num_text_tokens}
    own["attn_types"] = _repeated(settings.attn_types, settings.depth)
    found = [
        f"{name} is {value}, the configuration says {own[name]}"
        for name, value in stated.items()
        if value != own[name]
    ]
    refused = [name for name in REFUSED if name not in WITHOUT_EFFECT and node.get(name)]
    return found + [f"{name} is {node[name]}, but {REFUSED[name]}" for name in refused]


def position_differences(weights: Mapping[str, Tensor], own: Tensor | None) -> list[str]:
    """Whether a file turns by other positions, [1, n, D], than the model."""
    given = weights.get(POSITIONS)
    if given is None or own is None or given.shape != own.shape:
        return []  # names and shapes are compared in any case
    if torch.allclose(given.float(), own.float().cpu(), rtol=1e-3, atol=1e-3):
        return []
    return [
        f"the positions ({POSITIONS}) are others, so dim_head, text_seq_len or the number of image "
        "tokens are not those of the configuration"
    ]


def is_other_vae(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether a file holds another VAE than the one in front of the model."""
    given = {name: weights.get(f"vae.{name}") for name in own}
    return any(
        value is not None
        and value.shape == own[name].shape
        and not torch.equal(value.to(own[name].dtype), own[name].cpu())
        for name, value in given.items()
    )


def todays_names(
    weights: Mapping[str, Tensor],
    names: Iterable[str],
    positions: Tensor | None,
    *,
    shift_tokens: bool,
) -> dict[str, Tensor]:
    """Weights of dalle-pytorch before version 1.4, which nested layers less, under our names.

    Before version 1.1.4 it also left out the last position, which nothing is turned by.

    Args:
        weights: by their names in a file, with or without a prefix.
        names: those of the model.
        positions: those of the model, [1, n, D], or None.
        shift_tokens: whether the model shifts; files with it nest once more.
    """
    nested = "fn." * (3 if shift_tokens else 2)
    todays = {_INNER.sub(rf"\1{nested}\2", name): name for name in names}
    named = {}
    for name, value in weights.items():
        before, found, after = name.partition("transformer.layers.")
        named[before + todays.get(found + after, found + after)] = value
        if positions is None or not name.endswith(POSITIONS):
            continue
        if value.shape == positions[:, None, :-1].shape:
            named[name] = torch.cat((value[:, 0], positions[:, -1:].to(value)), dim=1)
    return named


def _repeated(kinds: Any, depth: int) -> list[str]:
    """The attention of each layer."""
    kinds = [kinds] if isinstance(kinds, str) else list(kinds or ["full"])
    return [kinds[layer % len(kinds)] for layer in range(depth)]
