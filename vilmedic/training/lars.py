"""LARS: momentum with a learning rate for each layer, for large batches (You et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vilmedic.config.types import Above, AtLeast, AtMost, Below, Between, Portion
from vilmedic.distributed.gather import local

_AS_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class LARS(Optimizer):
    """SGD with momentum whose step is, in each layer, in proportion to the size of its weights.

    "Large Batch Training of Convolutional Networks", arXiv 1708.03888. With a gradient g, a weight
    tensor w and its decay b, the rate of a layer is that of the group times

        trust_coefficient * |w| / (|g| + b |w| + eps),

    or the rate as it is where w or g is zero. Biases and what normalisations learn, tensors of one
    dimension, are neither adapted nor decayed, as SimCLR has it (Chen et al. 2020, arXiv
    2002.05709), whose settings are the defaults; their rate of 0.3 is for a batch of 256. Nothing
    waits for a GPU: where `found_inf` is 1, weights and momentum stay as they were. Of sharded
    weights the norms are those of the whole tensors.

    Args:
        params: what is updated.
        lr: learning rate.
        momentum: share of the last update that is added to the next one.
        weight_decay: share of the weights that is added to the gradient, before it is adapted.
        trust_coefficient: size of an update in proportion to the weights, at a rate of 1.
        eps: keeps the divisor above zero.
        nesterov: look ahead along the momentum.

    Attributes:
        found_inf: float scalar on the device, set before a step and taken away after it.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor

    def __init__(
        self,
        params: Any,
        lr: Annotated[float, Above(0), AtMost(1000)] = 0.3,
        momentum: Annotated[float, AtLeast(0), Below(1)] = 0.9,
        weight_decay: Annotated[float, Between(0, 1000)] = 1e-6,
        trust_coefficient: Portion = 0.001,
        eps: Annotated[float, Above(0), AtMost(1)] = 1e-8,
        nesterov: bool = False,
    ) -> None:
        if nesterov and not momentum:
            raise ValueError("nesterov looks ahead along the momentum, which is 0")
        options = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
        }
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, unless `found_inf` says otherwise."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            for adapted in (True, False):
                if parameters := [p for p in having if (p.ndim > 1) is adapted]:
                    self._update(group, parameters, adapted=adapted)
        return loss

    def _update(
        self, group: dict[str, Any], parameters: list[nn.Parameter], *, adapted: bool
    ) -> None:
        """Take one step of weights of which either all are adapted or none."""
        weights = [local(p.detach()) for p in parameters]
        slopes = [local(p.grad) for p in parameters if p.grad is not None]
        found_inf = getattr(self, "found_inf", None)
        rate, momentum = group["lr"], group["momentum"]
        if found_inf is not None:
            # Zero times nan is nan, so the bits are multiplied instead.
            taken = 1 - local(found_inf)
            kind = _AS_NUMBERS[slopes[0].element_size()]
            torch._foreach_mul_([slope.view(kind) for slope in slopes], taken.to(kind))
            taken = taken.double()
            rate = (rate * taken).to(weights[0].dtype)
            momentum = (momentum * taken + (1 - taken)).to(weights[0].dtype)
        if adapted:
            decay, rates = group["weight_decay"], self._trust(group, parameters, weights, slopes)
            slopes = list(torch._foreach_add(slopes, weights, alpha=decay))
            if found_inf is not None:
                rates = rates * taken
            torch._foreach_mul_(slopes, list(rates.to(weights[0].dtype).unbind()))
        if group["momentum"]:
            for parameter in parameters:
                if self.state[parameter].get("momentum_buffer") is None:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            averages = [local(self.state[p]["momentum_buffer"]) for p in parameters]
            torch._foreach_mul_(averages, momentum)
            torch._foreach_add_(averages, slopes)
            if group["nesterov"]:
                slopes = list(torch._foreach_add(slopes, averages, alpha=group["momentum"]))
            else:
                slopes = averages
        torch._foreach_sub_(weights, torch._foreach_mul(slopes, rate))

    def _trust(
        self,
        group: dict[str, Any],
        parameters: list[nn.Parameter],
        weights: list[Tensor],
        slopes: list[Tensor],
    ) -> Tensor:
        """Return the learning-rate factor of each weight tensor, [tensors]."""
        norms = torch.stack([*torch._foreach_norm(weights), *torch._foreach_norm(slopes)])
        if isinstance(parameters[0], DTensor):
            squares = norms.square()
            dist.all_reduce(squares, group=parameters[0].device_mesh.get_group())
            norms = squares.sqrt()
        weight, slope = norms.chunk(2)
        trust = group["trust_coefficient"] * weight
        trust = trust / (slope + weight * group["weight_decay"] + group["eps"])
        return torch.where((weight > 0) & (slope > 0), trust, 1.0)
