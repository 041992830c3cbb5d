"""Count how often model weights are converted to 16 bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CONVERSIONS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


class WeightConversions(TorchDispatchMode):
    """Counts conversions by weight name; a view of a weight counts as the weight.

    Args:
        models: models whose weights are counted.
        least: smallest number of dimensions of a counted weight.

    Attributes:
        counts: number of conversions of each weight.
    """

    def __init__(self, *models: nn.Module, least: int = 1) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._names = {
            weight.untyped_storage()._cdata: f"{number}.{name}"
            for number, model in enumerate(models)
            for name, weight in model.named_parameters()
            if weight.ndim >= least
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CONVERSIONS:
            name = self._names.get(args[0].untyped_storage()._cdata)
            result = func(*args, **kwargs or {})
            if name is not None and result.dtype in (torch.bfloat16, torch.float16):
                self.counts[name] += 1
            return result
        return func(*args, **kwargs or {})
