"""Preparation of a model for training in one or several processes, and checks before step 1.

Data parallel (`ddp`): every process holds the whole model and gradients are averaged while the
backward pass runs. Sharded (`fsdp`): every process holds a part of each weight, of its gradient
and of its optimizer state, and gathers a block's weights while it computes with it.
"""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from vilmedic.config.sections import TrainorSection, ValidatorSection
from vilmedic.datasets.aligned import SampleKey, stable_seed
from vilmedic.datasets.loader import EpochLoader
from vilmedic.device import HALF, seed_everything
from vilmedic.distributed import processes
from vilmedic.distributed.gather import Part, copy_from_main, in_buckets, local
from vilmedic.errors import ConfigError, DataError
from vilmedic.log import LOGGER, counted
from vilmedic.models.contract import ContrastiveModel, Model

_KNOWN = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in _KNOWN)


@dataclass(frozen=True)
class Group:
    """The batches of one optimizer step.

    Args:
        batches: this process's parts of at most `grad_accu` batches.
        parts: their position in the batches of all processes.
        signals: which signals any process sent.
    """

    batches: list[dict[str, Any]]
    parts: list[Part]
    signals: list[bool]


def groups(
    loader: EpochLoader,
    dataset: Any,
    count: int,
    smallest: int,
    signals: Callable[[], Sequence[bool]],
) -> Iterator[Group]:
    """The groups of the rest of an epoch; the last one may be shorter.

    A process without samples in a batch, such as the last one of an epoch, takes part with other
    samples that are not counted, since the other processes wait for it.

    Args:
        loader: this process's parts of the batches; None for one without a sample.
        dataset: the source of samples that are not counted.
        count: batches per group.
        smallest: batches with fewer samples are left out.
        signals: returns the signals of this process, before each group.
    """
    single = processes.world_size() == 1
    batches = (b for b in loader if not single or len(b["index"]) >= smallest)
    spare: dict[str, Any] | None = None
    while True:
        with record_function("data"):
            own = list(itertools.islice(batches, count))
        if not own:
            return
        given = [int(signal) for signal in signals()]
        sizes = [0 if batch is None else len(batch["index"]) for batch in own]
        table = list(zip(*processes.exchange([*sizes, *given]), strict=True))
        filled = []
        for batch in own:
            if batch is None and spare is None:
                keys = [SampleKey(index) for index in range(min(2, len(dataset)))]
                spare = dataset.collate([dataset[key] for key in keys])
            spare = batch if batch is not None else spare
            filled.append(spare)
        parts = [Part(row, processes.rank()) for row in table[: len(own)]]
        kept = [n for n, part in enumerate(parts) if part.total >= smallest]
        if kept:
            yield Group(
                [batch for n, batch in enumerate(filled) if n in kept and batch is not None],
                [parts[n] for n in kept],
                [any(row) for row in table[len(own) :]],
            )


def seed_this_process(seed: int) -> None:
    """Seed each process except the first differently, so that their dropout differs."""
    if processes.rank():
        seed_everything(stable_seed("process", seed, processes.rank()))


def shard(model: Model, precision: str, device: torch.device) -> None:
    """Shard all weights over the processes, in place; whole blocks are gathered together.

    Weights outside of the repeated blocks are gathered for the whole step. A frozen submodel, such
    as the VAE of DALLE, is not sharded: it is also used outside of steps.

    Raises:
        ConfigError: a weight is a scalar without a dimension, which cannot be sharded.
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
        parameter.data = parameter.data.contiguous()  # shards are slices of memory
    copy_from_main([*model.parameters(), *model.buffers()])
    mesh = init_device_mesh(device.type, (processes.world_size(),))
    for block in model.repeated_blocks():
        fully_shard(block, mesh=mesh, mp_policy=precision_of(block, precision, device.type))
    inner = [one for one in model.modules() if isinstance(one, Model) and one is not model]
    frozen = {p for one in inner for p in one.parameters() if not p.requires_grad}
    fully_shard(model, mesh=mesh, ignored_params=frozen)
    if isinstance(model, ContrastiveModel):
        register_fsdp_forward_method(model, "encode")


def frozen_cache_gib(section: TrainorSection) -> float:
    """Return `trainor.frozen_cache_gib`, or 0 if no process has all weights."""
    sharded = section.parallel == "fsdp" and processes.world_size() > 1
    return 0.0 if sharded else section.frozen_cache_gib


def precision_of(block: nn.Module, precision: str, device: str) -> MixedPrecisionPolicy:
    """Return the dtype in which a block's weights are gathered; gradients are summed in float32.

    With 16-bit precision, weights of transformer layers are gathered in the dtype of autocast.
    Blocks with convolutions have few weights for their computation, and batch normalisation stays
    in float32. On a CPU normalisation needs weights in the dtype of its input.
    """
    convolves = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    half = HALF.get(precision) if device == "cuda" else None
    if half is None or any(isinstance(module, convolves) for module in block.modules()):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)


class Parallel:
    """Forward and backward pass of a model trained by several processes.

    With one process this is the model itself.

    Args:
        model: on its device, sharded or not; equal in all processes afterwards.
        parameters: the trainable ones.

    Attributes:
        network: the module to call: the model, or its data-parallel wrapper.
    """

    def __init__(self, model: Model, parameters: Sequence[nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters
        self.world = processes.world_size()
        self.sharded = isinstance(model, FSDPModule)
        self._buffers = list(model.buffers())
        self.network: Any = model
        # Chunked encoding adds to gradients once per chunk, but wrappers reduce them at the first.
        self._by_hand = getattr(model, "forward_batch_size", None) is not None
        if self.world > 1 and not self.sharded:
            copy_from_main([*model.parameters(), *model.buffers()])

    def forward(
        self,
        batch: dict[str, Any],
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        part: Part,
    ) -> dict[str, Tensor]:
        """Return the output of the model for this process's part of a batch.

        The average of its scalars over the processes equals that of one process on the batch.
        A model that encodes in chunks also prepares images chunk by chunk.
        """
        if isinstance(self.model, ContrastiveModel):
            if self.sharded:
                # Weights are gathered by `encode`, which runs again in the backward pass.
                return self.model.forward(batch, prepare, part)
            output: dict[str, Tensor] = self.network(batch, prepare, part)
            return output
        output = self.network(prepare(batch))
        if self.world == 1:
            return output
        return {k: v * part.weight if v.ndim == 0 else v for k, v in output.items()}

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of a forward and backward pass; gradients are averaged in the last one.

        Sharded gradients are averaged in each: whole ones would not fit.
        """
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        return nullcontext()

    def finish_gradients(self) -> None:
        """Average the gradients that were not averaged during the backward pass.

        The first step shows which weights the model uses. From the second step on, gradients are
        averaged during the backward pass, and the graph is searched for unused weights only if
        there are any.

        Raises:
            ConfigError: a weight that the first step used was not used in this one.
        """
        if self.world == 1 or self.sharded:
            return
        missing = [int(p.grad is None) for p in self.parameters]
        if isinstance(self.network, DistributedDataParallel):
            if not self.network.find_unused_parameters and any(missing):
                raise ConfigError(self._has_changed(missing))
            return
        absent = list(zip(*processes.exchange(missing), strict=True))
        self._average([all(column) for column in absent])
        if not self._by_hand:
            buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
            self.network = DistributedDataParallel(
                self.model,
                find_unused_parameters=self.model.varying or any(map(any, absent)),
                gradient_as_bucket_view=True,
                **buffers,
            )

    def _average(self, nowhere: Sequence[bool]) -> None:
        """Average gradients after the backward pass, except those that no process has."""
        # A process that did not use a weight contributes zeros.
        gradients = []
        for parameter, unused in zip(self.parameters, nowhere, strict=True):
            if not unused:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)

        def average(flat: Tensor) -> None:
            dist.all_reduce(flat)
            flat /= self.world

        in_buckets(gradients, average)

    def _has_changed(self, missing: Sequence[int]) -> str:
        lost = self.parameters[missing.index(1)]
        name = next(name for name, value in self.model.named_parameters() if value is lost)
        return (
            f"model: the weight '{name}' had a gradient in the first step and has none in this "
            "one, for which the other processes wait. Let the class of the model say so "
            "(varying = True), or train it in one process."
        )

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
        """Convert a scalar to the form that an optimizer of these parameters needs."""
        if not self.sharded:
            return value
        mesh = next(p.device_mesh for p in self.parameters if isinstance(p, DTensor))
        return DTensor.from_local(value, mesh, [Replicate()])

    def share_buffers(self) -> None:
        """Copy running statistics from the main process to all; training steps do not read them."""
        if self.world > 1:
            copy_from_main(self._buffers)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which every process has all weights, to evaluate any number of batches."""
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


def check_batch_size(model: Any, samples: int, section: TrainorSection) -> None:
    """Refuse batches on which a loss that compares samples is not defined.

    Raises:
        ConfigError: the batch holds one sample, or fewer samples than there are processes.
        DataError: there are fewer samples than one batch.
    """
    world = processes.world_size()
    if section.batch_size < world:
        raise ConfigError(
            f"trainor.batch_size: given {section.batch_size}, but the batch is shared by {world} "
            f"processes, each of which needs a sample. Allowed: integer >= {world}."
        )
    if not model.cross_sample:
        return
    if section.batch_size < 2:
        raise ConfigError(
            f"trainor.batch_size: given {section.batch_size}, but this model compares the "
            "samples of a batch and needs at least 2."
        )
    if samples < section.batch_size:
        raise DataError(
            f"The training split has {counted(samples, 'sample')}, fewer than "
            f"trainor.batch_size={section.batch_size}; this model trains on full batches "
            f"only. Allowed: integer from 2 to {samples}."
        )


def check_validation_batches(model: Any, section: ValidatorSection) -> None:
    """Refuse validation batches without a loss, which could not rank checkpoints.

    Raises:
        ConfigError: a batch holds one sample, and the loss compares samples.
    """
    if model.cross_sample and section.batch_size < 2:
        raise ConfigError(
            f"validator.batch_size: given {section.batch_size}, but this model compares the "
            "samples of a batch and has no loss for one alone. Allowed: integer >= 2."
        )


def log_batch_facts(model: Any, section: TrainorSection, batches: int | None = None) -> None:
    """Log facts that the configuration does not show: the scope of statistics and negatives.

    Args:
        model: the model.
        section: how it is trained.
        batches: number of batches of an epoch, where that is known.
    """
    chunk = getattr(model, "forward_batch_size", None)
    norms = [m for m in model.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if chunk is not None and chunk < section.batch_size and any(m.training for m in norms):
        LOGGER.info(
            "model.forward_batch_size=%d: batch normalisation sees the statistics of chunks of at "
            "most %d samples, the loss all %d of the batch. With "
            "trainor.activation_checkpointing=true instead, it sees the whole batch.",
            chunk,
            chunk,
            section.batch_size,
        )
    if chunk is not None and chunk > section.batch_size:
        LOGGER.info(
            "model.forward_batch_size=%d has no effect in training: a batch has %s.",
            chunk,
            counted(section.batch_size, "sample"),
        )
    _log_what_processes_share(norms, section)
    if batches is not None and section.grad_accu > batches:
        LOGGER.info(
            "trainor.grad_accu=%d, but an epoch has %s: a step takes no more.",
            section.grad_accu,
            counted(batches, "batch", "batches"),
        )
    if section.grad_accu > 1 and model.cross_sample:
        LOGGER.info(
            "trainor.grad_accu=%d: each batch of %d is contrasted within itself, so a step has %d "
            "samples but the negatives of %d. For more negatives raise trainor.batch_size and set "
            "model.forward_batch_size, which keeps the memory needed as it is.",
            section.grad_accu,
            section.batch_size,
            section.grad_accu * section.batch_size,
            section.batch_size,
        )


def _log_what_processes_share(norms: list[Any], section: TrainorSection) -> None:
    world = processes.world_size()
    if world == 1:
        if section.sync_bn:
            LOGGER.info("trainor.sync_bn has no effect: there is one process")
        return
    LOGGER.info(
        "%d processes (%s): each takes about %d of the %d samples of a batch",
        world,
        section.parallel,
        section.batch_size // world,
        section.batch_size,
    )
    if any(m.training for m in norms) and not section.sync_bn:
        LOGGER.info(
            "Batch normalisation sees the samples of its own process; with trainor.sync_bn=true it "
            "sees those of all"
        )


def prepare_network(model: Model, section: TrainorSection, device: torch.device) -> None:
    """Move a model to its device and prepare it for computation, in place.

    Raises:
        ConfigError: there is no compiler for `compile`, activation checkpointing is not possible
            on the device, or the encoder of the targets is missing.
    """
    if section.activation_checkpointing and device.type == "mps":
        raise ConfigError(
            "trainor.activation_checkpointing: torch cannot repeat the random numbers of an Apple "
            "GPU for the second pass. Leave the key out; model.forward_batch_size saves memory "
            "where the model has it."
        )
    if section.sync_bn and processes.world_size() > 1:
        from vilmedic.distributed.sync_batch_norm import synchronize_batch_norm

        synchronize_batch_norm(model, device)
    if isinstance(model, ContrastiveModel) and model.targets is not None:
        try:
            model.targets.load()  # for a resumed run; a new one has loaded it
        except ConfigError as error:
            raise ConfigError(f"model.targets.{error}") from error
    # Convolutions run faster in this layout, on CPU and GPU alike; other weights are not 4-d.
    model.to(device).to(memory_format=torch.channels_last)
    if section.compile:
        from vilmedic.blocks.repeated import compile_blocks

        compilers = [os.environ.get("CXX") or "g++", "clang++"]
        if not any(shutil.which(name) for name in compilers):
            raise ConfigError(
                "trainor.compile: torch needs a C++ compiler, and none of "
                f"{', '.join(compilers)} is installed. Install one or leave the key out."
            )
        count = compile_blocks(model.repeated_blocks())
        _log_blocks("compile", count, "Compiling %d blocks; the first steps take long")
    if section.activation_checkpointing:
        from vilmedic.blocks.repeated import checkpoint_blocks

        count = checkpoint_blocks(model.repeated_blocks())
        _log_blocks("activation_checkpointing", count, "Computing %d blocks twice")
    if section.parallel == "fsdp":
        shard(model, section.precision, device)


def _log_blocks(key: str, count: int, what: str) -> None:
    if count:
        LOGGER.info(what, count)
    else:
        LOGGER.warning("trainor.%s has no effect: this model has no repeated blocks to train", key)
