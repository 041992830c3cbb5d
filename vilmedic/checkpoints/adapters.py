"""Low-rank adapters in checkpoints, and merging them into the weights of their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vilmedic.errors import CheckpointError

BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
"""Name parts that peft adds to the weights of a layer, and the names of its matrices."""
_ODD = (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError)


def has_adapters(names: Iterable[str]) -> bool:
    """Return whether some weight names belong to adapters."""
    return any(name.endswith(A) for name in names)


def without_adapters(state: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Return a checkpoint with adapters merged into the weights of their layers.

    The weights get the names of an encoder without adapters: W becomes W + alpha / rank * B A, in
    the averages as well. `lora` is removed from the configuration.

    Args:
        state: the contents of a checkpoint; one without adapters is returned as it is.
        path: the file, for messages.

    Raises:
        CheckpointError: its configuration does not give the strength of the adapters.
    """
    if not has_adapters(state["model"]):
        return state
    config = state.get("config") or {}
    model = config.get("model") if isinstance(config, Mapping) else None
    scales: dict[str, float] = {}
    plain = dict(model) if isinstance(model, Mapping) else {}
    try:
        for part, node in plain.items():
            if isinstance(node, Mapping) and isinstance(lora := node.get("lora"), Mapping):
                scales[part] = _scale(lora)
                plain[part] = {key: value for key, value in node.items() if key != "lora"}
        changed = {
            kind: _merged(state[kind], scales) for kind in ("model", "ema") if state.get(kind)
        }
    except _ODD as error:
        raise CheckpointError(
            f"{path or 'The checkpoint'}: is damaged: its configuration says nothing of its "
            f"adapters, or they do not fit their layers ({error})."
        ) from error
    return {**state, **changed, "config": {**config, "model": plain}}


def _scale(lora: Mapping[str, Any]) -> float:
    """alpha / rank of a section `lora`."""
    rank, alpha = float(lora["rank"]), lora.get("alpha")
    return 2.0 if alpha is None else float(alpha) / rank


def _merged(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith((A, B)):
            continue
        layer, base, last = name.rpartition(BASE)
        if not base:
            merged[name] = value
            continue
        if last == "weight" and f"{layer}{A}" in weights:
            # in float64, as what is added is small beside the weight
            product = weights[f"{layer}{B}"].double() @ weights[f"{layer}{A}"].double()
            added = scales[layer.partition(".")[0]] * product.view_as(value)
            value = (value.double() + added).to(value.dtype)
        merged[f"{layer}.{last}"] = value
    return merged
