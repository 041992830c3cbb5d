"""Memory and time of a training step of the discrete VAE, against dalle-pytorch.

    python benchmarks/vae_step.py

Both compute one forward and backward pass on the same images with the same weights. Memory is the
peak resident size (on a GPU: allocated size) minus the size before the step, each measured in a
fresh process. Times are medians of alternating steps in one process, after one warm-up of each.
Losses and gradients on one image with the same noise are also compared. Needs the reference, which
`make test` installs. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (
    alternate,
    peak_memories,
    peak_memory,
    print_result,
    require_reference,
)
from tests.parity.reference import load_reference
from vilmedic.models.vae import VAE

SHAPE = ("image_size", "num_layers", "num_tokens", "codebook_dim", "hidden_dim")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, with the configuration for MIMIC-CXR as default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--codebook-dim", type=int, default=1024)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--num-resnet-blocks", type=int, default=1)
    parser.add_argument("--kl-div-loss-weight", type=float, default=0.0)
    parser.add_argument("--straight-through", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_models(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Both models with the same weights."""
    settings = {name: getattr(arguments, name) for name in SHAPE}
    settings["num_resnet_blocks"] = arguments.num_resnet_blocks
    settings["straight_through"] = arguments.straight_through
    weight = arguments.kl_div_loss_weight
    torch.manual_seed(0)
    # dalle-pytorch does not divide the KL divergence by the number of images
    peer = load_reference().DiscreteVAE(
        **settings, kl_div_loss_weight=weight / arguments.batch_size
    )
    ours = VAE(**settings, kl_div_loss_weight=weight)
    ours.load_state_dict(peer.state_dict())
    return {"ours": ours.to(arguments.device), "peer": peer.to(arguments.device)}


def make_step(name: str, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """One forward and backward pass, from a model without gradients."""

    def step() -> Tensor:
        loss: Tensor
        loss = model({"images": images})["loss"] if name == "ours" else model(images, True)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def make_images(arguments: argparse.Namespace, count: int) -> Tensor:
    """Random images in 0..1."""
    side = arguments.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, side, side, generator=generator).to(arguments.device)


def measure_memory(arguments: argparse.Namespace) -> float:
    """Peak MiB of a step; run in a fresh process."""
    model = make_models(arguments)[arguments.memory_of]
    make_step(arguments.memory_of, model, make_images(arguments, 1))()  # loads the libraries
    images = make_images(arguments, arguments.batch_size)
    return peak_memory(make_step(arguments.memory_of, model, images), arguments.device)


def compare(models: dict[str, nn.Module], images: Tensor) -> None:
    """Print the differences of losses and gradients when both get the same noise."""
    ours, peer = models["ours"], models["peer"]
    assert isinstance(ours, VAE)
    positions = (len(images), ours.num_tokens, ours.grid, ours.grid)
    noise = -torch.empty(positions, device=images.device).exponential_().log()

    def given_noise(logits: Tensor, tau: float, dim: int, hard: bool) -> Tensor:
        shares = ((logits + noise) / tau).softmax(dim)
        if not hard:
            return shares
        chosen = torch.zeros_like(shares).scatter_(dim, shares.argmax(dim, keepdim=True), 1.0)
        return chosen - shares.detach() + shares

    loss, _ = ours.objective(images, noise.flatten(2).transpose(1, 2))
    loss.backward()
    with mock.patch.object(functional, "gumbel_softmax", given_noise):
        expected = peer(images, True)
    expected.backward()
    print(f"one image, same noise: loss {loss.item():.7f} (ours), {expected.item():.7f} (peer)")
    gradients = dict(peer.named_parameters())
    apart = max(
        ((p.grad - gradients[name].grad).norm() / gradients[name].grad.norm()).item()  # type: ignore[operator,union-attr]
        for name, p in ours.named_parameters()
    )
    print(f"largest relative difference of a gradient: {apart:.1e}", flush=True)
    for model in models.values():
        model.zero_grad(set_to_none=True)


def main() -> None:
    """Measure both and print the comparison."""
    arguments = parse_arguments()
    require_reference()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_memory(arguments))
        return

    memory = peak_memories()
    models = make_models(arguments)
    compare(models, make_images(arguments, 1))
    images = make_images(arguments, arguments.batch_size)
    steps = {name: make_step(name, model, images) for name, model in models.items()}
    print_result("vae_step", alternate(steps, arguments.repetitions, arguments.device), memory)


if __name__ == "__main__":
    main()
