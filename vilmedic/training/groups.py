"""The batches of an epoch in groups, one an optimizer step, the same in every process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.profiler import record_function

from vilmedic.datasets.loader import EpochLoader
from vilmedic.datasets.sample import SampleKey
from vilmedic.distributed import processes
from vilmedic.distributed.gather import Part


@dataclass(frozen=True)
class Group:
    """What an optimizer step is taken on.

    Args:
        batches: this process's parts of at most `grad_accu` batches.
        parts: what they are of the batches of all processes.
        signals: which of the signals any process gave.
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

    A process of which a batch has no sample, the last one of an epoch perhaps, takes part with
    other samples that are not counted, since the others wait for it.

    Args:
        loader: this process's parts of the batches; None for one without a sample.
        dataset: where samples that are not counted come from.
        count: batches a group.
        smallest: samples below which a batch is left out.
        signals: what this process has to tell the others, asked before each group.
    """
    single = processes.world_size() == 1
    batches = (b for b in loader if not single or len(b["index"]) >= smallest)
    spare: dict[str, Any] | None = None
    while True:
        with record_function("data"):
            own = list(itertools.islice(batches, count))
        if not own:
            return
        told = [int(signal) for signal in signals()]
        sizes = [0 if batch is None else len(batch["index"]) for batch in own]
        table = list(zip(*processes.exchange([*sizes, *told]), strict=True))
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
