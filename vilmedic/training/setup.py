"""Checks and warnings before the first step, and placement of the model on its device."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn

from vilmedic.config.sections import TrainorSection, ValidatorSection
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, DataError
from vilmedic.log import LOGGER
from vilmedic.models.contract import Model
from vilmedic.training.parallel import shard


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
            f"The training split has {samples} samples, fewer than "
            f"trainor.batch_size={section.batch_size}; this model trains on full batches "
            f"only. Allowed: integer from 2 to {samples}."
        )


def check_validation_batches(model: Any, section: ValidatorSection) -> None:
    """Refuse validation batches without a loss, by which no checkpoint could be the best.

    Raises:
        ConfigError: a batch holds one sample, and the loss compares samples.
    """
    if model.cross_sample and section.batch_size < 2:
        raise ConfigError(
            f"validator.batch_size: given {section.batch_size}, but this model compares the "
            "samples of a batch and has no loss for one alone. Allowed: integer >= 2."
        )


def tell_what_batches_mean(model: Any, section: TrainorSection, batches: int | None = None) -> None:
    """Say once what a configuration does not show: whose statistics and whose negatives count.

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
            "model.forward_batch_size=%d has no effect in training: a batch has %d samples.",
            chunk,
            section.batch_size,
        )
    _tell_what_processes_share(norms, section)
    if batches is not None and section.grad_accu > batches:
        LOGGER.info(
            "trainor.grad_accu=%d, but an epoch has %d batches: a step takes these, and no more.",
            section.grad_accu,
            batches,
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


def _tell_what_processes_share(norms: list[Any], section: TrainorSection) -> None:
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
    """Move a model to its device and lay it out, in place, for how it is computed.

    Raises:
        ConfigError: it should be compiled, and there is no compiler; or computed twice on a device
            whose random numbers torch cannot repeat.
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
        _tell_of_blocks("compile", count, "Compiling %d blocks; the first steps take long")
    if section.activation_checkpointing:
        from vilmedic.blocks.repeated import checkpoint_blocks

        count = checkpoint_blocks(model.repeated_blocks())
        _tell_of_blocks("activation_checkpointing", count, "Computing %d blocks twice")
    if section.parallel == "fsdp":
        shard(model, section.precision, device)


def _tell_of_blocks(key: str, count: int, what: str) -> None:
    if count:
        LOGGER.info(what, count)
    else:
        LOGGER.warning("trainor.%s has no effect: this model has no repeated blocks to train", key)
