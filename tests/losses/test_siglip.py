from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import SiglipConfig, SiglipModel

from tests.losses.inputs import assert_same_gradients, pairs
from tests.losses.targets import HASHES, agreements, cosines, vectors
from vilmedic.losses.siglip import SigLIPLoss, siglip_loss


def slow_loss(visual: Tensor, linguistic: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 of the paper, pair by pair."""
    total = visual.new_zeros(())
    for i, image in enumerate(visual):
        for j, report in enumerate(linguistic):
            logit = scale * functional.cosine_similarity(image, report, dim=0) + bias
            total = total - torch.log(torch.sigmoid(logit if i == j else -logit))
    return total / len(visual)


@pytest.mark.parametrize("block", [1, 13, 10**6])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (1.0, 0.0), (30.0, 2.0)])
def test_equals_the_double_sum_with_gradients(scale: float, bias: float, block: int) -> None:
    module = SigLIPLoss(scale=scale, bias=bias).double()
    inputs, weights = pairs(), [module.log_scale, module.bias]
    learned = module.learned()
    loss = siglip_loss(*inputs, learned["temperature"], learned["bias"], block=block)
    expected = slow_loss(*inputs, module.log_scale.exp()[0], module.bias[0])
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert_same_gradients(3 * loss, 3 * expected, [*inputs, *weights])
    again = module(*inputs)
    torch.testing.assert_close(again["loss"], expected, rtol=0, atol=1e-10)
    assert again["bias"].item() == bias


def test_gradient_equals_finite_differences() -> None:
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, -1.0)]
    assert torch.autograd.gradcheck(siglip_loss, [*pairs(3), *numbers])


def test_equals_a_published_implementation() -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 1}
    vision = {**small, "image_size": 8, "patch_size": 8}
    text = {**small, "vocab_size": 20, "max_position_embeddings": 4, "projection_size": 8}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    model.logit_scale.data.fill_(1.5)
    model.logit_bias.data.fill_(-2.0)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, generator=random)
    ids = torch.randint(0, 20, (5, 4), generator=random)
    out = model(input_ids=ids, pixel_values=images, return_loss=True)
    ours = SigLIPLoss(scale=math.exp(1.5), bias=-2.0)
    torch.testing.assert_close(ours(out.image_embeds, out.text_embeds)["loss"], out.loss)


@pytest.mark.parametrize("targets", [None, torch.arange(32) % 5])
def test_logits_are_not_kept_for_the_backward_pass(targets: Tensor | None) -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    inputs = pairs(32, 4, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = SigLIPLoss()(*inputs, targets=targets)["loss"]
    assert max(kept) <= 32 * 4
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs, loss = pairs(16, 32, dtype), SigLIPLoss()
    with torch.autocast("cpu", torch.bfloat16):
        given = loss(*inputs, **loss.learned())["loss"]
    exact = loss(*[side.detach().double() for side in inputs])["loss"]
    assert given.dtype == torch.float32
    assert given.item() == pytest.approx(exact.item(), rel=1e-5)
    given.backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.dtype == dtype


def test_large_logits_do_not_overflow() -> None:
    loss = SigLIPLoss(scale=1000.0, bias=-1000.0)
    wrong = torch.eye(3).roll(1, 0).requires_grad_()
    value = loss(torch.eye(3), wrong)["loss"]
    value.backward()
    assert value.item() == pytest.approx(1000 + math.log(2))
    assert wrong.grad is not None
    assert wrong.grad.isfinite().all()


@pytest.mark.parametrize("size", [2, 8])
def test_chance_loss_is_the_minimum_for_equal_features(size: int) -> None:
    loss = SigLIPLoss(scale=1.0, bias=0.0)
    optimizer = torch.optim.SGD([loss.bias], lr=0.5)
    same = torch.ones(size, 3)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(same, same)["loss"]
        value.backward()
        optimizer.step()
    assert value.item() == pytest.approx(loss.chance_loss(size), rel=1e-4)


def test_one_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        SigLIPLoss()(torch.ones(1, 4), torch.ones(1, 4))


@pytest.mark.parametrize("block", [1, 13, 10**6])
@pytest.mark.parametrize("targets", [HASHES, vectors()], ids=["same_text", "soft"])
def test_several_positives_equal_the_double_sum(targets: Tensor, block: int) -> None:
    module = SigLIPLoss(scale=3.0, bias=-2.0).double()
    inputs, weights = pairs(), [module.log_scale, module.bias]
    learned = module.learned()
    loss = siglip_loss(
        *inputs, learned["temperature"], learned["bias"], targets=targets, block=block
    )
    logits = module.log_scale.exp()[0] * cosines(*inputs) + module.bias[0]
    expected = logits.new_zeros(())
    for i, row in enumerate(agreements(targets)):
        for j, share in enumerate(row):
            right, wrong = torch.sigmoid(logits[i, j]), torch.sigmoid(-logits[i, j])
            expected = expected - (share * right.log() + (1 - share) * wrong.log()) / len(logits)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    assert_same_gradients(3 * loss, 3 * expected, [*inputs, *weights])
    torch.testing.assert_close(module(*inputs, targets=targets)["loss"], expected)
