from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.losses.inputs import assert_same_gradients
from tests.losses.targets import HASHES, agreements, cosines, slow_both_ways, vectors
from vilmedic.losses import convirt
from vilmedic.losses.convirt import ConVIRTLoss, agreement, convirt_loss, several_positives


def slow_loss(visual: Tensor, linguistic: Tensor, tau: float, lambda_: float) -> Tensor:
    """Equations 2 to 4 of the paper, pair by pair."""

    def similarity(i: int, j: int) -> Tensor:
        v, u = visual[i], linguistic[j]
        return (v * u).sum() / (v.pow(2).sum().sqrt() * u.pow(2).sum().sqrt())

    total = visual.new_zeros(())
    for i in range(len(visual)):
        positive = torch.exp(similarity(i, i) / tau)
        over_reports = sum(torch.exp(similarity(i, k) / tau) for k in range(len(visual)))
        over_images = sum(torch.exp(similarity(k, i) / tau) for k in range(len(visual)))
        total = total - lambda_ * torch.log(positive / over_reports)
        total = total - (1 - lambda_) * torch.log(positive / over_images)
    return total / len(visual)


def pairs(size: int = 7, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(size, width, generator=random, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize(("tau", "lambda_"), [(0.1, 0.75), (0.5, 0.0), (1.0, 1.0), (0.07, 0.5)])
def test_equals_the_equations_with_gradients(tau: float, lambda_: float) -> None:
    fast = [x.requires_grad_() for x in pairs()]
    slow = [x.requires_grad_() for x in pairs()]

    loss, _, _ = convirt_loss(*fast, tau, lambda_)
    reference = slow_loss(*slow, tau, lambda_)
    loss.backward()
    reference.backward()

    assert abs(loss.item() - reference.item()) < 1e-10
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


def test_terms_are_named_by_retrieval_direction() -> None:
    visual = torch.eye(2, dtype=torch.float64)
    linguistic = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    # Both reports have the same embedding, so images cannot rank them, but the reports rank the
    # images: the second one wrongly.
    out = ConVIRTLoss(tau=1.0, lambda_=0.75)(visual, linguistic)
    right = math.log(1 + math.exp(-1))
    wrong = math.log(1 + math.exp(1))
    assert out["image_to_text"].item() == pytest.approx(math.log(2))
    assert out["text_to_image"].item() == pytest.approx((right + wrong) / 2)
    expected = 0.75 * math.log(2) + 0.25 * (right + wrong) / 2
    assert out["loss"].item() == pytest.approx(expected)


def test_embedding_norm_does_not_matter() -> None:
    visual, linguistic = pairs()
    scaled = convirt_loss(visual * 50, linguistic / 9, 0.1, 0.75)[0]
    torch.testing.assert_close(scaled, convirt_loss(visual, linguistic, 0.1, 0.75)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    half = [x.to(dtype) for x in pairs(16, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = convirt_loss(*half, 0.1, 0.75)[0]
    exact = convirt_loss(*[x.double() for x in half], 0.1, 0.75)[0]
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < 1e-5


def test_a_zero_embedding_gives_a_finite_gradient() -> None:
    visual, linguistic = pairs()
    visual[0] = 0
    visual.requires_grad_()
    convirt_loss(visual, linguistic, 0.1, 0.75)[0].backward()
    assert visual.grad is not None
    assert visual.grad.isfinite().all()


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        convirt_loss(torch.ones(1, 4), torch.ones(1, 4), 0.1, 0.75)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[4, 3\] and \[5, 3\]"):
        convirt_loss(torch.ones(4, 3), torch.ones(5, 3), 0.1, 0.75)


@pytest.mark.parametrize("targets", [HASHES, vectors()], ids=["same_text", "soft"])
def test_several_positives_equal_the_sum_over_pairs(targets: Tensor) -> None:
    inputs = [side.requires_grad_() for side in pairs(6)]
    loss, rows, columns = convirt_loss(*inputs, 0.3, 0.75, targets=targets)
    expected = slow_both_ways(cosines(*inputs) / 0.3, agreements(targets))
    torch.testing.assert_close(rows, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(columns, expected[1], rtol=0, atol=1e-10)
    assert_same_gradients(loss, 0.75 * expected[0] + 0.25 * expected[1], inputs)


def test_all_different_targets_equal_identity() -> None:
    inputs = pairs()
    alone = convirt_loss(*inputs, 0.1, 0.75)[0]
    with_targets = convirt_loss(*inputs, 0.1, 0.75, targets=torch.arange(7))[0]
    torch.testing.assert_close(with_targets, alone, rtol=0, atol=1e-12)


def test_equal_reports_are_not_pushed_apart() -> None:
    visual, linguistic = torch.eye(3)[[0, 0, 1]], torch.eye(3)[[0, 0, 1]]
    out = ConVIRTLoss(tau=0.01)(visual, linguistic, targets=torch.tensor([5, 5, 6]))
    # Two positives share the probability evenly: the loss is its entropy, the minimum.
    assert out["loss"].item() == pytest.approx(math.log(2) * 2 / 3, rel=1e-5)
    assert out["several_positives"].item() == pytest.approx(2 / 3)


def test_fraction_of_several_positives_is_counted_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert several_positives(None) == {}
    for block in (1, 13, 2**22):
        monkeypatch.setattr(convirt, "BLOCK", block)
        assert several_positives(HASHES)["several_positives"].item() == pytest.approx(5 / 6)
        # at this temperature only equal labels have an agreement above 0.5
        soft = several_positives(vectors(0.1))
        assert soft["several_positives"].item() == pytest.approx(2 / 6)


def test_zero_vectors_agree_fully() -> None:
    zeros = torch.zeros(2, 3)
    assert agreement(zeros, zeros, torch.float32).tolist() == [[1, 1], [1, 1]]
