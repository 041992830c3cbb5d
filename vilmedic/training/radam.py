"""RAdam that skips bad steps on the device, without waiting for it (Liu et al. 2020)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vilmedic.device import widest_float
from vilmedic.distributed.gather import local

_SMALL = 1e-20
"""In place of an `eps` of zero."""
_AS_NUMBERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class RAdam(torch.optim.RAdam):
    """`torch.optim.RAdam`, with `found_inf` as the fused optimizers of torch have it.

    "On the Variance of the Adaptive Learning Rate and Beyond", arXiv 1908.03265. What the update
    needs of the number of steps is a number on the device, one for all weights, since a step that
    is left out does not count and the host does not know which these are. Where `found_inf` is 1,
    weights, moments and the count stay as they were. States are those of torch's class.

    Attributes:
        found_inf: float scalar on the device, set before a step and taken away after it.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, unless `found_inf` says otherwise."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for count, parameters in self._by_count(group):
                self._update(group, count, parameters)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's RAdam has it, with a count for each weight."""
        found = super().state_dict()
        found["state"] = {
            index: {name: v.clone() if name == "step" else v for name, v in one.items()}
            for index, one in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the state of torch's RAdam or of this one; waits for the device."""
        super().load_state_dict(state_dict)
        shared: dict[tuple[float, torch.device], Tensor] = {}
        for parameter, moments in self.state.items():
            if isinstance(count := moments.get("step"), Tensor | float | int):
                key = (float(count), local(parameter).device)
                if key not in shared:
                    shared[key] = torch.full((), key[0], device=key[1])
                moments["step"] = shared[key]

    def _by_count(self, group: dict[str, Any]) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The weights that have a gradient, by the steps that they have taken so far."""
        having = [p for p in group["params"] if p.grad is not None]
        fresh = [p for p in having if not self.state[p]]
        for place, parameter in enumerate(fresh):
            count = self.state[fresh[0]]["step"] if place else None
            self.state[parameter] = {
                "step": local(parameter).new_zeros((), dtype=torch.float32)
                if count is None
                else count,
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        sharing = Counter(id(state["step"]) for state in self.state.values() if state)
        sets: dict[int, list[nn.Parameter]] = {}
        for parameter in having:
            sets.setdefault(id(self.state[parameter]["step"]), []).append(parameter)
        found = []
        for number, members in sets.items():
            count = self.state[members[0]]["step"]
            if sharing[number] > len(members):  # others take no step now, and count on their own
                count = count.clone()
                for parameter in members:
                    self.state[parameter]["step"] = count
            found.append((count, members))
        return found

    def _update(self, group: dict[str, Any], count: Tensor, parameters: list[nn.Parameter]) -> None:
        """One step of weights that have taken as many."""
        weights = [local(p.detach()) for p in parameters]
        first = [local(self.state[p]["exp_avg"]) for p in parameters]
        second = [local(self.state[p]["exp_avg_sq"]) for p in parameters]
        found_inf = getattr(self, "found_inf", None)
        taken = torch.ones_like(count) if found_inf is None else 1 - local(found_inf)
        count += taken
        taken = taken.to(widest_float(taken.device))
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]

        slopes = [local(p.grad) for p in parameters if p.grad is not None]
        if group["maximize"]:
            slopes = list(torch._foreach_neg(slopes))
        if decay and group["decoupled_weight_decay"]:
            torch._foreach_mul_(weights, (1 - rate * decay * taken).to(weights[0].dtype))
        elif decay:
            slopes = list(torch._foreach_add(slopes, weights, alpha=decay))
        # Zeros where the step is skipped. Zero times nan is nan, so the bits are multiplied as
        # integers instead.
        kind = _AS_NUMBERS[slopes[0].element_size()]
        torch._foreach_mul_([slope.view(kind) for slope in slopes], taken.to(kind))

        def times(values: list[Tensor], factor: Tensor) -> None:
            torch._foreach_mul_(values, factor.to(values[0].dtype))

        times(first, 1 - (1 - beta1) * taken)
        torch._foreach_add_(first, slopes, alpha=1 - beta1)
        times(second, 1 - (1 - beta2) * taken)
        torch._foreach_addcmul_(second, slopes, slopes, value=1 - beta2)
        # first / (root of second + eps), or while that is not known yet first / eps, times eps.
        eps = group["eps"] or _SMALL
        known, factor = _factor(count, beta1, beta2, eps)
        updates = list(torch._foreach_sqrt(second))
        times(updates, known)
        torch._foreach_add_(updates, eps)
        torch._foreach_reciprocal_(updates)
        times(updates, factor * rate * taken)
        torch._foreach_addcmul_(weights, updates, first, value=-1)


def _factor(count: Tensor, beta1: float, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return whether the variance of the second moment is known yet, and what corrects the update.

    Algorithm 2 of the paper; it is known where the length of the average is above 4 there, and
    above 5 in torch's class.

    Args:
        count: number of the step, from 1, scalar.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: what an update that goes without the second moment was divided by.
    """
    # there is none before the first that is taken
    step = count.to(widest_float(count.device)).clamp(min=1)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction2
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    known = length > 5
    adapted = (share.clamp(min=0) * correction2).sqrt()
    return known, torch.where(known, adapted, eps) / correction1
