from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.made_up_evaluations import undeclared
from tests.small_models import tiny_vae
from tests.toy_models import ToyModel
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.evaluation.features import RawPixels
from vilmedic.metrics.reconstruction import Reconstruction, codebook_use
from vilmedic.registry import METRICS


class ImageSource:
    """Random grey images of 16 x 16 pixels."""

    def __init__(self, size: int = 10) -> None:
        self.images = torch.rand(size, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.spec: Any = type("Spec", (), {"labels": (), "multi_label": False})

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> list[dict[str, Any]]:
        rows = torch.arange(len(self)).split(4)
        return [{"index": some, "images": self.images[some]} for some in rows]

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "images": batch["images"].expand(-1, 3, -1, -1)}


def evaluation(*members: nn.Module, out_dir: Path = Path()) -> Evaluation:
    data = ImageSource()
    networks = Ensemble(
        members=[lambda member=member: member for member in members],  # type: ignore[misc]
        dataset=lambda split: data,
        loader=ImageSource.batches,
        device=torch.device("cpu"),
        precision="fp32",
    )
    return Evaluation(
        name="run",
        split="test",
        features=networks.split("test"),
        dataset=data,
        networks=networks,
        out_dir=out_dir,
    )


def test_numbers_cover_the_whole_split() -> None:
    model = tiny_vae()
    run = evaluation(model)
    results = Reconstruction()(run)
    images = run.dataset.prepare({"images": run.dataset.images})["images"]
    codes = model.get_codebook_indices(images)
    counts = [int((codes == code).sum()) for code in range(12)]
    entropy = -sum(n / codes.numel() * math.log(n / codes.numel()) for n in counts if n)
    assert results["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert results["codes_used"] == sum(n > 0 for n in counts) / 12
    vectors = model.codebook(codes).transpose(1, 2).unflatten(2, (4, 4))
    error = (model.decoder(vectors) - (images - 0.5) / 0.5).square().mean().item()
    assert results["hard_loss"] == pytest.approx(error, rel=1e-5)
    assert results["loss"] == pytest.approx(run.features.loss, rel=1e-5)
    assert METRICS.get("reconstruction") is Reconstruction
    assert undeclared(Reconstruction(), results) == []


@pytest.mark.parametrize(
    ("codes", "perplexity", "used"),
    [([0, 1, 2, 3], 4.0, 4), ([2, 2, 2, 2], 1.0, 1), ([0, 0, 0, 5], 1.7547653506, 2)],
)
def test_use_of_the_codebook(codes: list[int], perplexity: float, used: int) -> None:
    found, count = codebook_use(torch.tensor(codes).view(2, 2), 8)
    assert found == pytest.approx(perplexity)
    assert count == used


def test_a_collapse_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vae(num_tokens=200)
    with torch.no_grad():
        model.encoder[-1].bias[7] += 1e3  # type: ignore[union-attr,index,operator]
    with caplog.at_level(logging.WARNING):
        results = Reconstruction()(evaluation(model))
    assert results["codebook_perplexity"] == 1.0
    assert "run, split test: the codebook has collapsed: 1 of 200 codes are used" in caplog.text
    caplog.clear()
    untrained = evaluation(model)
    untrained.baseline = True
    assert Reconstruction()(untrained) == results
    assert caplog.text == "", "nobody can improve a baseline"


def test_uniform_codebook_use_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    Reconstruction()(evaluation(tiny_vae(num_tokens=200)))
    Reconstruction(collapse_share=0.0)(evaluation(tiny_vae()))
    assert "collapsed" not in caplog.text


def test_other_models_have_no_reconstruction_numbers() -> None:
    results = Reconstruction()(evaluation(RawPixels()))
    assert set(results.values()) == {None}
    run = evaluation(tiny_vae())
    run.networks.members = [ToyModel]
    with pytest.raises(ConfigError, match="ToyModel makes no codes"):
        Reconstruction().check(run)


def test_codebooks_are_not_averaged() -> None:
    run = evaluation(tiny_vae())
    run.networks.members = [tiny_vae, tiny_vae]
    with pytest.raises(ConfigError, match=r"2 checkpoints.*mode=best-1"):
        Reconstruction().check(run)
