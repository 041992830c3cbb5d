"""Optimizers that do not fit the weights of a model."""

from __future__ import annotations

from typing import Any

from vilmedic.config.check import Checker
from vilmedic.errors import ConfigError
from vilmedic.registry import REGISTRIES


def check_optimizer(checker: Checker, judged: dict[str, Any]) -> None:
    """Refuse Muon, which updates matrices only, for a model that has other weights.

    Every model of this package has biases and scales of normalisations. A model of a plugin may
    have matrices alone; its weights are looked at when the optimizer is made.

    Args:
        checker: collects the problem.
        judged: the configuration.
    """
    section, node = judged.get("trainor"), judged.get("model")
    if not isinstance(section, dict) or section.get("optimizer") != "Muon":
        return
    proto = node.get("proto") if isinstance(node, dict) else None
    try:
        location = REGISTRIES["model"].location(str(proto))
    except ConfigError:
        return  # reported where it stands
    if location.startswith("vilmedic."):
        checker.report(
            ("trainor", "optimizer"),
            f"given 'Muon', which updates matrices only, and {proto} has biases and other weights "
            "that are none. Use AdamW or another optimizer.",
        )
