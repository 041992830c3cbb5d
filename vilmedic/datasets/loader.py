"""Batches of a data set: a stateless sampler, a loader with readable errors, cached model input."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vilmedic.datasets.aligned import AlignedDataset, Batch, Sample, SampleKey, stable_seed
from vilmedic.distributed import processes
from vilmedic.errors import DataError, VilmedicError
from vilmedic.files import core_count
from vilmedic.log import counted

logger = logging.getLogger(__name__)

MOST_WORKERS = 16
"""Default limit of loading processes: enough for any GPU, and each takes memory."""


class LostWorker(DataError):
    """A loading process was killed, for reasons other than the data."""


class EpochSampler(Sampler[list[SampleKey]]):
    """Batches of sample keys, as a function of seed and epoch alone.

    Several processes share them: in training each takes its part of every batch, in evaluation
    every n-th batch as a whole, since the loss may depend on the whole batch.

    Args:
        size: number of samples in the data set.
        batch_size: samples per batch.
        training: shuffle, in another order each epoch; otherwise the order is that of the file.
        seed: seed of the order.
        drop_last: leave out a last batch that is shorter than the others.
        rank: number of the process.
        world: number of processes.
        epoch: see `set_epoch`.
        start_batch: see `set_epoch`.
        order: the data set's own order of training, if it has one; see `AlignedDataset.order`.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        training: bool,
        seed: int,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
        start_batch: int = 0,
        order: Callable[..., torch.Tensor | None] | None = None,
    ) -> None:
        self.order = order
        self.size, self.batch_size = size, batch_size
        self.training, self.seed, self.drop_last = training, seed, drop_last
        self.rank, self.world = rank, world
        self.set_epoch(epoch, start_batch)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and start of the next iteration.

        Args:
            epoch: the pass over the data; evaluation gives the same samples in each.
            start_batch: batches left out at the beginning, as they were seen before a restart.
        """
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch, ignoring `start_batch`; in evaluation those of this process."""
        return self._count() if self.training else len(self._own(0))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch if self.training else 0
        order = self._shuffled(epoch) if self.training else torch.arange(self.size)
        for batch in self._own(self.start_batch):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            if self.training:
                chosen = torch.tensor_split(chosen, self.world)[self.rank]
            yield [SampleKey(index, epoch) for index in chosen.tolist()]

    def _shuffled(self, epoch: int) -> torch.Tensor:
        own = self.order and self.order(seed=self.seed, epoch=epoch, batch_size=self.batch_size)
        if own is not None:
            return own
        generator = torch.Generator().manual_seed(stable_seed("shuffle", self.seed, epoch))
        return torch.randperm(self.size, generator=generator)

    def _count(self) -> int:
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def _own(self, start: int) -> range:
        """Yield the batches with samples of this process."""
        if self.training:
            return range(start, self._count())
        return range(start + self.rank, self._count(), self.world)


class _Guarded(Dataset[Any]):
    """Returns errors as values: DataLoader would wrap a raised one in its traceback."""

    def __init__(self, dataset: AlignedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample | tuple[SampleKey, VilmedicError]:
        try:
            return self.dataset[key]
        except VilmedicError as error:
            return key, error.with_traceback(None)

    def collate(self, items: Sequence[Any]) -> tuple[Batch | None, dict[str, Any]]:
        """Collate the samples that could be read (None without any), with messages to report."""
        failed = [item for item in items if isinstance(item, tuple)]
        samples = [item for item in items if not isinstance(item, tuple)]
        report: dict[str, Any] = {
            "read": len(samples),
            "truncated": sum(sample.get("truncated", False) for sample in samples),
            "skipped": {
                int(self.dataset.kept[key.index]): str(error)
                for key, error in failed
                if self.dataset.tolerates(error)
            },
            "error": next((e for _, e in failed if not self.dataset.tolerates(e)), None),
        }
        batch = None
        if samples and report["error"] is None:
            try:
                batch = self.dataset.collate(samples)
            except VilmedicError as error:
                report["error"] = error.with_traceback(None)
        return batch, report


class EpochLoader(DataLoader[Any]):
    """Batches of a data set; `set_epoch` before each pass chooses the pass.

    Samples that the data set tolerates as bad are left out of their batch, which gets smaller, and
    are listed in the log at the end of the pass (`dataset.skipped` holds them all).

    Attributes:
        position: batches of the pass requested so far, including those before `start_batch` and
            empty ones.
    """

    position = 0
    _told_truncated = False

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """See `EpochSampler.set_epoch`; the loading processes stay as they are."""
        sampler = self.batch_sampler
        assert isinstance(sampler, EpochSampler)
        sampler.set_epoch(epoch, start_batch)
        self.position = start_batch

    @property
    def _shared(self) -> bool:
        sampler = self.batch_sampler
        return isinstance(sampler, EpochSampler) and sampler.training and sampler.world > 1

    def close(self) -> None:
        """End the loading processes; a later pass starts new ones."""
        self._iterator = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of a pass.

        Where processes share batches, None stands for one of which this process has no sample.

        Raises:
            DataError: a sample is bad; raised here with its own text, from any process.
            LostWorker: a loading process was killed.
        """
        assert isinstance(self.dataset, _Guarded)
        dataset = self.dataset.dataset
        read = truncated = 0
        for batch, report in self._loaded():
            self.position += 1
            if (error := report.pop("error")) is not None:
                try:
                    raise error
                finally:
                    # Its traceback holds this frame, which would keep the workers alive longer.
                    del error
            dataset.skip(report["skipped"])
            read, truncated = read + report["read"], truncated + report["truncated"]
            if batch is not None or self._shared:
                yield batch
        dataset.report_skipped()
        if truncated and not self._told_truncated:
            logger.info(
                "%d of %d reports were longer than tokenizer_max_len and were cut", truncated, read
            )
            self._told_truncated = True

    def _loaded(self) -> Iterator[Any]:
        """Yield the results of the loading processes.

        torch would raise the death of one at any point of the program, for example within a step.
        Here it is detected while waiting for the next batch, between two steps.
        """
        number = getattr(signal, "SIGCHLD", None)
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(number) if number is not None and main else None
        try:
            batches = super().__iter__()
            if number is not None and main and signal.getsignal(number) is not before:
                signal.signal(number, before or signal.SIG_DFL)
            yield from batches
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise LostWorker(_epitaph(getattr(self._iterator, "_workers", []))) from None


def _epitaph(workers: Sequence[Any]) -> str:
    """Explain why loading processes have ended."""
    ended = [one for one in workers if one.exitcode is not None] or list(workers)[:1]
    code = ended[0].exitcode if ended else None
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"was killed ({name})"
    else:
        how = f"ended with status {code}"
    if code == -getattr(signal, "SIGBUS", 0):
        why = "the shared memory (/dev/shm) is full"
    else:
        why = "the machine ran out of memory"
    number = f" {ended[0].pid}" if ended else ""
    return (
        f"A loading process{number} {how}, often because {why}: fewer num_workers or a smaller "
        "batch_size need less."
    )


def make_loader(
    dataset: AlignedDataset,
    *,
    batch_size: int,
    training: bool,
    seed: int,
    epoch: int = 0,
    start_batch: int = 0,
    drop_last: bool = False,
    num_workers: int | None = None,
) -> EpochLoader:
    """A loader of a data set.

    Args:
        dataset: what to load.
        batch_size: samples per batch, those of all processes together.
        training: shuffle; evaluation keeps the order of the file.
        seed: seed of the order.
        epoch: first pass; `set_epoch` chooses the later ones.
        start_batch: batches of that pass to leave out, without reading them.
        drop_last: leave out a last batch that is shorter than the others.
        num_workers: loading processes, which stay alive between passes; null takes one for each
            core that this process may use, up to `MOST_WORKERS` and to the batches of a pass. The
            data do not depend on their number.

    Raises:
        DataError: `drop_last` leaves no batch at all.
    """
    cores = max(1, core_count() // processes.on_this_machine())
    if num_workers is not None and num_workers > 4 * cores:
        _warn_of_workers(num_workers, cores)
    if drop_last and len(dataset) < batch_size:
        raise DataError(
            f"{dataset.parts[0].texts.path} gives {counted(len(dataset), 'sample')}, which is not "
            "one full "
            f"batch of batch_size={batch_size}, and a shorter one is left out. Lower batch_size."
        )
    sampler = EpochSampler(
        len(dataset),
        batch_size=batch_size,
        training=training,
        seed=seed,
        drop_last=drop_last,
        rank=processes.rank(),
        world=processes.world_size(),
        epoch=epoch,
        start_batch=start_batch,
        order=dataset.order,
    )
    if num_workers is None:
        num_workers = min(cores, MOST_WORKERS, len(sampler))
    guarded = _Guarded(dataset)
    Finalize(None, _end_workers, exitpriority=100)
    return EpochLoader(
        guarded,
        batch_sampler=sampler,
        collate_fn=guarded.collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # otherwise each pass would draw from the global generator
    )


@cache
def _warn_of_workers(number: int, cores: int) -> None:
    """Warn once about more loading processes than cores."""
    logger.warning(
        "num_workers=%d is more than four a core (%d): they wait for each other, and each takes "
        "memory. null takes what fits.",
        number,
        cores,
    )


def _end_workers() -> None:
    """End remaining loading processes at exit; they ignore the signal that Python sends.

    Python sends it and waits for them, both in the main process and in child processes, so they
    must end before that: this is registered as a finalizer with high priority.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, and no warning about the fork
    # Workers ignore Ctrl-C: the main process needs their data to finish the step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def features_ready(
    dataset: Any, model: Any, device: torch.device, *, gib: float, **options: Any
) -> None:
    """Make a data set give features of frozen encoders; see `cache_features`."""
    if gib and hasattr(model, "towers") and any(not w.requires_grad for w in model.parameters()):
        from vilmedic.datasets.token_file import cache_features

        cache_features(dataset, model, device, gib=gib, **options)


def tokens_ready(
    dataset: Any, model: nn.Module, device: torch.device, num_workers: int | None
) -> None:
    """Make a data set give further data that a model needs.

    These are image tokens, if configured (see `cache_tokens`), and hashes of the reports, if the
    model compares them.
    """
    if getattr(getattr(model, "module", model), "reads_hashes", False):
        for part in dataset.parts:
            if hasattr(part, "hashes"):
                part.hashes = True
    if any(getattr(part, "tokens", None) for part in dataset.parts):
        from vilmedic.datasets.token_file import cache_tokens

        cache_tokens(dataset, model, device, num_workers)
