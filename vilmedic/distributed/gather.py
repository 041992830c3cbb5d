"""Gathering of a batch that is spread over processes, and sharded tensors.

The loss of a contrastive batch compares every sample with every other. Each process computes the
terms of its own samples against those of all, which it gathers *with* their gradient: the
contributions of other processes to the gradient of its own features are summed in the backward
pass. The terms of all processes together equal the loss of one process on the whole batch, and so
does the gradient. With one process nothing is exchanged, and its terms are the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from vilmedic.distributed import processes

BUCKET = 25 * 2**20
"""Bytes of gradients or weights that are exchanged at once."""


@dataclass(frozen=True)
class Part:
    """The samples of a batch that one process has.

    Processes average their gradients. For the average to be the gradient of the whole batch, each
    process multiplies the sum over its own samples by `world / total`.

    Args:
        sizes: samples of each process, by rank; some may have none. Empty for a single process
            with the whole batch of any size.
        rank: the process.
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @property
    def alone(self) -> bool:
        """Whether this process has the whole batch."""
        return len(self.sizes) < 2

    @property
    def own(self) -> int:
        """Samples of this process."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """Samples of the whole batch."""
        return sum(self.sizes)

    @property
    def weight(self) -> float:
        """Weight of a mean over the own samples in an average over processes."""
        return self.own * len(self.sizes) / self.total

    def count(self, rows: Tensor) -> int:
        """Return the size of the whole batch, given `rows` own samples."""
        return sum(self.sizes) if self.sizes else len(rows)

    def mean(self, terms: Tensor, *, each: int = 1) -> Tensor:
        """Return the own samples' share of a batch mean; its average over processes is the mean.

        Args:
            terms: as many for each own sample as `each` says.
        """
        if self.alone:
            return terms.mean()
        return terms.sum() * (len(self.sizes) / (self.total * each))

    def places(self, rows: Tensor) -> Tensor:
        """Return the positions of the `rows` own samples in the whole batch: int64 [own]."""
        first = sum(self.sizes[: self.rank])
        return torch.arange(first, first + len(rows), device=rows.device)

    def gather(self, value: Tensor) -> Tensor:
        """Gather the rows of all processes, in the order of the batch, with their gradient.

        Args:
            value: own rows, [own, ...], of one shape in all processes. Half precision is widened,
                because gradients of all processes are added up.

        Returns:
            [total, ...].
        """
        if self.alone:
            return value
        if value.is_floating_point():
            wide = torch.promote_types(value.dtype, torch.float32)
            return _Gather.apply(value.to(wide), self.sizes)
        return gather_rows(value, self.sizes)

    def gather_features(self, features: dict[str, Any]) -> dict[str, Any]:
        """Gather all features of the whole batch; scalars, such as a temperature, are kept.

        Features of different lengths, such as words, are padded. Lists with an entry per sample are
        concatenated.
        """
        if self.alone or not features:
            return features
        gathered: dict[str, Any] = dict(features)
        lists = {name: value for name, value in features.items() if isinstance(value, list)}
        if lists:
            every = processes.gather(lists)
            gathered |= {name: list(chain(*(one[name] for one in every))) for name in lists}
        names = [name for name in features if name not in lists and features[name].ndim]
        sides = [side for name in names for side in features[name].shape[1:]]
        wanted = iter([max(column) for column in zip(*processes.exchange(sides), strict=True)])
        for name in names:
            value = features[name]
            sizes = [next(wanted) for _ in value.shape[1:]]
            gathered[name] = self.gather(widened(value, sizes))
        return gathered

    def swap(self, value: Tensor) -> Tensor:
        """Give each process the values of all processes for its own samples, differentiable.

        Args:
            value: this process's value for each sample of the whole batch, [total].

        Returns:
            [world, own]; row r is from process r.
        """
        return _Swap.apply(value, self.sizes, self.rank)

    def pieces(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the rows of each process in turn, by rank, holding only one more at a time.

        All processes iterate together. The rows have no gradient; `add_up` sends gradients back.

        Args:
            rows: own rows, [own, ...], of one shape and dtype in all processes.
        """
        if self.alone:
            yield rows
            return
        for rank, size in enumerate(self.sizes):
            if rank == self.rank:
                piece = rows.detach().contiguous()
            else:
                piece = rows.new_empty(size, *rows.shape[1:])
            if size:
                dist.broadcast(piece, rank)
            yield piece

    def add_up(self, value: Tensor, rank: int) -> Tensor:
        """Sum the values of all processes for the rows of one, which alone gets the result.

        Args:
            value: this process's values for them, [rows of that process, ...]; overwritten.
            rank: whose rows they are.
        """
        if not self.alone and len(value):
            dist.reduce(value, rank)
        return value

    def call(
        self, loss: Callable[..., dict[str, Tensor]], *features: Any, **named: Any
    ) -> dict[str, Tensor]:
        """Call a loss on features of the own samples.

        Args:
            loss: a function or a module. With an argument `part` it computes the terms of the own
                samples; otherwise it gets the features of all processes.
            features: tensors, or dictionaries of them.
            named: further tensors, as keyword arguments of the loss.

        Returns:
            Scalars whose averages over the processes are those of the whole batch.
        """
        if "part" in inspect.signature(getattr(loss, "forward", loss)).parameters:
            return loss(*features, **named, part=self)
        given = [
            self.gather_features(one)
            if isinstance(one, dict)
            else self.gather_features({"": one})[""]
            for one in features
        ]
        return loss(*given, **self.gather_features(named))


WHOLE = Part(())
"""The part of one process that has the whole batch."""


def widened(value: Tensor, sizes: list[int]) -> Tensor:
    """Pad the dimensions after the first with zeros to the given sizes."""
    missing = [size - side for size, side in zip(sizes, value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return functional.pad(value, [n for side in reversed(missing) for n in (0, side)])


def gather_rows(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Concatenate the rows of all processes, without a gradient.

    Args:
        value: own rows, [own, ...].
        sizes: rows of each process.
    """
    if len(sizes) == 1:
        return value
    largest = max(sizes)
    rows = value.byte() if value.dtype == torch.bool else value
    rows = _filled(rows.contiguous(), largest)
    everything = rows.new_empty(len(sizes) * largest, *rows.shape[1:])
    processes.all_gather(everything, rows)
    if min(sizes) < largest:
        parts = everything.split(largest)
        everything = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
    return everything.to(value.dtype)


def local(value: Tensor) -> Tensor:
    """Return the local part of a sharded tensor, or a tensor that is not sharded."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(tree: Any) -> Any:
    """Gather all sharded tensors in nested dictionaries and lists; all processes must call this.

    Gathered tensors go to the CPU, and only the main process keeps them.
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
    """Return the local part of a whole tensor, if its counterpart is sharded."""
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
    """Apply an in-place function to many tensors at once, flattened together."""
    waiting: dict[torch.dtype, list[Tensor]] = {}

    def flush(bucket: list[Tensor]) -> None:
        flat = joined(bucket)
        change(flat)
        fill(bucket, flat)
        bucket.clear()

    for tensor in tensors:
        bucket = waiting.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(one.numel() * one.element_size() for one in bucket) >= BUCKET:
            flush(bucket)
    for bucket in waiting.values():
        if bucket:
            flush(bucket)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten tensors of one dtype into one, as a detached copy."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def fill(tensors: Sequence[Tensor], numbers: Tensor) -> None:
    """Copy the values of a tensor from `joined` back into the tensors."""
    pieces = numbers.split([tensor.numel() for tensor in tensors])
    shaped = [piece.view(one.shape) for one, piece in zip(tensors, pieces, strict=True)]
    torch._foreach_copy_([tensor.data for tensor in tensors], shaped)


def _add_up_rows(value: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    """Return the own rows of the sum of [total, ...] over all processes."""
    largest = max(sizes)
    if min(sizes) < largest:
        value = torch.cat([_filled(part, largest) for part in value.split(list(sizes))])
    own = value.new_empty(largest, *value.shape[1:])
    processes.reduce_scatter(own, value.contiguous())
    return own[: sizes[rank]]


def _filled(rows: Tensor, count: int) -> Tensor:
    missing = count - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


class _Gather(torch.autograd.Function):
    """Forward: all processes' rows. Backward: the sum of all gradients of the own rows."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes, ctx.rank = sizes, processes.rank()
        return gather_rows(value, sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _add_up_rows(gradient, ctx.sizes, ctx.rank), None


class _Swap(torch.autograd.Function):
    """Each process sends every other its values for the other's samples."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        world, own = len(sizes), sizes[rank]
        out = value.new_empty(world * own)
        dist.all_to_all_single(out, value.contiguous(), [own] * world, list(sizes))
        return out.view(world, own)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        world, own = len(ctx.sizes), ctx.sizes[ctx.rank]
        out = gradient.new_empty(sum(ctx.sizes))
        dist.all_to_all_single(out, gradient.contiguous().view(-1), list(ctx.sizes), [own] * world)
        return out, None, None
