from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vilmedic.blocks import autoencoder
from vilmedic.blocks.autoencoder import likeliest_codes, relaxed_lookup

POSITIONS, CODES, WIDTH, OUT = 20, 9, 5, 4


@pytest.fixture
def inputs() -> list[Tensor]:
    """Features, weight, bias and codebook vectors."""
    random = torch.Generator().manual_seed(0)
    shapes = ((POSITIONS, WIDTH), (CODES, WIDTH), (CODES,), (CODES, OUT))
    made = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def gradients(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    found, spread = relaxed_lookup(*inputs, **{"temperature": 0.7, "divergence": True, **options})
    target = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    return list(torch.autograd.grad((found * target).sum() + 0.3 * spread, inputs))


def test_each_position_mixes_the_codebook_vectors_by_its_weights(inputs: list[Tensor]) -> None:
    features, weight, bias, vectors = (tensor.detach() for tensor in inputs)
    noise = torch.randn(POSITIONS, CODES, dtype=torch.float64)
    found, spread = relaxed_lookup(*inputs, temperature=0.5, divergence=True, noise=noise)
    total = 0.0
    for p in range(POSITIONS):
        logits = [float(features[p] @ weight[k] + bias[k]) for k in range(CODES)]
        raised = [math.exp((logits[k] + float(noise[p, k])) / 0.5) for k in range(CODES)]
        mixed = sum(raised[k] / sum(raised) * vectors[k] for k in range(CODES))
        torch.testing.assert_close(found[p], mixed)
        q = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        total += sum(share * math.log(share * CODES) for share in q)
    assert spread.item() == pytest.approx(total)


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"hard": True, "reinmax": True}], ids=str)
def test_block_size_does_not_change_results_with_redrawn_noise(
    inputs: list[Tensor], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass redraws the noise: it must equal that of the forward pass."""
    monkeypatch.setattr(autoencoder, "BLOCK", 6 * CODES)
    torch.manual_seed(3)
    noise = torch.cat(
        [-torch.empty(rows, CODES).double().exponential_().log() for rows in (6, 6, 6, 2)]
    )
    torch.manual_seed(3)
    in_blocks = gradients(inputs, **options)
    monkeypatch.setattr(autoencoder, "BLOCK", 2**20)
    for mine, expected in zip(in_blocks, gradients(inputs, noise=noise, **options), strict=True):
        torch.testing.assert_close(mine, expected)


def test_only_one_block_of_weights_is_kept_for_backward(
    inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    monkeypatch.setattr(autoencoder, "BLOCK", 4 * CODES)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        relaxed_lookup(*inputs, temperature=0.7)
    assert max(saved, default=0) < POSITIONS * CODES


def test_hard_sampling_gives_the_vector_of_one_code(inputs: list[Tensor]) -> None:
    torch.manual_seed(0)
    found, _ = relaxed_lookup(*inputs, temperature=0.7, hard=True)
    distance = torch.cdist(found, inputs[3])
    torch.testing.assert_close(distance.min(dim=1).values, torch.zeros(POSITIONS).double())
    assert gradients(inputs, hard=True)[0].abs().sum() > 0


def test_code_frequencies_follow_the_softmax() -> None:
    """Adding Gumbel noise and taking the maximum samples from the softmax of the logits."""
    torch.manual_seed(0)
    bias = torch.tensor([0.0, 1.0, 2.0])
    rows = torch.zeros(20_000, 1)
    found, _ = relaxed_lookup(rows, torch.zeros(3, 1), bias, torch.eye(3), temperature=1, hard=True)
    torch.testing.assert_close(found.mean(dim=0), bias.softmax(dim=0), atol=0.015, rtol=0)


def test_most_likely_codes(inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, bias, _ = inputs
    monkeypatch.setattr(autoencoder, "BLOCK", 3 * CODES)
    codes = likeliest_codes(features, weight, bias)
    assert torch.equal(codes, (features @ weight.T + bias).argmax(dim=1))
