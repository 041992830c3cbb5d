"""The pair losses and their learned parameters, in two processes and in one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.systems import build, compare, make_batches, train
from tests.several_processes import run_checks
from tests.small_models import save_tiny_bert, tiny_spec
from vilmedic.datasets.aligned import DataSpec
from vilmedic.distributed import processes
from vilmedic.distributed.gather import local
from vilmedic.losses.barlow_twins import BarlowTwinsLoss
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.losses.targets import Targets
from vilmedic.losses.vicreg import VICRegLoss


def compare_losses(
    loss: nn.Module, chunks: int | None = None, more: dict[str, Any] | None = None, **keys: Any
) -> Any:
    settings = {"loss": loss, "forward_batch_size": chunks, **(more or {})}
    return compare("Compared", (8, 5, 3), double=True, steps=3, settings=settings, **keys)


def info_nce() -> Any:
    return compare_losses(InfoNCELoss())


def info_nce_in_chunks() -> Any:
    return compare_losses(InfoNCELoss(), 2)


def siglip() -> Any:
    return compare_losses(SigLIPLoss())


def siglip_in_chunks() -> Any:
    return compare_losses(SigLIPLoss(), 2)


def same_text(loss: nn.Module, chunks: int | None = None, **keys: Any) -> Any:
    settings = {"targets": Targets(spec=DataSpec(), proto="same_text")}
    return compare_losses(loss, chunks, more=settings, **keys)


def soft(loss: nn.Module, chunks: int | None = None, **keys: Any) -> Any:
    settings = {"targets": Targets(spec=DataSpec(labels=("a", "b", "c")), temperature=0.5)}
    return compare_losses(loss, chunks, more=settings, **keys)


def info_nce_of_equal_reports_in_chunks() -> Any:
    return same_text(InfoNCELoss(), 2)


def siglip_of_equal_reports_in_chunks() -> Any:
    return same_text(SigLIPLoss(), 2)


def soft_info_nce() -> Any:
    return soft(InfoNCELoss())


def soft_siglip_in_chunks() -> Any:
    return soft(SigLIPLoss(), 2)


def soft_convirt_in_chunks() -> Any:
    return soft(ConVIRTLoss(), 2)


def reports(loss: nn.Module, chunks: int | None = None, **keys: Any) -> Any:
    with TemporaryDirectory() as folder:
        save_tiny_bert(Path(folder))  # transformers writes only in the first of several processes
        encoder = processes.gather(folder)[0]
        targets = Targets(spec=tiny_spec(), by="reports", encoder=encoder)
        processes.wait()
    return compare_losses(loss, chunks, more={"targets": targets}, **keys)


def info_nce_by_reports_in_chunks() -> Any:
    return reports(InfoNCELoss(), 2)


def sharded_siglip_by_reports() -> Any:
    return reports(SigLIPLoss(), parallel="fsdp")


def sharded_info_nce_in_chunks() -> Any:
    return compare_losses(InfoNCELoss(), 2, parallel="fsdp")


def sharded_siglip() -> Any:
    return compare_losses(SigLIPLoss(), parallel="fsdp")


def vicreg_in_chunks() -> Any:
    return compare_losses(VICRegLoss(), 2)


def barlow_twins() -> Any:
    return compare_losses(BarlowTwinsLoss())


LOSSES = [
    info_nce,
    info_nce_in_chunks,
    siglip,
    siglip_in_chunks,
    info_nce_of_equal_reports_in_chunks,
    siglip_of_equal_reports_in_chunks,
    soft_info_nce,
    soft_siglip_in_chunks,
    soft_convirt_in_chunks,
    info_nce_by_reports_in_chunks,
    sharded_siglip_by_reports,
    sharded_info_nce_in_chunks,
    sharded_siglip,
    vicreg_in_chunks,
    barlow_twins,
]


def sharded_temperature() -> Any:
    """A temperature far below its bound, after clamping."""
    settings = {"loss": InfoNCELoss()}
    step, _ = train(build("Compared", **settings), make_batches("Compared", [8]), parallel="fsdp")
    weight: Any = step.model.loss.log_temperature
    with torch.no_grad():
        local(weight).fill_(-9.0)
    step.model.schedule(2)
    return weight.full_tensor().exp().detach()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_checks([*LOSSES, sharded_temperature], tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("check", LOSSES, ids=lambda check: check.__name__)
def test_losses_and_learned_parameters_in_two_processes(
    check: Any, results: dict[str, list[Any]]
) -> None:
    for result in results[check.__name__]:
        assert not isinstance(result, str), result
    (given, expected), (other, _) = results[check.__name__]
    assert given["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(given["gradients"][name], gradient, rtol=0, atol=1e-10, msg=name)
    for name, value in expected["state"].items():
        torch.testing.assert_close(given["state"][name], value, rtol=0, atol=1e-10, msg=name)
        if other["state"][name] is not None:
            assert torch.equal(given["state"][name], other["state"][name]), name
    for name, value in {"loss": expected["loss"], **expected["parts"]}.items():
        found = given["loss"] if name == "loss" else given["parts"][name]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
    learned = [value for name, value in expected["gradients"].items() if name.startswith("loss.")]
    assert all(gradient.abs().max() > 1e-6 for gradient in learned)
    assert len(learned) == ("info_nce" in check.__name__) + 2 * ("siglip" in check.__name__)


def test_a_sharded_temperature_is_clamped_in_place(results: dict[str, list[Any]]) -> None:
    for found in results["sharded_temperature"]:
        assert not isinstance(found, str), found
        assert found.tolist() == pytest.approx([0.01])
