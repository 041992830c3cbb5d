"""The VAE against dalle-pytorch's DiscreteVAE: same weights and noise give the same numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.small_models import tiny_vae
from vilmedic.blocks import autoencoder
from vilmedic.models import vae
from vilmedic.models.vae import SHAPE, VAE, load_vae

SMALL: dict[str, Any] = {
    "image_size": 16,
    "num_tokens": 24,
    "codebook_dim": 10,
    "num_layers": 2,
    "hidden_dim": 6,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_resnet_blocks": 1},
    {"num_resnet_blocks": 2, "num_layers": 1, "channels": 1},
    {"smooth_l1_loss": True, "temperature": 0.3},
    {"kl_div_loss_weight": 0.01, "num_resnet_blocks": 1},
    {"straight_through": True, "num_resnet_blocks": 1},
    {"straight_through": True, "reinmax": True, "temperature": 1.3},
    {"normalization": [[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]], "kl_div_loss_weight": 0.1},
]


@pytest.fixture(params=OPTIONS, ids=lambda options: "-".join(options) or "default")
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SMALL, **request.param}


@pytest.fixture
def peer(reference: ModuleType, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = reference.DiscreteVAE(**options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


@pytest.fixture
def ours(peer: nn.Module, options: dict[str, Any]) -> VAE:
    model = VAE(**options).double()
    model.load_state_dict(peer.state_dict())
    return model


@pytest.fixture
def images(options: dict[str, Any]) -> Tensor:
    random = torch.Generator().manual_seed(1)
    shape = (3, options.get("channels", 3), 16, 16)
    return torch.rand(shape, generator=random, dtype=torch.float64)


def test_names_and_shapes_are_the_same(peer: nn.Module, ours: VAE) -> None:
    def described(module: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, value.shape) for name, value in module.state_dict().items()]

    assert described(ours) == described(peer)
    peer.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("block", "part"), [(autoencoder.BLOCK, vae.PART), (7 * 24, 2 * 6 * 16**2)]
)
def test_loss_and_gradients_are_the_same(
    peer: nn.Module,
    ours: VAE,
    images: Tensor,
    block: int,
    part: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    positions = (ours.grid, ours.grid)
    noise = torch.randn(3, ours.num_tokens, *positions, dtype=torch.float64)
    monkeypatch.setattr(functional, "gumbel_softmax", gumbel_softmax_of(noise))
    monkeypatch.setattr(autoencoder, "BLOCK", block)
    monkeypatch.setattr(vae, "PART", part)

    # dalle-pytorch does not divide the KL divergence by the number of images
    peer.kl_div_loss_weight = peer.kl_div_loss_weight / len(images)  # type: ignore[assignment,operator]
    theirs = peer(images, return_loss=True)
    loss, errors = ours.objective(images, noise.flatten(2).transpose(1, 2))

    # its constants (mean, standard deviation, uniform distribution) are float32
    torch.testing.assert_close(loss, theirs, rtol=1e-7, atol=0)
    torch.testing.assert_close(errors.mean(), reconstruction(peer, images), rtol=1e-7, atol=0)
    theirs.backward()
    loss.backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = expected[name].grad.abs().max()
        assert scale > 0
        assert (parameter.grad - expected[name].grad).abs().max() < 1e-6 * scale, name


def test_codes_and_decoded_images_are_the_same(peer: Any, ours: VAE, images: Tensor) -> None:
    codes = ours.get_codebook_indices(images)
    assert torch.equal(codes, peer.get_codebook_indices(images))
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 3
    # dalle-pytorch's images stay normalised
    mean, std = (torch.tensor(values).double()[:, None, None] for values in peer.normalization)
    expected = (peer.decode(codes) * std + mean).clamp(0, 1)
    torch.testing.assert_close(ours.decode(codes), expected.detach(), rtol=1e-6, atol=1e-9)


def test_checkpoints_convert_both_ways(reference: ModuleType, tmp_path: Path) -> None:
    """As described in docs/vae.md."""
    path = tmp_path / "vae.pt"
    trained = tiny_vae()
    hparams = {name: getattr(trained, name) for name in ("image_size", *SHAPE)}
    torch.save({"hparams": hparams, "weights": trained.state_dict()}, path)

    saved = torch.load(path, weights_only=True)
    peer = reference.DiscreteVAE(**saved["hparams"])
    peer.load_state_dict(saved["weights"])
    back = load_vae(path, {})

    images = torch.rand(2, 3, 16, 16)
    codes = trained.get_codebook_indices(images)
    assert torch.equal(peer.get_codebook_indices(images), codes)
    assert torch.equal(back.get_codebook_indices(images), codes)


def gumbel_softmax_of(noise: Tensor) -> Any:
    """torch's function with given noise instead of random noise."""

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool, dim: int) -> Tensor:
        soft = ((logits + noise) / tau).softmax(dim)
        if not hard:
            return soft
        largest = soft.argmax(dim, keepdim=True)
        return torch.zeros_like(soft).scatter_(dim, largest, 1.0) - soft.detach() + soft

    return gumbel_softmax


def reconstruction(peer: Any, images: Tensor) -> Tensor:
    """The first term of the reference's loss."""
    weight, peer.kl_div_loss_weight = peer.kl_div_loss_weight, 0.0
    loss: Tensor = peer(images, return_loss=True)
    peer.kl_div_loss_weight = weight
    return loss
