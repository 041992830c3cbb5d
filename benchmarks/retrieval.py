"""Time and memory of retrieval ranks, against one matrix product of the same embeddings.

    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --pairs 200000 --repetitions 1

Both multiply every image embedding with every report embedding in float64. The peer discards the
products; ours counts, in both directions, the candidates ranked above each pair and tied with it.
So the ratio is the fraction of the product's speed that computing ranks keeps. `--loop` also times
two products, each compared in one direction. Times are medians of alternating repetitions in one
process, after one warm-up of each; memory is the peak resident size minus the size before the
computation, each in a fresh process. The last line printed is one JSON object; `of_200000` is the
time for 200,000 pairs at the measured speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import alternate, peak_memories, peak_memory
from vilmedic.metrics.retrieval import TIE, cosines, count_ahead

MANY = 200_000
SIDE = 2048


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--loop", action="store_true", help="also time two compared products")
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_embeddings(pairs: int, width: int) -> tuple[Tensor, Tensor]:
    """Embeddings of images [N, D] and reports [N, D], similar within each pair."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, width, generator=generator)
    return images, images + 2 * torch.randn(pairs, width, generator=generator)


def make_steps(arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """The contenders, on the same embeddings."""
    images, reports = make_embeddings(arguments.pairs, arguments.width)
    device = torch.device(arguments.device)
    leads = cosines(images, reports, device)
    unit = [functional.normalize(x.double(), dim=1).to(arguments.device) for x in (images, reports)]
    starts = range(0, arguments.pairs, SIDE)
    product = torch.empty(SIDE, SIDE, dtype=torch.float64, device=arguments.device)

    def ours() -> object:
        return count_ahead(leads, block_size=1024)

    def peer() -> object:
        for i in starts:
            for j in starts:
                one, other = unit[0][i : i + SIDE], unit[1][j : j + SIDE]
                torch.mm(one, other.T, out=product[: len(one), : len(other)])
        return None

    def loop() -> object:
        for one, other in (unit, unit[::-1]):
            own = (one * other).sum(dim=1, keepdim=True)
            for i in range(0, arguments.pairs, 1024):
                for j in range(0, arguments.pairs, 1024):
                    lead = one[i : i + 1024] @ other[j : j + 1024].T - own[i : i + 1024]
                    (lead > TIE).sum(dim=1)
                    (lead.abs() <= TIE).sum(dim=1)
        return None

    return {"ours": ours, "peer": peer} | ({"loop": loop} if arguments.loop else {})


def main() -> None:
    """Measure both and print the comparison."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    steps = make_steps(arguments)
    if arguments.memory_of:
        print(peak_memory(steps[arguments.memory_of], arguments.device))
        return
    memory = peak_memories()
    times = alternate(steps, arguments.repetitions, arguments.device)
    result = {
        "name": "retrieval",
        "ours": round(times["ours"], 4),
        "peer": round(times["peer"], 4),
        "unit": "s",
        "ratio": round(times["peer"] / times["ours"], 2),
        "memory_ratio": round(memory["peer"] / max(memory["ours"], 1e-3), 2),
        "of_200000": round(times["ours"] * (MANY / arguments.pairs) ** 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
