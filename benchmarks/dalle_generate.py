"""Time of generating images with DALLE, against dalle-pytorch.

    python benchmarks/dalle_generate.py

Three ways to generate the same number of images from the same reports with the same weights, once
each after a short warm-up: ours; the reference's `generate_images`, which computes the whole
sequence again for each token, since it drops its cache without guidance; and the reference with its
cache passed to `forward` explicitly. With greedy sampling, all three are checked to agree. Needs
the reference, which `make test` installs. The last line printed is one JSON object: `ratio` is
against `generate_images`, `ratio_cached` against the explicit cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.dalle_models import add_sizes, make_models, make_reports
from benchmarks.measure import require_reference, seconds
from tests.parity.reference import load_reference
from vilmedic.generation.sampling import Sampling, generate_tokens
from vilmedic.models.dalle import DALLE

GREEDY = 0.9999  # share of the logits to drop: only the most likely token is left


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_sizes(parser)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--filter-thres", type=float, default=0.9)
    parser.add_argument(
        "--repetitions", type=int, default=3, help="repetitions, except of the slowest"
    )
    return parser.parse_args()


def our_images(model: DALLE, reports: Tensor, thres: float, length: int) -> Tensor:
    """Our tokens [B, N]; the images are decoded as well."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.rand(len(reports), length, generator=random, dtype=torch.float64)
    numbers = numbers.to(reports.device)
    mask = torch.ones_like(reports)
    tokens = generate_tokens([model], reports, mask, numbers, Sampling(filter_thres=thres))
    with torch.inference_mode():
        model.vae.decode(tokens)
    return tokens


@torch.no_grad()
def cached_images(model: Any, reference: Any, reports: Tensor, thres: float, length: int) -> Tensor:
    """Tokens [B, N] of the reference with its cache passed to `forward` explicitly."""
    cache: dict[str, Any] = {}
    tokens = reports[:, :0]
    for _ in range(length):
        logits = model(reports, tokens, cache=cache)[:, -1, :]
        kept = reference.top_k(logits, thres=thres)
        token = reference.gumbel_sample(kept) - model.num_text_tokens
        tokens = torch.cat((tokens, token[:, None]), dim=1)
    model.vae.decode(tokens)
    return tokens


@torch.no_grad()
def generated_tokens(model: Any, reports: Tensor, thres: float) -> Tensor:
    """The tokens [B, N] that the reference's `generate_images` decodes."""
    kept: list[Tensor] = []
    decode = model.vae.decode
    model.vae.decode = lambda tokens: kept.append(tokens) or decode(tokens)
    try:
        model.generate_images(reports, filter_thres=thres)
    finally:
        del model.vae.decode
    return kept[0]


def main() -> None:
    """Measures all three and prints the comparison."""
    arguments = parse_arguments()
    require_reference()
    torch.set_num_threads(arguments.threads)
    reference = load_reference()
    ours, peer = make_models(arguments)
    ours.eval()
    peer.eval()
    reports = make_reports(arguments, arguments.images)
    length, thres = arguments.image_side**2, arguments.filter_thres
    ways: dict[str, Callable[[float], Tensor]] = {
        "ours": lambda share: our_images(ours, reports, share, length),
        "cached": lambda share: cached_images(peer, reference, reports, share, length),
        "peer": lambda share: generated_tokens(peer, reports, share),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    likeliest = {name: way(GREEDY) for name, way in ways.items()}
    for name in ("cached", "peer"):
        same = (likeliest["ours"] == likeliest[name]).float().mean().item()
        print(f"greedy tokens, ours and {name}: {same:.1%} equal", flush=True)
    for _ in range(arguments.repetitions):
        for name in ("ours", "cached"):
            times[name].append(seconds(lambda n=name: ways[n](thres), arguments.device))  # type: ignore[misc]
    times["peer"].append(seconds(lambda: ways["peer"](thres), arguments.device))
    for name, taken in times.items():
        print(f"{name}: seconds", *(f"{second:.2f}" for second in taken))
    median = {name: statistics.median(taken) for name, taken in times.items()}
    result = {
        "name": "dalle_generate",
        "ours": round(median["ours"], 3),
        "peer": round(median["peer"], 3),
        "peer_cached": round(median["cached"], 3),
        "unit": "s",
        "ratio": round(median["peer"] / median["ours"], 2),
        "ratio_cached": round(median["cached"] / median["ours"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
