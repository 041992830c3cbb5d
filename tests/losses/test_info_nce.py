from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.losses.inputs import assert_same_gradients, pairs
from tests.losses.targets import HASHES, agreements, cosines, slow_both_ways, vectors
from vilmedic.errors import ArgumentError
from vilmedic.losses.info_nce import InfoNCELoss


def slow_loss(visual: Tensor, linguistic: Tensor, temperature: Tensor) -> Tensor:
    """Pair by pair: each image against all reports, each report against all images."""
    size, terms = len(visual), []
    scores = [
        [functional.cosine_similarity(v, w, dim=0) / temperature for w in linguistic]
        for v in visual
    ]
    for i in range(size):
        among_reports = sum(scores[i][j].exp() for j in range(size))
        among_images = sum(scores[j][i].exp() for j in range(size))
        terms += [among_reports.log() - scores[i][i], among_images.log() - scores[i][i]]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("tau", [0.02, 0.07, 1.0])
def test_equals_the_double_sum_with_gradients(tau: float) -> None:
    loss = InfoNCELoss(tau=tau).double()
    inputs, weight = pairs(), loss.log_temperature
    given = loss(*inputs)
    expected = slow_loss(*inputs, weight.exp()[0])
    torch.testing.assert_close(given["loss"], expected, rtol=0, atol=1e-10)
    mean = (given["image_to_text"] + given["text_to_image"]) / 2
    torch.testing.assert_close(given["loss"].detach(), mean)
    assert_same_gradients(given["loss"], expected, [*inputs, weight])


def test_equals_a_published_implementation() -> None:
    visual, linguistic = pairs(dtype=torch.float32)
    units = [functional.normalize(side, dim=1) for side in (visual, linguistic)]
    published = image_text_contrastive_loss(units[0] @ units[1].T / 0.07)
    torch.testing.assert_close(InfoNCELoss()(visual, linguistic)["loss"], published)


def test_a_given_temperature_replaces_its_own() -> None:
    loss, inputs = InfoNCELoss().double(), pairs()
    given = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = loss(*inputs, temperature=given)["loss"]
    torch.testing.assert_close(value, slow_loss(*inputs, given))
    value.backward()
    assert given.grad is not None
    assert loss.log_temperature.grad is None


@pytest.mark.parametrize(("start", "end"), [(1e-4, 0.01), (0.05, 0.05), (30.0, 1.0)])
def test_the_temperature_is_clamped_to_its_bounds(start: float, end: float) -> None:
    loss = InfoNCELoss()
    loss.log_temperature.data.fill_(math.log(start))
    loss.clamp()
    assert loss.learned()["temperature"].item() == pytest.approx(end)
    assert loss.log_temperature.requires_grad


def test_easy_pairs_lower_the_temperature_to_its_bound_and_hard_ones_raise_it() -> None:
    eye = torch.eye(4)
    for reports, end in ((eye, 0.15), (eye.roll(1, 0), 0.5)):
        loss = InfoNCELoss(tau=0.2, tau_min=0.15, tau_max=0.5)
        optimizer = torch.optim.SGD(loss.parameters(), lr=5.0)
        for _ in range(30):
            optimizer.zero_grad()
            loss(eye, reports)["loss"].backward()
            optimizer.step()
            loss.clamp()
        assert loss.learned()["temperature"].item() == pytest.approx(end)


@pytest.mark.parametrize("settings", [{"tau": 0.005}, {"tau": 2.0}, {"tau_min": 0.5}])
def test_an_initial_temperature_out_of_bounds_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="tau_min"):
        InfoNCELoss(**settings)


def test_autocast_does_not_lower_the_precision() -> None:
    inputs = pairs(16, 32, torch.float32)
    loss = InfoNCELoss(tau=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        given = loss(*inputs, **loss.learned())["loss"]
    torch.testing.assert_close(given, loss(*inputs)["loss"], rtol=0, atol=0)


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        InfoNCELoss()(torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("targets", [HASHES, vectors()], ids=["same_text", "soft"])
def test_several_positives_equal_the_sum_over_pairs(targets: Tensor) -> None:
    loss = InfoNCELoss(tau=0.2).double()
    inputs, weight = pairs(), loss.log_temperature
    given = loss(*inputs, targets=targets)
    logits = cosines(*inputs) / weight.exp()[0]
    expected = sum(slow_both_ways(logits, agreements(targets))) / 2
    torch.testing.assert_close(given["loss"], expected, rtol=0, atol=1e-10)
    assert_same_gradients(given["loss"], expected, [*inputs, weight])
    assert given["several_positives"] > 0
