from __future__ import annotations

import copy

import pytest
import torch

from tests.small_models import tiny_batch, tiny_convirt, tiny_gloria, tiny_simclr, tiny_views
from vilmedic.blocks.repeated import checkpoint_blocks, compile_blocks, repeated_blocks
from vilmedic.models.contract import ContrastiveModel


def test_blocks_of_a_residual_network_and_of_a_transformer() -> None:
    names = {type(block).__name__ for block in repeated_blocks(tiny_convirt())}
    assert names >= {"InvertedResidual"}
    assert len(repeated_blocks(tiny_convirt())) == len(set(repeated_blocks(tiny_convirt())))


@pytest.mark.parametrize(
    ("build", "batch"),
    [(tiny_convirt, tiny_batch(6)), (tiny_simclr, tiny_views(6)), (tiny_gloria, tiny_batch(6))],
)
@pytest.mark.parametrize("chunk", [None, 3])
def test_computing_twice_changes_no_number(build, batch, chunk: int | None) -> None:
    torch.manual_seed(0)
    model: ContrastiveModel = build(forward_batch_size=chunk).train()
    peer = copy.deepcopy(model)
    names = list(model.state_dict())
    assert checkpoint_blocks(model) > 3

    results = []
    for one in (model, peer):
        torch.manual_seed(7)
        loss = one(batch)["loss"]
        loss.backward()
        results.append((loss, torch.rand(())))

    assert results[0] == results[1]
    assert list(model.state_dict()) == names
    for (name, a), b in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(model.named_buffers(), peer.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_less_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def bytes_kept(model: ContrastiveModel) -> int:
        kept.clear()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nelement() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tiny_views(6))["loss"]
        return sum(kept)

    model = tiny_simclr().train()
    before = bytes_kept(model)
    checkpoint_blocks(model)
    assert bytes_kept(model) < before / 2


def test_blocks_are_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_eagerly(function):
        compiled.append(function)
        return lambda *args, **kw: function(*args, **kw)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model = tiny_convirt().eval()
    expected, names = model(tiny_batch())["loss"], list(model.state_dict())
    assert compile_blocks(model) == len(compiled) > 3
    assert list(model.state_dict()) == names
    assert torch.equal(model(tiny_batch())["loss"], expected)
