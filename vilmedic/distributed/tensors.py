"""Tensors of several processes: parts and wholes of sharded ones, and many exchanged at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vilmedic.distributed import processes

BUCKET = 25 * 2**20
"""Bytes of gradients or weights that are exchanged at once."""


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


@torch.no_grad()
def copy_from_main(tensors: Sequence[Tensor]) -> None:
    """Fill the tensors of all processes with the values of the main one."""
    in_buckets(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def in_buckets(tensors: Sequence[Tensor], change: Callable[[Tensor], object]) -> None:
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
