"""Batch normalisation with statistics over all processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vilmedic.distributed import processes
from vilmedic.distributed.gather import Part


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`torch.nn.SyncBatchNorm` for CPUs, where torch has none.

    Every position counts once, in any process, so that result and gradient equal those of one
    process on the whole batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...] by the mean and the variance of each channel."""
        if not self.training or processes.world_size() == 1:
            return super().forward(input)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        wide = torch.promote_types(input.dtype, torch.float32)
        variance, mean = torch.var_mean(input.to(wide), dims, correction=0)
        count = mean.new_full((1,), input.numel() / input.shape[1])
        part = Part((1,) * processes.world_size(), processes.rank())
        table = part.gather(torch.cat([mean, variance, count]).unsqueeze(0))
        means, variances, counts = table.split([len(mean), len(mean), 1], dim=1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        self._track(mean, variance, counts.sum())
        scale = (variance + self.eps).rsqrt()
        shape = [1, -1, *[1] * (input.ndim - 2)]
        result = (input - mean.view(shape)) * scale.view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions after the channels."""

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of this batch."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum
        move = 1 / self.num_batches_tracked.item() if momentum is None else momentum
        self.running_mean.lerp_(mean, move)
        self.running_var.lerp_(variance * (count / (count - 1)), move)


def synchronize_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with each of its batch normalisations replaced, weights and names kept."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        synced = SyncedBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            setattr(synced, name, value)
        return synced.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child, device))
    return module
