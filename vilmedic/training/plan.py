"""Memory and time estimates of a training: `bin/train.py config.yml --plan`."""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vilmedic.blocks.pretrained import Filled
from vilmedic.config import build
from vilmedic.config.load import Config
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ConfigError
from vilmedic.log import counted
from vilmedic.models.vae import VAE
from vilmedic.registry import MODELS
from vilmedic.training.cards import CARDS, LAUNCH, MOVED, REACHED, USABLE, Card
from vilmedic.training.fake_run import CPU, PARTS, FakeRun, FakeTraining, held_networks
from vilmedic.training.made_up_data import make_batch, make_up_data
from vilmedic.training.parallel import prepare_network
from vilmedic.training.published_pixels import with_published_pixels

GIB = 2**30
SIZES = (24, 40, 80)
"""Card sizes in GiB for which the largest batch is estimated."""
MOST = 65_536
"""Largest batch that is reported."""
SMALLEST = 2
"""Smallest batch that is tried: batch normalisation needs two samples."""
FURTHER = 8
"""Factor from one tried batch size to the next."""
COSTLY = 30_000
"""Largest number of operations of a step that is tried: more would take half a minute."""


@dataclass(frozen=True)
class Plan:
    """Memory and time estimate of a training.

    Args:
        config: the configuration's file.
        parameters: number of weights, and of those that are trained.
        batch: samples of a batch.
        grad_accu: batches per step.
        precision: of the forward pass.
        step: of the configured batches.
        largest: by GiB of a card, the largest batch; 0 where one sample does not fit.
        card: its name, and the seconds of a step on it.
        samples: of the training split, where they are known.
        assumed: assumptions about the data.
    """

    config: str
    parameters: tuple[int, int]
    batch: int
    grad_accu: int
    precision: str
    step: FakeRun
    largest: dict[int, int]
    card: tuple[str, float]
    samples: int | None
    assumed: list[str]

    @property
    def epoch(self) -> float:
        """Seconds of an epoch, or of 100,000 samples where their number is not known."""
        return (self.samples or 100_000) / (self.batch * self.grad_accu) * self.card[1]

    def text(self) -> str:
        """The plan as it is printed."""
        held, (all_of_them, trained) = self.step.held, self.parameters
        name, seconds = self.card
        rate = self.batch * self.grad_accu / seconds
        what = (
            f"an epoch of {counted(self.samples, 'sample')}" if self.samples else "100,000 samples"
        )
        lines = [
            f"{self.config}: predicted, not measured",
            f"  parameters     {all_of_them:,}, of which {trained:,} are trained",
            f"  a step         {self.grad_accu} x {counted(self.batch, 'sample')} in "
            f"{self.precision}: "
            f"{self.step.flop / 1e12:.3g} TFLOP, {len(self.step.operations):,} operations",
            f"  memory         {_gib(self.step.peak)} at the peak",
            *(f"    {part:<18} {_gib(held[part])}" for part in PARTS if held[part]),
            "  largest batch  "
            + ", ".join(
                f"{size} GB: {_count(batch)}" for size, batch in sorted(self.largest.items())
            ),
            f"  on {name:<12}{seconds * 1e3:.3g} ms a step, {rate:,.0f} samples a second, "
            f"{_duration(self.epoch)} for {what}, if the data come as fast",
        ]
        if self.assumed:
            lines.append(f"  assumed        {'; '.join(self.assumed)}")
        return "\n".join(lines)


def make_plan(config: Config, *, card: str, samples: int | None = None) -> Plan:
    """Run a step of a configuration on fake tensors; of its data only label files are read.

    Args:
        config: the checked configuration.
        card: a name of `CARDS`.
        samples: of the training split; None leaves the time of an epoch to 100,000 samples.

    Raises:
        ConfigError: the model cannot be built, its step depends on the numbers in tensors, or the
            data set is not one of this package.
    """
    config = with_published_pixels(config, None)
    with tempfile.TemporaryDirectory() as folder:
        made_up = MadeUp(config, Path(folder), bf16=CARDS[card].bf16)
        model, section = made_up.model, made_up.section
        weights = [p for one in (model, *held_networks(model)) for p in one.parameters()]
        parameters = tuple(
            sum(p.numel() for p in weights if p.requires_grad or not trained)
            for trained in (False, True)
        )
        training = FakeTraining(model, made_up.data.prepare, section, gpu=made_up.gpu)

        def run(batch: int) -> FakeRun:
            try:
                return training.step(made_up.group(batch))
            except RuntimeError as error:  # torch's, of whatever asks for numbers
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                raise ConfigError(
                    f"model.proto: {config.model['proto']} cannot be planned, as a step of it does "
                    f"not run on tensors that have a shape and no numbers ({reason})."
                ) from error

        step = run(section.batch_size)
        limits = [size * GIB * USABLE for size in SIZES]
        peaks = _peaks(section.batch_size, step, run, limits)
    largest = {size: _largest(peaks, size * GIB * USABLE) for size in SIZES}
    return Plan(
        config=config.path,
        parameters=(parameters[0], parameters[1]),
        batch=section.batch_size,
        grad_accu=section.grad_accu,
        precision=section.precision,
        step=step,
        largest=largest,
        card=(card, seconds_of(step, CARDS[card], tf32=section.tf32)),
        samples=samples,
        assumed=made_up.assumed,
    )


class MadeUp:
    """The model of a configuration, untrained, and batches of the shapes of its data.

    Args:
        config: the checked configuration.
        folder: where the few made-up samples are written.
        bf16: whether `trainor.precision=auto` is bfloat16 on the GPU that is planned for.

    Attributes:
        gpu: whether the configuration leaves it to train on a GPU.
        section: how to train it in one process, with the device put aside.
        data: the data set.
        model: on the CPU, laid out as training lays it out.
        assumed: assumptions about the data.
    """

    def __init__(self, config: Config, folder: Path, *, bf16: bool = True) -> None:
        self.gpu = config.trainor.device != "cpu"
        self.section = _on_cpu(config.trainor)
        if self.section.precision == "auto":
            self.section.precision = "bf16" if self.gpu and bf16 else "fp32"
        self.data, self.assumed = make_up_data(config, folder)
        node, more = _with_vae(config, folder)
        self.assumed += more
        self.model = build(
            MODELS,
            node,
            spec=self.data.spec,
            filled=Filled(adapters=True),  # published weights are not needed
            read_encoder=None,
        )
        prepare_network(self.model, self.section, CPU)

    def group(self, batch: int) -> list[dict[str, Any]]:
        """Return the batches of a step."""
        tokens = getattr(self.model, "image_seq_len", None)
        return [make_batch(self.data, batch, tokens) for _ in range(self.section.grad_accu)]


def seconds_of(step: FakeRun, card: Card, *, tf32: bool) -> float:
    """Return the seconds of a step on a card: the time of the GPU, or of the CPU that queues it.

    An operation takes the longer of its compute time and its memory time.

    Args:
        step: what it computes.
        card: where.
        tf32: whether float32 products take inputs of 19 bits.
    """
    busy = 0.0
    for operation in step.operations:
        products = operation.flop / (card.rate(operation.dtype, tf32=tf32) * REACHED)
        busy += max(products, operation.moved / (card.bandwidth * 1e9 * MOVED))
    return max(busy, len(step.operations) * LAUNCH)


def _peaks(
    batch: int, first: FakeRun, step: Callable[[int], FakeRun], limits: Sequence[float]
) -> dict[int, int]:
    """Return peak bytes by batch size, from a batch that fits every card to one that fits none.

    Memory does not grow linearly: from some size on, a batch is computed in parts, and the peak
    moves to another operation. Steps with too many operations are not run.

    Args:
        batch: samples of the configured batch.
        first: its step.
        step: runs one of a number of samples.
        limits: bytes that may be held, of several cards.
    """
    peaks, counts = {batch: first.peak}, [len(first.operations)]
    smaller = batch
    while peaks[smaller] > min(limits) and smaller > SMALLEST:
        smaller = max(SMALLEST, smaller // 2)
        peaks[smaller] = step(smaller).peak
    wanted = 2 * batch
    while True:
        found = step(wanted)
        last, ratio = wanted, wanted / max(peaks)
        peaks[wanted] = found.peak
        counts.append(len(found.operations))
        wanted = min(_largest(peaks, max(limits)), FURTHER * last)
        growth = math.log(counts[-1] / counts[-2], ratio)  # the power of the batch; it may rise
        if wanted <= last or counts[-1] * (wanted / last) ** (growth + 1) > COSTLY:
            return peaks


def _largest(peaks: dict[int, int], limit: float) -> int:
    """The largest batch that fits, on the straight lines through batches and their peaks.

    Args:
        peaks: bytes held at the peak of a step, by the samples of the batch; two or more.
        limit: bytes that may be held.
    """
    batches = sorted(peaks)
    # the two around the answer, or the first or the last two
    place = next((n for n, one in enumerate(batches) if peaks[one] > limit), len(batches) - 1)
    low, high = batches[max(place, 1) - 1], batches[max(place, 1)]
    each = max((peaks[high] - peaks[low]) / (high - low), 1.0)
    return max(0, min(MOST, int(low + (limit - peaks[low]) / each)))


def _on_cpu(section: TrainorSection) -> TrainorSection:
    """Return the section for one fake CPU, without options that only change speed."""
    return dataclasses.replace(
        section, device="cpu", compile=False, parallel="ddp", sync_bn=False, profile=None
    )


def _with_vae(config: Config, folder: Path) -> tuple[Any, list[str]]:
    """Return the model node, with a synthetic VAE instead of one that is not trained yet.

    Returns:
        The node, and the assumptions made.
    """
    node = config.model
    vae = node.get("vae")
    if node["proto"] != "DALLE" or not isinstance(vae, dict) or Path(vae["ckpt"]).exists():
        return node, []
    settings = {key: value for key, value in vae.items() if key != "ckpt" and value is not None}
    made = VAE(**settings)
    settings |= {key: getattr(made, key) for key in ("image_size", "num_tokens", "num_layers")}
    path = folder / "vae.pth"
    torch.save({"model": made.state_dict(), "config": {"model": settings}}, path)
    changed = copy.deepcopy(dict(node))
    changed["vae"] = {**vae, "ckpt": str(path)}
    return changed, [
        f"a VAE of {made.num_tokens} codes that halves {made.image_size} pixels "
        f"{counted(made.num_layers, 'time')}, as model.vae.ckpt={vae['ckpt']} is not there"
    ]


def count_samples(config: Config) -> int | None:
    """Count the training samples by the lines of their file, if it exists.

    No sample is read: a part of the split, `dataset.fraction`, is that share of the lines, and one
    that `dataset.ids` names has as many samples as that file has lines.
    """
    node = config.dataset
    if ids := node.get("ids"):
        return _lines(Path(str(ids)))
    part = node.get("image") or node.get("seq") or node
    name = part.get("file") or ("report.tok" if part is node.get("seq") else "image.tok")
    path = Path(str(part.get("root"))) / f"train.{name}"
    lines = _lines(path)
    return lines and max(1, round(lines * (node.get("fraction") or 1)))


def _lines(path: Path) -> int | None:
    try:
        with path.open("rb") as stream:
            return sum(1 for _ in stream) or None
    except OSError:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _count(batch: int) -> str:
    if batch >= MOST:
        return f"{MOST:,} and more"
    return f"about {batch:,}" if batch else "not even the smallest"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"
