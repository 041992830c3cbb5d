from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.inputs import assert_same_gradients, pairs
from vilmedic.config.load import load
from vilmedic.losses.barlow_twins import BarlowTwinsLoss


def slow_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 of the paper, with the standard deviations of batch normalisation."""
    size, width = first.shape

    def standardised(column: Tensor) -> list[Tensor]:
        mean = sum(column[n] for n in range(size)) / size
        variance = sum((column[n] - mean) ** 2 for n in range(size)) / size
        return [(column[n] - mean) / torch.sqrt(variance + 1e-5) for n in range(size)]

    one = [standardised(first[:, i]) for i in range(width)]
    other = [standardised(second[:, i]) for i in range(width)]
    invariance, redundancy = first.new_zeros(()), first.new_zeros(())
    for i in range(width):
        for j in range(width):
            entry = sum(a * b for a, b in zip(one[i], other[j], strict=True)) / size
            if i == j:
                invariance = invariance + (1 - entry) ** 2
            else:
                redundancy = redundancy + entry**2
    return invariance, redundancy


@pytest.mark.parametrize("weight", [0.005, 0.0, 1.0])
def test_equals_the_equations_with_gradients(weight: float) -> None:
    inputs = pairs()
    given = BarlowTwinsLoss(redundancy_weight=weight)(*inputs)
    invariance, redundancy = slow_terms(*inputs)
    torch.testing.assert_close(given["invariance"], invariance.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(given["redundancy"], redundancy.detach(), rtol=0, atol=1e-10)
    expected = invariance + weight * redundancy
    torch.testing.assert_close(given["loss"], expected, rtol=0, atol=1e-10)
    assert_same_gradients(given["loss"], expected, inputs)


def test_equals_a_published_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTLY_DID_VERSION_CHECK", "True")  # disables its online version check
    losses = pytest.importorskip("lightly.loss")
    first, second = pairs(16, 8, torch.float32)
    for weight in (0.005, 0.5):
        published = losses.BarlowTwinsLoss(lambda_param=weight)(first.detach(), second.detach())
        given = BarlowTwinsLoss(redundancy_weight=weight)(first, second)["loss"]
        torch.testing.assert_close(given.detach(), published)


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    first, second = pairs(32)
    moved = first * torch.tensor([3.0, 20.0, 7.0, 100.0, 5.0]) + torch.arange(5)
    expected = BarlowTwinsLoss()(first, second)["loss"]
    assert BarlowTwinsLoss()(moved, second)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_decorrelated_equal_features_have_zero_loss() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert BarlowTwinsLoss()(signs, signs)["loss"].item() == pytest.approx(0, abs=1e-6)
    same = torch.ones(4, 2, requires_grad=True)
    collapsed = BarlowTwinsLoss()(same, same)["loss"]
    collapsed.backward()
    assert collapsed.item() == pytest.approx(2)
    assert same.grad is not None
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = pairs(16, 32, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        given = BarlowTwinsLoss()(*inputs)["loss"]
    exact = BarlowTwinsLoss()(*[side.double() for side in inputs])["loss"]
    assert given.dtype == torch.float32
    assert given.item() == pytest.approx(exact.item(), rel=1e-5)


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        BarlowTwinsLoss()(torch.ones(1, 4), torch.ones(1, 4))


def test_a_key_of_another_loss_is_not_inherited() -> None:
    given = "config/phantom/convirt.yml"  # its loss has lambda_ 0.75
    assert load(given, []).data["model"]["loss"]["lambda_"] == 0.75
    changed = load(given, ["model.loss.proto=BarlowTwinsLoss"])
    assert changed.data["model"]["loss"] == {"proto": "BarlowTwinsLoss"}
