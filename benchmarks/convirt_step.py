"""Time of a ConVIRT training step (ResNet-50, BERT-base), against a plain PyTorch implementation.

    python benchmarks/convirt_step.py
    python benchmarks/convirt_step.py --device cuda --batches 32 256 --precisions bf16 --loader

The published implementation: plain modules in float32, images in the default memory layout, reports
of 48 tokens padded to 128, the loss and AdamW as in the paper. Ours: the model and the training
step of this package on the same weights, images and reports, padded to the longest of the batch.
Each contender runs in its own process, alternately; times are medians. With `--loader`, samples are
phantom X-rays read from disk. Prints a table and one JSON object on the last line, for the largest
batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.small_models import tiny_spec
from vilmedic.blocks.projection import PairedProjection
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.sections import TrainorSection
from vilmedic.datasets.image import ImageDataset
from vilmedic.datasets.loader import make_loader
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.models.convirt import ConVIRT
from vilmedic.phantom.write import Plan, build
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.parallel import prepare_network
from vilmedic.training.step import TrainingStep

TOKENS, PADDED, PIXELS, VOCABULARY = 48, 128, 224, 30_000
BERT_BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
BERT_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LR = 5e-5
Batch = dict[str, Tensor]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[8])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes per contender")
    parser.add_argument("--repetitions", type=int, default=3, help="timed steps per process")
    parser.add_argument("--loader", action="store_true", help="read images from disk")
    parser.add_argument("--compile", action="store_true", help="trainor.compile for ours")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a trial run")
    parser.add_argument(
        "--peak", type=float, help="peak TFLOP/s of the device; default: measured matmul"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(arguments: argparse.Namespace) -> ConVIRT:
    """ConVIRT with random weights, the same in every process."""
    torch.manual_seed(0)
    spec = tiny_spec(max_len=PADDED)
    bert = BERT_TINY if arguments.tiny else BERT_BASE
    cnn = VisionEncoder(backbone="resnet18" if arguments.tiny else "resnet50", pretrained=False)
    width = bert["hidden_size"]
    settings = {**bert, "intermediate_size": 4 * width, "vocab_size": VOCABULARY}
    return ConVIRT(
        spec=spec,
        encoder=TextEncoder(spec=spec, **settings),
        cnn=cnn,
        projection=PairedProjection(
            visual_embedding_dim=cnn.out_features,
            textual_embedding_dim=width,
            projection_dim=width,
        ),
        loss=ConVIRTLoss(),
    )


def make_batch(size: int, tokens: int) -> Batch:
    """Grey images and reports of 48 tokens, padded to a number of tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, 1, PIXELS, PIXELS)
    ids = torch.randint(4, VOCABULARY, (size, TOKENS), generator=generator)
    return {
        "index": torch.arange(size),
        "images": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "input_ids": functional.pad(ids, (0, tokens - TOKENS)),
        "attention_mask": (torch.arange(tokens) < TOKENS).long().expand(size, tokens).contiguous(),
    }


def floats(batch: Batch) -> Batch:
    """Normalised images with three channels."""
    images = (batch["images"].float() / 255 - 0.5) / 0.25
    return batch | {"images": images.expand(-1, 3, -1, -1)}


def published_step(model: ConVIRT, device: torch.device) -> Callable[[Batch], Tensor]:
    """The step in plain torch and transformers code, with the same weights, default layout."""
    network = model.cnn.network.to(memory_format=torch.contiguous_format)
    bert, heads = model.encoder.network, model.projection
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step(batch: Batch) -> Tensor:
        batch = floats({name: value.to(device) for name, value in batch.items()})
        optimizer.zero_grad()
        images = heads.visual(network(batch["images"].contiguous()).flatten(1))
        output = bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        reports = heads.linguistic(output.pooler_output)
        cosine = functional.normalize(images, dim=1) @ functional.normalize(reports, dim=1).T
        target = torch.arange(len(cosine), device=device)
        one, other = (functional.cross_entropy(c, target) for c in (cosine / 0.1, cosine.T / 0.1))
        loss = 0.75 * one + 0.25 * other
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def our_step(
    model: ConVIRT, precision: str, compiled: bool, device: torch.device
) -> Callable[[Batch], Tensor]:
    """The step of this package."""
    section = TrainorSection(
        optimizer="AdamW", optim_params={"lr": LR}, precision=precision, compile=compiled
    )
    prepare_network(model, section, device)
    optimizer = make_optimizer(model, section)
    step = TrainingStep(model, floats, optimizer, section, device)
    return lambda batch: step([batch]).loss


def batches(arguments: argparse.Namespace, size: int, tokens: int) -> Iterator[Batch]:
    """The same batch repeatedly, or its reports with images from disk."""
    given = make_batch(size, tokens)
    if not arguments.loader:
        yield from itertools.repeat(given)
    split: dict[str, Any] = {"split": "train", "training": True, "seed": 0}
    data = ImageDataset(**split, root=str(arguments.data))
    loader = make_loader(data, batch_size=size, training=True, seed=0, drop_last=True)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            yield given | batch


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Time one contender; run in a fresh process."""
    kind, size = arguments.measure[0], int(arguments.measure[1])
    device = torch.device(arguments.device)
    model = make_model(arguments).to(device).train()
    published = kind == "published"
    tokens = PADDED if published else TOKENS
    step = (
        published_step(model, device)
        if published
        else our_step(model, kind, arguments.compile, device)
    )
    drops = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    rates = [drop.p for drop in drops]
    for drop in drops:
        drop.p = 0.0  # the first step must be the same for all
    with FlopCounterMode(display=False) as counter:
        loss = step(make_batch(size, tokens)).item()
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]
    ).item()
    for drop, rate in zip(drops, rates, strict=True):
        drop.p = rate
    step(make_batch(size, tokens)).item()
    seconds, waited = [], []
    feed = batches(arguments, size, tokens)
    next(feed)
    for _ in range(arguments.repetitions):
        began = time.perf_counter()
        batch = next(feed)
        waited.append(time.perf_counter() - began)
        step(batch).item()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds),
        "waited": sum(waited) / sum(seconds),
        "flop": counter.get_total_flops(),
        "loss": loss,
        "norm": norm,
    }


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    one = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def run_child(arguments: argparse.Namespace, kind: str, size: int) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, *sys.argv, "--measure", kind, str(size)]
    command += ["--data", str(arguments.data)] if arguments.data else []
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace, size: int) -> dict[str, dict[str, float]]:
    """Time all contenders alternately at one batch size and print the table."""
    kinds = ["published", *arguments.precisions]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            found[kind].append(run_child(arguments, kind, size))
    rows = {}
    for kind, runs in found.items():
        row = rows[kind] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
        peak = arguments.peak or matmul_peak(torch.device(arguments.device), half)
        done = row["flop"] / row["seconds"] / 1e12
        print(
            f"batch {size:4d} {kind:10s} {row['seconds']:8.3f} s {size / row['seconds']:8.1f} "
            f"samples/s {done:7.2f} TFLOP/s ({done / peak:4.0%} of {peak:.2f}) "
            f"{row['waited']:4.0%} waiting for data   first loss {row['loss']:.6f}, gradient "
            f"norm {row['norm']:.5f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.loader:
            arguments.data = Path(folder) / "phantom"
            plan = Plan(train=2 * max(arguments.batches), validate=1, test=1, size=256)
            build(arguments.data, plan, force=False, workers=0)
        for size in sorted(arguments.batches):
            rows = compare(arguments, size)
    peer, ours = rows["published"]["seconds"], rows[arguments.precisions[0]]["seconds"]
    result = {
        "name": "convirt_step",
        "ours": round(ours, 3),
        "peer": round(peer, 3),
        "unit": f"s a step of {size}",
        "ratio": round(peer / ours, 2),
    }
    for kind in arguments.precisions[1:]:
        result[f"ours_{kind}"] = round(rows[kind]["seconds"], 3)
        result[f"ratio_{kind}"] = round(peer / rows[kind]["seconds"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
