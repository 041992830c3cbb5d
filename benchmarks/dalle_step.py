"""Time and memory of a DALLE training step, against dalle-pytorch.

    python benchmarks/dalle_step.py

Both compute one forward and backward pass on the same tokens with the same weights. Times are
medians of alternating steps in one process, after one warm-up of each: ours and the reference, each
in float32 and with bfloat16 autocast. Memory is the peak resident size (on a GPU: allocated size)
minus that of the loaded model, in float32, each measured in a fresh process. Needs the reference,
which `make test` installs. The last line printed is one JSON object: `ratio` is float32 against
float32, `ratio_bf16` is ours with autocast against the reference in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.dalle_models import add_sizes, make_models, make_reports
from benchmarks.measure import in_fresh_process, peak_memory, require_reference, seconds
from vilmedic.device import autocast


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_sizes(parser)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_steps(arguments: argparse.Namespace, size: int) -> dict[str, Callable[[str], Tensor]]:
    """One forward and backward pass of each, by precision; gradients stay in the models."""
    ours, peer = make_models(arguments)
    reports = make_reports(arguments, size)
    random = torch.Generator().manual_seed(1)
    shape = (size, arguments.image_side**2)
    image = torch.randint(arguments.codes, shape, generator=random).to(arguments.device)
    mask = torch.ones_like(reports)
    device = torch.device(arguments.device)

    def our_step(precision: str) -> Tensor:
        ours.zero_grad(set_to_none=True)
        with autocast(device, precision):
            batch = {"input_ids": reports, "attention_mask": mask, "image_tokens": image}
            loss = ours(batch)["loss"]
        loss.backward()
        return loss.detach()

    def peer_step(precision: str) -> Tensor:
        peer.zero_grad(set_to_none=True)
        loss: Tensor
        with autocast(device, precision):
            loss = peer(reports, image, return_loss=True)
        loss.backward()
        return loss.detach()

    return {"ours": our_step, "peer": peer_step}


def main() -> None:
    """Measure both and print the comparison."""
    arguments = parse_arguments()
    require_reference()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        make_steps(arguments, 1)[arguments.memory_of]("fp32")  # loads the libraries
        step = make_steps(arguments, arguments.batch_size)[arguments.memory_of]
        print(peak_memory(lambda: step("fp32"), arguments.device))
        return

    memory = {name: in_fresh_process("--memory-of", name) for name in ("ours", "peer")}
    for name, size in memory.items():
        print(f"{name}: peak memory above the loaded model {size:.1f} MiB", flush=True)
    steps = make_steps(arguments, arguments.batch_size)
    runs = [(name, precision) for precision in ("fp32", "bf16") for name in steps]
    for name, precision in runs:
        print(f"{name}, {precision}: loss {steps[name](precision).item():.6f}", flush=True)
    times: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for _ in range(arguments.repetitions):
        for name, precision in runs:
            taken = seconds(lambda n=name, p=precision: steps[n](p), arguments.device)  # type: ignore[misc]
            times[name, precision].append(taken)
    median = {run: statistics.median(taken) for run, taken in times.items()}
    for (name, precision), taken in times.items():
        print(f"{name}, {precision}: seconds", *(f"{second:.3f}" for second in taken))
    reference = median["peer", "fp32"]
    result = {
        "name": "dalle_step",
        "ours": round(median["ours", "fp32"], 4),
        "ours_bf16": round(median["ours", "bf16"], 4),
        "peer": round(reference, 4),
        "peer_bf16": round(median["peer", "bf16"], 4),
        "unit": "s",
        "ratio": round(reference / median["ours", "fp32"], 2),
        "ratio_bf16": round(reference / median["ours", "bf16"], 2),
        "memory_ratio": round(memory["peer"] / memory["ours"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
