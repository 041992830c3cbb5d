"""One model in several processes: how it is wrapped, and what becomes one gradient and one state.

Data parallel (`ddp`): every process holds the whole model and gradients are averaged while the
backward pass goes on. Sharded (`fsdp`): every process holds a part of each weight, of its gradient
and of its optimizer state, and gathers a block's weights while it computes with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vilmedic.blocks.repeated import repeated_blocks
from vilmedic.datasets.sample import stable_seed
from vilmedic.distributed import processes
from vilmedic.distributed.gather import Part
from vilmedic.errors import ConfigError
from vilmedic.models.contract import ContrastiveModel, Model
from vilmedic.random_state import seed_everything

BUCKET = 25 * 2**20
"""Bytes of gradients or weights that are exchanged at once."""
_KNOWN = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in _KNOWN)


def seed_this_process(seed: int) -> None:
    """Random numbers of its own for each process but the first: dropout differs between them."""
    if processes.rank():
        seed_everything(stable_seed("process", seed, processes.rank()))


def shard(model: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every weight, in place; whole blocks are gathered at once.

    Raises:
        ConfigError: a weight is a single number without a dimension, which cannot be parted.
    """
    if processes.world_size() == 1:
        return
    single = [name for name, value in model.named_parameters() if value.ndim == 0]
    if single:
        raise ConfigError(
            f"trainor.parallel: given 'fsdp', but the weight '{single[0]}' has no dimension to be "
            "parted along. Make it a vector of one number, or use ddp."
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # parts are cut from memory as it lies
    copy_from_main([*model.parameters(), *model.buffers()])
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if isinstance(model, ContrastiveModel):
        register_fsdp_forward_method(model, "encode")


class Parallel:
    """The forward and the backward pass of a model that several processes train.

    With one process this is the model itself.

    Args:
        model: on its device, sharded or not; the same in all processes once this is made.
        parameters: those that are trained.
    """

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        self.world = processes.world_size()
        self.sharded = isinstance(model, FSDPModule)
        self._buffers = list(model.buffers())
        self._network: nn.Module = model
        # Encoding in chunks adds to gradients once a chunk, and wrappers reduce them at the first.
        self._by_hand = getattr(model, "forward_batch_size", None) is not None
        if self.world > 1 and not self.sharded:
            copy_from_main([*model.parameters(), *model.buffers()])
            if not self._by_hand:
                buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
                self._network = DistributedDataParallel(
                    model,
                    find_unused_parameters=True,
                    gradient_as_bucket_view=True,
                    **buffers,
                )

    def forward(
        self,
        batch: dict[str, Any],
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        part: Part,
    ) -> dict[str, Tensor]:
        """The output of the model for this process's part of a batch.

        The average over the processes of its scalars is what one process gives for the batch.
        A model that encodes in chunks also makes the floats of a chunk only.
        """
        if isinstance(self.model, ContrastiveModel):
            share = part if self.world > 1 else None
            if self.sharded:
                # Weights are gathered by `encode`, whose second pass comes in the backward pass.
                return self.model.forward(batch, prepare, share)
            output: dict[str, Tensor] = self._network(batch, prepare, share)
            return output
        output = self._network(prepare(batch))
        if self.world == 1:
            return output
        return {k: v * part.weight if v.ndim == 0 else v for k, v in output.items()}

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """The context of a forward and backward pass; gradients are averaged in the last of them.

        Sharded gradients are averaged in each: whole ones would not fit.
        """
        if isinstance(self._network, DistributedDataParallel) and not last:
            return self._network.no_sync()
        return nullcontext()

    def finish_gradients(self) -> None:
        """Average what was not averaged during the backward pass."""
        if self.world == 1 or self.sharded or not self._by_hand:
            return
        # A process that had no use for a weight takes part with zeros, unless none had.
        missing = [int(p.grad is None) for p in self.parameters]
        nowhere = [all(column) for column in zip(*processes.exchange(missing), strict=True)]
        gradients = []
        for parameter, unused in zip(self.parameters, nowhere, strict=True):
            if not unused:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)

        def average(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat /= self.world

        _in_buckets(gradients, average)

    def average(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """The averages over the processes of scalars, float32."""
        if self.world == 1 or not scalars:
            return scalars
        values = torch.stack(list(scalars.values()))
        dist.all_reduce(values)
        return dict(zip(scalars, (values / self.world).unbind(), strict=True))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of the gradient of the whole model."""
        total = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
        if not self.sharded:
            return total
        square = total.square()
        dist.all_reduce(square)
        return square.sqrt()

    def flag(self, value: Tensor) -> Tensor:
        """A scalar in the form that an optimizer of these parameters takes."""
        if not self.sharded:
            return value
        mesh = next(p.device_mesh for p in self.parameters if isinstance(p, DTensor))
        return DTensor.from_local(value, mesh, [Replicate()])

    def share_buffers(self) -> None:
        """Running statistics are those of the main process, everywhere."""
        if self.world > 1:
            copy_from_main(self._buffers)


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of one that is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(tree: Any) -> Any:
    """Nested dictionaries and lists with every sharded tensor as a whole one; all must call this.

    What is gathered goes to the CPU, and only in the main process is it kept.
    """
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    if not isinstance(tree, DTensor):
        return tree
    value = tree.full_tensor()
    return value.cpu() if processes.is_main() else None


def like(value: Any, peer: Any) -> Any:
    """A whole tensor as the part of it that this process holds, if its peer is sharded."""
    if not isinstance(peer, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != peer.shape:
        return value
    return distribute_tensor(value.to(peer.device), peer.device_mesh, peer.placements)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A stretch in which every process has all weights, to evaluate as many batches as it likes."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


@torch.no_grad()
def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Fill the tensors of all processes with the values of the main one."""
    _in_buckets(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _in_buckets(tensors: Sequence[Tensor], change: Callable[[Tensor], object]) -> None:
    """Apply a function that changes a tensor in place to many at once, as flat ones."""
    waiting: dict[torch.dtype, list[Tensor]] = {}

    def flush(bucket: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        change(flat)
        pieces = flat.split([tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.data.copy_(piece.view(tensor.shape))
        bucket.clear()

    for tensor in tensors:
        bucket = waiting.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(one.numel() * one.element_size() for one in bucket) >= BUCKET:
            flush(bucket)
    for bucket in waiting.values():
        if bucket:
            flush(bucket)
