"""Memory and time of large contrastive batches: all graphs kept against constant memory.

    python benchmarks/constant_memory.py                      # all three systems, 8 to 512
    python benchmarks/constant_memory.py --systems SimCLR --batches 8 64

One training step on random images and reports, encoded in chunks of 8 samples in both cases, with
the graphs of all chunks kept or with `model.forward_batch_size`. Memory is the peak resident size
(on a GPU: allocated size) of a fresh process during a step, minus the size with model, gradients
and optimizer state in place; freed memory counts as free. Time is the median of alternating steps
of both kinds in another process. Prints a table and one line of JSON for each system; the last is
ConVIRT's. `--plot FILE` also plots the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peak_memory import MIB, read_peak, start_peak
from tests.small_models import tiny_spec
from vilmedic.blocks.projection import PairedProjection, VisualEmbedder, VisualProjection
from vilmedic.blocks.text import TextEncoder, WordEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.sections import TrainorSection
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.models.constant_memory import join
from vilmedic.models.contract import Batch, ContrastiveModel
from vilmedic.models.convirt import ConVIRT
from vilmedic.models.gloria import GLoRIA
from vilmedic.models.simclr import SimCLR
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.parallel import prepare_network
from vilmedic.training.step import TrainingStep

CHUNK = 8
TOKENS = 32
KINDS = ("kept", "constant")
SYSTEMS = ("GLoRIA", "SimCLR", "ConVIRT")
BERT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--pixels", type=int, default=64, help="side of the images")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", type=Path, help="also plot the table into this file (PNG)")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(system: str, backbone: str, chunk: int | None) -> ContrastiveModel:
    """A system with random weights: a residual network, and a two-layer BERT."""
    spec = tiny_spec(max_len=TOKENS)
    cnn = VisionEncoder(backbone=backbone, pretrained=False)
    width = cnn.out_features
    regions = "features.13" if backbone == "mobilenet_v2" else "layer3"  # 16 pixels apart
    if system == "SimCLR":
        head = VisualProjection(visual_embedding_dim=width, projection_dim=128)
        return SimCLR(cnn=cnn, projection=head, loss=NTXentLoss(), forward_batch_size=chunk)
    if system == "ConVIRT":
        return ConVIRT(
            spec=spec,
            encoder=TextEncoder(spec=spec, **BERT),
            cnn=cnn,
            projection=PairedProjection(
                visual_embedding_dim=width, textual_embedding_dim=128, projection_dim=128
            ),
            loss=ConVIRTLoss(),
            forward_batch_size=chunk,
        )
    return GLoRIA(
        spec=spec,
        encoder=WordEncoder(spec=spec, last_n_layers=2, **BERT),
        cnn=cnn,
        visual_embedder=VisualEmbedder(
            interm_feature_dim=cnn.width(regions), feature_dim=cnn.out_features
        ),
        local_layer=regions,
        loss=GLoRIALoss(),
        upsample=None,
        forward_batch_size=chunk,
    )


class KeptGraphs(ContrastiveModel):
    """The same chunks, with the graphs of all of them in memory until the loss is computed.

    Args:
        model: the system; its `forward_batch_size` is the chunk.
    """

    def __init__(self, model: ContrastiveModel) -> None:
        super().__init__(model.forward_batch_size)
        self.model = model

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """See the system."""
        return self.model.encode(batch)

    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the system."""
        return self.model.contrast(features)

    def forward(self, batch: Batch, prepare: Any = None, part: Part = WHOLE) -> dict[str, Tensor]:
        """The loss of the whole batch, on one process."""
        return self.contrast(join([self.encode(prepare(part)) for part in self.chunks(batch)]))


def make_batch(system: str, size: int, pixels: int) -> Batch:
    """Random grey images, as the loader returns them, and reports of up to 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    views = (2,) if system == "SimCLR" else ()
    shape = (size, *views, 1, pixels, pixels)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    batch = {"index": torch.arange(size), "images": images}
    if system != "SimCLR":
        lengths = torch.randint(8, TOKENS + 1, (size, 1), generator=generator)
        mask = (torch.arange(TOKENS) < lengths).long()
        ids = torch.randint(4, 15, (size, TOKENS), generator=generator) * mask
        words = torch.arange(TOKENS).expand(size, TOKENS).masked_fill(mask == 0, -1)
        batch |= {"input_ids": ids, "attention_mask": mask, "word_ids": words}
    return batch


def prepare(batch: Batch) -> Batch:
    """Float images with three channels, as the data sets prepare them."""
    images = (batch["images"].float() / 255 - 0.5) / 0.25
    return batch | {"images": images.expand(*images.shape[:-3], 3, *images.shape[-2:])}


def make_step(
    arguments: argparse.Namespace, system: str, kind: str, device: torch.device
) -> TrainingStep:
    """The training step, after one warm-up step on a batch of one chunk.

    After it libraries are loaded, and gradients and optimizer state are allocated.
    """
    torch.manual_seed(0)
    model: ContrastiveModel = make_model(system, arguments.backbone, CHUNK)
    if kind == "kept":
        model = KeptGraphs(model)
    section = TrainorSection(optimizer="AdamW", optim_params={"lr": 1e-4})
    prepare_network(model, section, device)
    step = TrainingStep(model, prepare, make_optimizer(model, section), section, device)
    step([make_batch(system, CHUNK, arguments.pixels)])
    return step


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Peak MiB of one step, and its loss; run in a fresh process."""
    system, kind, size = arguments.memory
    device = torch.device(arguments.device)
    step = make_step(arguments, system, kind, device)
    batch = make_batch(system, int(size), arguments.pixels)
    held = start_peak(device)
    loss = step([batch]).loss.item()
    return {"mib": read_peak(device) - held, "loss": loss}


def measure_time(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of alternating steps of both kinds; run in a fresh process."""
    system, size = arguments.time
    device = torch.device(arguments.device)
    steps = {kind: make_step(arguments, system, kind, device) for kind in KINDS}
    batch = make_batch(system, int(size), arguments.pixels)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.repetitions):
        for kind, step in steps.items():
            began = time.perf_counter()
            step([batch]).loss.item()
            seconds[kind].append(time.perf_counter() - began)
    return {kind: statistics.median(values) for kind, values in seconds.items()}


def run_child(option: str, *values: object) -> dict[str, float]:
    """Measure in a separate process."""
    command = [sys.executable, *sys.argv, option, *map(str, values)]
    # Freed blocks above 64 kB are returned to the system at once; by default the C library keeps
    # blocks of up to 32 MB, and the resident size would measure its cache.
    trim = {"MALLOC_MMAP_THRESHOLD_": "65536"} if option == "--memory" else {}
    environment = {**os.environ, **trim}
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def summarize(system: str, batches: list[int], rows: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """Results of a system at its largest batch: constant memory against kept graphs."""
    first, last = batches[0], batches[-1]
    ours, peer = rows["constant", last], rows["kept", last]
    grown = (ours["mib"] - rows["constant", first]["mib"]) * MIB / max(1, last - first)
    return {
        "name": f"constant_memory_{system.lower()}",
        "ours": round(ours["seconds"], 3),
        "peer": round(peer["seconds"], 3),
        "unit": f"s a step of {last}",
        "ratio": round(peer["seconds"] / ours["seconds"], 3),
        "memory_ratio": round(rows["constant", first]["mib"] / ours["mib"], 3),
        "memory_against_kept_graphs": round(peer["mib"] / ours["mib"], 1),
        "bytes_a_sample": round(grown),
    }


def draw(path: Path, batches: list[int], tables: dict[str, dict[tuple[str, int], Any]]) -> None:
    """Plot memory and time against the batch size, one column for each system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tables), 6), layout="constrained")
    axes = figure.subplots(2, len(tables), sharex=True, squeeze=False)
    for column, (system, rows) in enumerate(tables.items()):
        for row, (unit, label) in enumerate((("mib", "MiB"), ("seconds", "seconds a step"))):
            at = axes[row, column]
            for kind, name in (("kept", "graphs kept"), ("constant", f"chunks of {CHUNK}")):
                values = [rows[kind, size][unit] for size in batches]
                at.plot(batches, values, marker="o", label=name)
            at.set(xscale="log", yscale="log", ylabel=label)
        axes[0, column].set_title(system)
        axes[1, column].set_xlabel("batch")
        axes[0, column].set_xticks(batches, [str(size) for size in batches])
        axes[0, column].legend()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory or arguments.time:
        found = measure_memory(arguments) if arguments.memory else measure_time(arguments)
        print(json.dumps(found))
        return
    batches = sorted(arguments.batches)
    tables: dict[str, dict[tuple[str, int], Any]] = {}
    for system in arguments.systems:
        rows = tables[system] = {}
        print(f"{system}: batch, MiB and seconds with graphs kept, in constant memory", flush=True)
        for size in batches:
            seconds = run_child("--time", system, size)
            for kind in KINDS:
                memory = run_child("--memory", system, kind, size)
                rows[kind, size] = memory | {"seconds": seconds[kind]}
            kept, ours = rows["kept", size], rows["constant", size]
            print(
                f"{size:6d} {kept['mib']:9.1f} {kept['seconds']:8.2f} "
                f"{ours['mib']:9.1f} {ours['seconds']:8.2f}   loss {kept['loss']:.5f} "
                f"{ours['loss']:.5f}",
                flush=True,
            )
    if arguments.plot:
        draw(arguments.plot, batches, tables)
    for system in arguments.systems:
        print(json.dumps(summarize(system, batches, tables[system])))


if __name__ == "__main__":
    main()
