"""What processes exchange in a step, and where a system stops gaining from more of them.

    python benchmarks/scaling.py                          # the check, then the table
    python benchmarks/scaling.py --worlds 8 64 --batch 64
    python benchmarks/scaling.py --no-check

The check trains every system for some steps in two processes and reads from the kernel how many
bytes each has sent over its connections; they are to be what the formulas say. The table applies
the formulas to the published models, with 8, 64 and 1,024 GPUs that each keep the published batch.
Arithmetic is counted on the model itself; `--flops`, `--node` and `--network` say how fast the GPUs
and their links are. The last line is one JSON object: the largest error of a formula.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.systems import build, make_batches, train
from tests.factories import tiny_spec
from tests.together import run_checks
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.blocks.words import WordEncoder
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR

BYTES = 4
WORDS = 97
"""The longest report of a batch, in words; `tokenizer_max_len` is 128 pieces of words."""
REGIONS = 19 * 19
WIDTH = 768
MIMIC = 222_758
"""Training studies of MIMIC-CXR."""
TCP_INFO = 11
BYTES_SENT = 200  # where Linux has tcpi_bytes_sent in struct tcp_info


@dataclass(frozen=True)
class Costs:
    """What a system has to exchange.

    Args:
        parameters: trained numbers.
        buffers: bytes of running statistics.
        floats: floats of a sample that all processes gather, and whose gradients come back.
        fixed: bytes of a sample that are gathered without a gradient.
        swapped: floats of a sample that each process sends to the one that has the sample.
        scalars: numbers that are averaged for the log.
    """

    parameters: int
    buffers: int
    floats: int
    fixed: int = 0
    swapped: int = 0
    scalars: int = 1


def sent(costs: Costs, batch: int, world: int, *, parallel: str, ring: bool) -> dict[str, float]:
    """Bytes that a process sends in a step without accumulation, by what they are.

    Args:
        costs: of the system.
        batch: samples of all processes.
        world: number of processes.
        parallel: `ddp` or `fsdp`.
        ring: whether sums that are scattered travel once, as with NCCL; gloo adds them up
            everywhere.
    """
    others = (world - 1) / world
    scatter = others if ring else 2 * others
    weights = BYTES * costs.parameters
    features = BYTES * costs.floats * batch
    gradient = 2 * others if parallel == "ddp" else 2 * others + scatter
    return {
        "gradients": weights * gradient,
        "features": features * (others + scatter) + costs.fixed * batch * others,
        # Forward and backward, each process the others' share of what it has.
        "swapped": 2 * BYTES * costs.swapped * batch * others,
        # From the main process down a line: all but the last pass it on.
        "statistics": costs.buffers * others,
        "scalars": 2 * BYTES * costs.scalars * others,
    }


def costs_of(model: nn.Module, floats: int, **more: int) -> Costs:
    """The costs of a model, of which the floats of a sample are known."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    statistics = sum(b.numel() * b.element_size() for b in model.buffers())
    return Costs(trained, statistics, floats, **more)


# The check: what two processes send


def sent_by_this_process() -> int:
    """Bytes that the kernel has sent on the TCP connections of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    info = one.getsockopt(socket.IPPROTO_TCP, TCP_INFO, BYTES_SENT + 8)
                    total += struct.unpack_from("=Q", info, BYTES_SENT)[0]
        except OSError:
            continue
    return total


def count(system: str, parallel: str, batches: tuple[int, ...] = (64, 256)) -> dict[str, Any]:
    """Bytes of one step at each batch size, counted and by the formulas."""
    result: dict[str, Any] = {}
    for batch in batches:
        # Wide enough that what is agreed on between the CPUs does not count.
        model = build(system, **({"hidden": 20_000} if system == "Autoencoder" else {}))
        floats, more = gathered_by(system, model)
        costs = costs_of(model, floats, **more)
        data = make_batches(system, [batch])
        step, _ = train(model, data, parallel=parallel)
        own, parts = _own(data)
        step(own, parts)
        before, steps = sent_by_this_process(), 3
        for _ in range(steps):
            step(own, parts)
        counted = (sent_by_this_process() - before) / steps
        formula = sum(sent(costs, batch, 2, parallel=parallel, ring=False).values())
        result[str(batch)] = {"counted": counted, "formula": formula}
    return result


def _own(data: Any) -> Any:
    from tests.distributed.systems import parts_of

    return parts_of(data)


def gathered_by(system: str, model: Any) -> tuple[int, dict[str, int]]:
    """Floats of a sample of the small models, and what else they exchange."""
    if system == "ConVIRT":
        return 2 * 8, {"scalars": 3}
    if system == "SimCLR":
        return 2 * 8, {}
    if system == "GLoRIA":
        return 2 * 16 + 16 * 16, {"fixed": 16, "swapped": 1, "scalars": 5}
    return 0, {"scalars": 2}


def count_all() -> dict[str, Any]:
    """What `count` gives for every system, by its name and how it is shared."""
    return {
        f"{system} {parallel}": count(system, parallel)
        for system in ("ConVIRT", "SimCLR", "GLoRIA", "Autoencoder")
        for parallel in ("ddp", "fsdp")
    }


def check() -> float:
    """Print counted bytes beside the formulas; returns the largest relative error."""
    with tempfile.TemporaryDirectory() as folder:
        per_process = run_checks([count_all], Path(folder), seconds=1800)["count_all"]
    for result in per_process:
        if isinstance(result, str):
            raise RuntimeError(result)
    worst = 0.0
    print("Bytes that one of two processes sends in a step (gloo)\n")
    print(f"{'':18s}{'batch':>6s}{'counted':>12s}{'formula':>12s}{'error':>8s}")
    for name, batches in per_process[0].items():
        for batch in batches:
            # Which process relays what differs; the formulas are for the mean of both.
            values = [one[name][batch] for one in per_process]
            counted = sum(value["counted"] for value in values) / len(values)
            formula = values[0]["formula"]
            error = abs(counted - formula) / formula
            worst = max(worst, error)
            print(f"{name:18s}{batch:>6s}{counted:12,.0f}{formula:12,.0f}{error:8.2%}")
    return worst


# The table: published models on many GPUs


@dataclass(frozen=True)
class Published:
    """A published model, and what one sample costs.

    Args:
        costs: what it exchanges.
        batch: the published batch, here that of one GPU.
        flops: of the forward pass of a sample.
        pair_flops: of comparing one sample with another, forward.
        pair_bytes: kept for one sample of another process, on each GPU.
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
    """The models of `config/SELFSUP`, with a vocabulary of 30,522 pieces of words."""
    vocabulary = 30_522 * WIDTH  # the small tokenizer that stands in has next to none
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
    costs = Costs(costs.parameters + vocabulary, costs.buffers, costs.floats, scalars=3)
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
    costs = Costs(
        costs.parameters + vocabulary, costs.buffers, costs.floats, WORDS, swapped=1, scalars=5
    )
    made["GLoRIA"] = Published(
        costs,
        48,
        flops_of(model, {"images": images} | texts),
        # The scores of words and regions, and what the Gram matrix of the regions adds.
        2 * WORDS * REGIONS * (WIDTH + REGIONS),
        2 * BYTES * (2 + WORDS) * WIDTH,
    )
    return made


def flops_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Operations of encoding one sample, forward."""
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
            # Gradients travel while the backward pass goes on, which is two thirds of encoding.
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
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--batch", type=int, help="samples a GPU; the published batch otherwise")
    parser.add_argument("--flops", type=float, default=200e12, help="operations a second of a GPU")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a machine")
    parser.add_argument("--node", type=float, default=300e9, help="bytes a second inside a machine")
    parser.add_argument(
        "--network", type=float, default=40e9, help="bytes a second and GPU outside"
    )
    parser.add_argument("--no-check", action="store_true")
    return parser.parse_args()


def main() -> None:
    """The check and the table."""
    arguments = parse_arguments()
    worst = None if arguments.no_check else check()
    print()
    show(table(published(), arguments))
    if worst is not None:
        result = {"name": "scaling_formulas", "ours": worst, "unit": "relative error of bytes sent"}
        print(json.dumps(result))


if __name__ == "__main__":
    main()
