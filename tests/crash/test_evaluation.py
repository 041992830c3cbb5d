"""Signals at chosen moments of a validation, sent within this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.killing import ROOT, assert_same_runs
from tests.crash.systems import VAE
from vilmedic import cli, run
from vilmedic.datasets import decode
from vilmedic.phantom.write import Plan, build
from vilmedic.training.averaged_weights import AveragedWeights
from vilmedic.training.validator import Validator


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation") / "data"
    build(root, Plan(train=9, validate=5, test=2, size=32), force=False, workers=1)
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(data, folder) == 0
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def only_training() -> Iterator[None]:
    """Change to the folder of the configurations, and skip the report pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(run, "write_pages", lambda run_dir: None)
        yield


def train(data: Path, ckpt_dir: Path) -> int:
    places = [f"ckpt_dir={ckpt_dir}", "name=run", "ckpt=auto"]
    more = ["trainor.epochs=2", "trainor.save_every=null", "trainor.num_workers=0"]
    return cli.train([*VAE.arguments(data), *places, *more])


def signal_in(
    patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, when: Callable[[], bool]
) -> None:
    """Make a function send a signal once, at the first call for which `when` is true."""
    original, sent = getattr(owner, name), []

    def call(*arguments: Any, **options: Any) -> Any:
        if when() and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
@pytest.mark.parametrize("evaluation", [1, 2], ids=["weights", "average"])
def test_a_signal_during_decoding_does_not_report_a_damaged_image(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    status: int,
    evaluation: int,
) -> None:
    begun = []
    score = Validator.score

    def counted(self: Validator, *arguments: Any) -> dict[str, float]:
        begun.append(self)
        return score(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "score", counted)
        signal_in(patch, decode, "_open", number, lambda: len(begun) == evaluation)
        assert train(data, tmp_path) == status
    assert len(begun) == evaluation
    assert train(data, tmp_path) == 0
    assert_same_runs(tmp_path / "run", whole, same_saves=False)


@pytest.mark.parametrize("swap", [1, 2], ids=["there", "back"])
def test_a_signal_during_the_ema_swap_leaves_consistent_weights(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: int
) -> None:
    """The signal arrives while the tensors of model and average are swapped."""
    begun = []
    tensors, exchange = AveragedWeights._tensors, AveragedWeights._swap

    def one_by_one(self: AveragedWeights) -> Any:
        found = tensors(self)
        if len(begun) != swap:
            return found
        begun.append(self)

        class Sending(dict):
            def items(self) -> Any:  # type: ignore[override]
                for count, item in enumerate(super().items()):
                    if count == 3:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield item

        return Sending(found)

    def counted(self: AveragedWeights) -> None:
        begun.append(self)
        exchange(self)

    with monkeypatch.context() as patch:
        patch.setattr(AveragedWeights, "_tensors", one_by_one)
        patch.setattr(AveragedWeights, "_swap", counted)
        assert train(data, tmp_path) == 143
    assert train(data, tmp_path) == 0
    assert_same_runs(tmp_path / "run", whole, same_saves=False)
