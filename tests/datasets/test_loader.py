from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import (
    EpochLoader,
    EpochSampler,
    LostWorker,
    _warn_of_workers,
    make_loader,
)
from vilmedic.datasets.pairs import ImSeq
from vilmedic.datasets.text import TextDataset
from vilmedic.errors import DataError

Args = Callable[..., dict[str, Any]]
Write = Callable[[str, Sequence[str]], Path]


held: list[object] = []


def order(sampler: EpochSampler) -> list[list[int]]:
    return [[key.index for key in batch] for batch in sampler]


@pytest.fixture
def dataset(image_args: Args, text_args: Args) -> ImSeq:
    return ImSeq(image=ImageDataset(**image_args()), seq=TextDataset(**text_args()))


def sampler(**changes: Any) -> EpochSampler:
    settings = {"batch_size": 4, "training": True, "seed": 3, "drop_last": False} | changes
    return EpochSampler(10, **settings)


def test_every_sample_occurs_once_in_an_order_by_seed_and_epoch() -> None:
    one = sampler()
    first = order(one)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(index for batch in first for index in batch) == list(range(10))
    torch.rand(1)
    assert order(one) == first == order(sampler())
    one.set_epoch(1)
    second = order(one)
    assert second != first
    assert {key.epoch for batch in one for key in batch} == {1}
    assert order(sampler(seed=4)) != first
    one.set_epoch(0)
    assert order(one) == first


def test_restart_within_an_epoch() -> None:
    whole = sampler(epoch=2)
    rest = sampler(epoch=2, start_batch=1)
    assert order(rest) == order(whole)[1:]
    assert len(rest) == len(whole) == 3


def test_short_last_batch() -> None:
    assert [len(batch) for batch in sampler(drop_last=True)] == [4, 4]
    assert len(sampler(drop_last=True)) == 2


def test_evaluation_order_is_fixed() -> None:
    evaluation = sampler(training=False)
    evaluation.set_epoch(5)
    assert order(evaluation) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {key.epoch for batch in evaluation for key in batch} == {0}


def test_workers_and_restarts_do_not_change_the_data(dataset: ImSeq) -> None:
    settings = {"batch_size": 3, "training": True, "seed": 1}
    state = torch.get_rng_state()
    passes = []
    for num_workers in (0, 2):
        loader = make_loader(dataset, num_workers=num_workers, **settings)
        batches = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            batches += list(loader)
        passes.append(batches)
    assert torch.equal(torch.get_rng_state(), state)
    restarted = list(make_loader(dataset, num_workers=0, epoch=1, start_batch=1, **settings))
    assert len(restarted) == 2
    pairs = [*zip(*passes, strict=True), *zip(restarted, passes[0][4:], strict=True)]
    assert len(pairs) == 8
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_raises_with_its_own_text(dataset: ImSeq, root: Path, num_workers: int) -> None:
    (root / "images" / "train_5.png").write_bytes(b"nonsense")
    loader = make_loader(dataset, batch_size=2, training=False, seed=0, num_workers=num_workers)
    seen, text = read_until_error(loader)
    assert seen == [[0, 1], [2, 3]]
    assert text.startswith(f"{root}/train.image.tok:6: {root}/images/train_5.png is")
    assert "Traceback" not in text


def read_until_error(loader: EpochLoader) -> tuple[list[list[int]], str]:
    """The batches before a DataError, and its text; the error object would keep workers alive."""
    seen: list[list[int]] = []
    try:
        for batch in loader:
            seen.append(batch["index"].tolist())
    except DataError as error:
        return seen, str(error)
    raise AssertionError("no DataError")


def many(write: Write, root: Path, bad: int, *, size: int = 300) -> None:
    """Write `size` training samples with `bad` undecodable images at lines 5, 6, ..."""
    names = ["train_0.png"] * size
    for number in range(bad):
        (root / "images" / f"bad_{number}.png").write_bytes(b"nonsense")
        names[4 + number] = f"bad_{number}.png"
    write("train.image.tok", names)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_make_batches_smaller_and_are_listed(
    image_args: Args,
    write: Write,
    root: Path,
    num_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    many(write, root, bad=3)
    dataset = ImageDataset(**image_args(on_error="skip", training=False))
    loader = make_loader(dataset, batch_size=2, training=False, seed=0, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            indices = [batch["index"].tolist() for batch in loader]
            assert indices[:4] == [[0, 1], [2, 3], [7], [8, 9]]  # 4 and 5 were a whole batch
    assert sorted(dataset.skipped) == [4, 5, 6]
    assert len(caplog.messages) == 1
    assert "Left out 3 bad samples" in caplog.messages[0]
    assert "train.image.tok:5: " in caplog.messages[0]
    assert "(3 of 300 so far)" in caplog.messages[0]


def test_skipping_stops_above_one_percent(image_args: Args, write: Write, root: Path) -> None:
    many(write, root, bad=4)
    dataset = ImageDataset(**image_args(on_error="skip", training=False))
    loader = make_loader(dataset, batch_size=2, training=False, seed=0, num_workers=2)
    _, text = read_until_error(loader)
    assert text.startswith("4 bad samples: ")
    assert "more than 1% of the 300 samples" in text


def test_truncated_reports_are_logged_once(
    text_args: Args, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = TextDataset(**text_args(tokenizer_max_len=12))
    loader = make_loader(dataset, batch_size=3, training=True, seed=0, num_workers=0)
    with caplog.at_level(logging.INFO):
        list(loader)
        list(loader)
    assert caplog.messages == ["2 of 8 reports were longer than tokenizer_max_len and were cut"]


def test_a_split_without_a_full_batch_is_an_error(dataset: ImSeq) -> None:
    settings = {"training": True, "seed": 0, "num_workers": 0}
    with pytest.raises(DataError, match="8 samples, which is not one full batch of batch_size=9"):
        make_loader(dataset, batch_size=9, drop_last=True, **settings)
    assert len(list(make_loader(dataset, batch_size=9, drop_last=False, **settings))) == 1
    assert len(list(make_loader(dataset, batch_size=8, drop_last=True, **settings))) == 1


def test_dataset_can_be_sent_to_spawned_workers(dataset: ImSeq) -> None:
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.lines([3]) == dataset.lines([3])
    assert copy.parts[0].parts[0] is copy.parts[0]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch_in_training(world: int) -> None:
    whole = order(sampler(epoch=1))
    parts = [order(sampler(epoch=1, rank=rank, world=world)) for rank in range(world)]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        assert [index for part in parts for index in part[number]] == batch
    rest = order(sampler(epoch=1, start_batch=1, rank=1, world=world))
    assert rest == parts[1][1:]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_get_whole_batches_in_evaluation(world: int) -> None:
    whole = order(sampler(training=False))
    parts = [order(sampler(training=False, rank=rank, world=world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        assert parts[number % world][number // world] == batch
    assert sum(map(len, parts)) == len(whole)
    assert len(sampler(training=False, rank=1, world=world)) == len(parts[1])


def hold_an_iterator(dataset: ImSeq) -> None:
    loader = make_loader(dataset, batch_size=2, training=True, seed=0, num_workers=1)
    batches = iter(loader)
    next(batches)
    held.append(batches)  # as a traceback does


def test_a_process_exits_with_open_workers(dataset: ImSeq) -> None:
    process = multiprocessing.get_context("fork").Process(target=hold_an_iterator, args=(dataset,))
    process.start()
    process.join(60)
    if ended := process.exitcode is not None:
        assert process.exitcode == 0
    else:
        process.kill()
    assert ended


def test_too_many_workers_are_logged(
    dataset: ImSeq, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vilmedic.datasets.loader.core_count", lambda: 2)
    _warn_of_workers.cache_clear()  # another test in this process may have triggered it
    settings = {"batch_size": 2, "training": False, "seed": 0}
    make_loader(dataset, num_workers=8, **settings)  # type: ignore[arg-type]
    assert "num_workers" not in caplog.text
    for _ in range(2):
        make_loader(dataset, num_workers=9, **settings)  # type: ignore[arg-type]
    assert caplog.text.count("num_workers=9 is more than four a core (2)") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_killed_loading_process_gives_one_message(dataset: ImSeq, number: signal.Signals) -> None:
    loader = make_loader(dataset, batch_size=1, training=True, seed=0, num_workers=1)
    batches = iter(loader)
    next(batches)
    worker = loader._iterator._workers[0]  # type: ignore[union-attr]
    os.kill(worker.pid, number)
    worker.join(30)
    text = ""
    try:
        list(batches)
    except LostWorker as error:  # the error object would keep workers alive
        text = str(error)
    loader.close()
    assert text.startswith(f"A loading process {worker.pid} was killed ({number.name}), often")
    why = "shared memory" if number == signal.SIGBUS else "ran out of memory"
    assert why in text


def test_a_killed_loading_process_interrupts_nothing_else(dataset: ImSeq) -> None:
    """torch would raise it between any two instructions, for example within a step."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = make_loader(dataset, batch_size=1, training=True, seed=0, num_workers=1)
    batches = iter(loader)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    worker = loader._iterator._workers[0]  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(30)
    time.sleep(0.05)  # here the signal of its death would be handled
    loader.close()


@pytest.mark.parametrize(
    ("cores", "processes", "batch_size", "workers"),
    [(3, 1, 2, 3), (64, 1, 1, 6), (64, 1, 3, 3), (8, 3, 1, 2), (1, 1, 8, 1)],
)
def test_default_workers_depend_on_cores_and_batches(
    dataset: ImSeq,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    processes: int,
    batch_size: int,
    workers: int,
) -> None:
    monkeypatch.setattr("vilmedic.datasets.loader.core_count", lambda: cores)
    monkeypatch.setattr("vilmedic.distributed.processes.on_this_machine", lambda: processes)
    monkeypatch.setattr("vilmedic.datasets.loader.MOST_WORKERS", 6)
    assert len(dataset) == 8
    settings = {"batch_size": batch_size, "training": True, "seed": 0}
    assert make_loader(dataset, **settings).num_workers == workers  # type: ignore[arg-type]
    chosen = make_loader(dataset, num_workers=7, **settings)  # type: ignore[arg-type]
    assert chosen.num_workers == 7
