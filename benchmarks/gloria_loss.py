"""Time and memory of GLoRIA's local loss, against the published loop over the reports.

    python benchmarks/gloria_loss.py

Both compute one forward and backward pass on the same random features. Times are medians of
alternating repetitions in one process, after one warm-up of each. Memory is the peak resident size
(on a GPU: allocated size) minus the size before the computation, each measured in a fresh process.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import alternate, peak_memories, peak_memory, print_result
from tests.losses.reference import local_loss_report_by_report
from vilmedic.losses.gloria import gloria_local_loss


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, with the setting of the published model as default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--reports", type=int, default=48)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--grid", type=int, default=19, help="regions along each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.images != arguments.reports:
        parser.error("--images and --reports must be equal: the loss contrasts matched pairs")
    return arguments


def make_features(arguments: argparse.Namespace) -> list[Tensor]:
    """Random regions [B, D, H, W] and words [B, L, D] that require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (arguments.images, arguments.width, arguments.grid, arguments.grid),
        (arguments.reports, arguments.words, arguments.width),
    )
    features = [torch.randn(shape, generator=generator) for shape in shapes]
    return [feature.to(arguments.device).requires_grad_() for feature in features]


def make_steps(block_size: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """One forward and backward pass of each contender; gradients stay in the features."""

    def ours(regions: Tensor, words: Tensor) -> Tensor:
        mask = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        terms = gloria_local_loss(
            regions, words, mask, temp1=4.0, temp2=5.0, temp3=10.0, block_size=block_size
        )
        loss = terms[0] + terms[1]
        loss.backward()
        return loss.detach()

    def peer(regions: Tensor, words: Tensor) -> Tensor:
        loss = local_loss_report_by_report(regions, words, [words.shape[1]] * len(words))
        loss.backward()
        return loss.detach()

    return {"ours": ours, "peer": peer}


def measure_memory(arguments: argparse.Namespace) -> float:
    """Peak MiB of one step above the size before it; run in a fresh process."""
    step = make_steps(arguments.block_size)[arguments.memory_of]
    small = argparse.Namespace(**{**vars(arguments), "images": 2, "reports": 2, "width": 32})
    step(*make_features(small))  # loads the libraries
    features = make_features(arguments)
    return peak_memory(lambda: step(*features), arguments.device)


def fresh(step: Callable[..., Tensor], features: list[Tensor]) -> Tensor:
    """One step, without the gradients of the previous one."""
    for feature in features:
        feature.grad = None
    return step(*features)


def main() -> None:
    """Measure both and print the comparison."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_memory(arguments))
        return

    memory = peak_memories()

    features = make_features(arguments)
    steps = make_steps(arguments.block_size)
    gradients: dict[str, list[Tensor]] = {}
    for name, step in steps.items():
        loss = step(*features)
        gradients[name] = [feature.grad for feature in features if feature.grad is not None]
        for feature in features:
            feature.grad = None
        print(f"{name}: loss {loss.item():.6f}", flush=True)
    for label, mine, other in zip(("regions", "words"), *gradients.values(), strict=True):
        difference = (mine - other).norm() / other.norm()
        print(f"gradient of the {label}: relative difference {difference.item():.1e}")
    gradients.clear()

    bound = {name: lambda step=step: fresh(step, features) for name, step in steps.items()}
    print_result("gloria_loss", alternate(bound, arguments.repetitions, arguments.device), memory)


if __name__ == "__main__":
    main()
