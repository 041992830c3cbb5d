"""Bytes exchanged in a training step, and how each system scales with the number of processes.

    python benchmarks/scaling.py                          # the check, then the table
    python benchmarks/scaling.py --worlds 8 64 --batch 64
    python benchmarks/scaling.py --no-check

The check trains every system for some steps in two processes and reads from the kernel how many
bytes each has sent; they must equal the formulas. The table applies the formulas to the published
models, with 8, 64 and 1,024 GPUs that each keep the published batch. Floating-point operations are
counted on the model itself; `--flops`, `--node` and `--network` set the speed of the GPUs and of
their links. The last line is one JSON object: the largest error of a formula.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.exchange import BYTES, Costs, check, costs_of, sent
from tests.small_models import tiny_spec
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR

WORDS = 97
"""The longest report of a batch, in words; `tokenizer_max_len` is 128 word pieces."""
REGIONS = 19 * 19
WIDTH = 768
MIMIC = 222_758
"""Training studies of MIMIC-CXR."""


# The table: published models on many GPUs


@dataclass(frozen=True)
class Published:
    """A published model and its costs per sample.

    Args:
        costs: what it exchanges.
        batch: the published batch size, here for one GPU.
        flops: operations of the forward pass for one sample.
        pair_flops: operations to compare one sample with another, forward.
        pair_bytes: bytes kept on each GPU for one sample of another process.
    """

    costs: Costs
    batch: int
    flops: float
    pair_flops: float
    pair_bytes: float


BERT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
RESNET = {"backbone": "resnet50", "pretrained": False}


def published() -> dict[str, Published]:
    """The models of `config/SELFSUP`, with a vocabulary of 30,522 word pieces."""
    vocabulary = 30_522 * WIDTH  # the small tokenizer used here has almost none
    images = torch.rand(1, 3, 224, 224)
    texts = {
        "input_ids": torch.full((1, 128), 5),
        "attention_mask": torch.ones(1, 128, dtype=torch.int64),
        "word_ids": torch.arange(128).clamp(max=WORDS).unsqueeze(0),
    }
    spec = tiny_spec(max_len=128)
    made: dict[str, Published] = {}

    projection = PairedProjection(
        visual_embedding_dim=2048, textual_embedding_dim=WIDTH, projection_dim=WIDTH
    )
    model: Any = ConVIRT(
        spec=spec,
        encoder=TextEncoder(spec=spec, **BERT),
        cnn=VisionEncoder(**RESNET),
        projection=projection,
        loss=ConVIRTLoss(),
    )
    costs = costs_of(model, 2 * WIDTH, scalars=3)
    costs = replace(costs, parameters=costs.parameters + vocabulary)
    made["ConVIRT"] = Published(
        costs, 32, flops_of(model, {"images": images} | texts), 4 * WIDTH, 2 * BYTES * (WIDTH + 2)
    )

    head = VisualProjection(visual_embedding_dim=2048, projection_dim=WIDTH)
    model = SimCLR(cnn=VisionEncoder(**RESNET), projection=head, loss=NTXentLoss())
    views = torch.stack([images, images], dim=1)
    made["SimCLR"] = Published(
        costs_of(model, 2 * WIDTH),
        16,
        flops_of(model, {"images": views}),
        8 * WIDTH,
        2 * BYTES * (WIDTH + 2),
    )

    model = GLoRIA(
        spec=spec,
        encoder=WordEncoder(spec=spec, last_n_layers=4, **BERT),
        cnn=VisionEncoder(**RESNET),
        visual_embedder=VisualEmbedder(interm_feature_dim=1024, feature_dim=2048),
        loss=GLoRIALoss(),
    )
    costs = costs_of(model, (2 + WORDS) * WIDTH, fixed=WORDS, swapped=1, scalars=5)
    costs = replace(costs, parameters=costs.parameters + vocabulary)
    made["GLoRIA"] = Published(
        costs,
        48,
        flops_of(model, {"images": images} | texts),
        # The word-region scores, and the Gram matrix of the regions.
        2 * WORDS * REGIONS * (WIDTH + REGIONS),
        2 * BYTES * (2 + WORDS) * WIDTH,
    )
    return made


def flops_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Operations to encode one sample, forward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval().encode(batch)  # type: ignore[operator]
    return float(counter.get_total_flops())


def table(models: dict[str, Published], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each system and number of GPUs."""
    rows = []
    for name, model in models.items():
        for world in arguments.worlds:
            own = arguments.batch or model.batch
            batch = own * world
            link = arguments.node if world <= arguments.per_node else arguments.network
            bytes_sent = sent(model.costs, batch, world, parallel="ddp", ring=True)
            encode = 3 * own * model.flops / arguments.flops
            pairs = 3 * own * batch * model.pair_flops / arguments.flops
            gradients = bytes_sent["gradients"] / link
            features = (bytes_sent["features"] + bytes_sent["swapped"]) / link
            # Gradients are sent during the backward pass, which is two thirds of the encoding.
            time = encode + pairs + features + max(0.0, gradients - encode * 2 / 3)
            rows.append(
                {
                    "system": name,
                    "gpus": world,
                    "batch": batch,
                    "gradient_mb": bytes_sent["gradients"] / 1e6,
                    "feature_mb": (bytes_sent["features"] + bytes_sent["swapped"]) / 1e6,
                    "kept_gb": batch * model.pair_bytes / 1e9,
                    "encode_ms": encode * 1e3,
                    "pairs_ms": pairs * 1e3,
                    "exchange_ms": (time - encode - pairs) * 1e3,
                    "efficiency": encode / time,
                    "steps": MIMIC // batch,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table as Markdown."""
    print(
        "| system | GPUs | batch | gradients, MB | features, MB | kept, GB | encoding, ms | pairs, "
        "ms | waiting, ms | efficiency | steps an epoch |"
    )
    print("|---|" + "---:|" * 10)
    for row in rows:
        print(
            f"| {row['system']} | {row['gpus']:,} | {row['batch']:,} | {row['gradient_mb']:,.0f} | "
            f"{row['feature_mb']:,.1f} | {row['kept_gb']:.2f} | {row['encode_ms']:.1f} | "
            f"{row['pairs_ms']:.1f} | {row['exchange_ms']:.1f} | {row['efficiency']:.0%} | "
            f"{row['steps']:,} |"
        )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--batch", type=int, help="samples per GPU; default: the published batch")
    parser.add_argument(
        "--flops", type=float, default=200e12, help="operations per second of a GPU"
    )
    parser.add_argument("--per-node", type=int, default=8, help="GPUs per machine")
    parser.add_argument(
        "--node", type=float, default=300e9, help="bytes per second inside a machine"
    )
    parser.add_argument(
        "--network", type=float, default=40e9, help="bytes per second and GPU between machines"
    )
    parser.add_argument("--no-check", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run the check and print the table."""
    arguments = parse_arguments()
    worst = None if arguments.no_check else check()
    print()
    show(table(published(), arguments))
    if worst is not None:
        result = {"name": "scaling_formulas", "ours": worst, "unit": "relative error of bytes sent"}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
