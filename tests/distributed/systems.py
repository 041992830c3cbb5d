"""Models whose gradients in two processes are compared with those in one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.several_processes import CPU
from tests.small_dalles import dalle_batch, save_vae, tiny_dalle
from tests.small_models import (
    TINY_VAE,
    several_images,
    tiny_batch,
    tiny_convirt,
    tiny_gloria,
    tiny_simclr,
    tiny_views,
)
from vilmedic.config.sections import TrainorSection
from vilmedic.distributed import processes
from vilmedic.distributed.gather import WHOLE, Part, whole
from vilmedic.losses.targets import Targets
from vilmedic.models.contract import Batch, ContrastiveModel, Features, Model
from vilmedic.models.vae import VAE
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.parallel import prepare_network
from vilmedic.training.step import StepResult, TrainingStep

Batches = list[dict[str, Tensor]]
SIZES = (8, 8, 5)
"""An accumulation group with a short last batch, of which two processes have 3 and 2 samples."""


class Pairs(ContrastiveModel):
    """Linear maps and a learned temperature, with a custom loss as in a user's model."""

    def __init__(self, forward_batch_size: int | None = None) -> None:
        super().__init__(forward_batch_size)
        self.image = nn.Linear(6, 4)
        self.text = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        self.log_temperature = nn.Parameter(torch.tensor(-1.0))
        self.unused = nn.Linear(2, 2)

    def encode(self, batch: Batch) -> Features:
        return {
            "temperature": self.log_temperature.exp(),
            "visual": self.image(batch["images"]),
            "linguistic": self.text(batch["words"]),
            "mask": batch["images"][:, 0] > -1,
        }

    def contrast(self, features: Features) -> dict[str, Tensor]:
        logits = features["visual"] @ features["linguistic"].T / features["temperature"]
        logits = logits.masked_fill(~features["mask"], -9.0)
        loss = functional.cross_entropy(logits, torch.arange(len(logits)))
        return {"loss": loss, "temperature": features["temperature"].detach()}


class Compared(ContrastiveModel):
    """Linear maps with a contrastive loss of the package."""

    def __init__(
        self,
        loss: nn.Module,
        forward_batch_size: int | None = None,
        targets: Targets | None = None,
    ) -> None:
        super().__init__(forward_batch_size, targets)
        self.image = nn.Linear(6, 4)
        self.text = nn.Linear(6, 4)
        self.loss = loss

    def encode(self, batch: Batch) -> Features:
        visual, linguistic = self.image(batch["images"]), self.text(batch["words"])
        targets = self.targets_of(batch, visual)
        return {**self.learned(), "visual": visual, "linguistic": linguistic, **targets}

    def contrast(self, features: Features, part: Part = WHOLE) -> dict[str, Tensor]:
        given = {**self.learned(features), **self.given_targets(features)}
        return part.call(self.loss, features["visual"], features["linguistic"], **given)


class Autoencoder(Model):
    """A model whose loss has no interaction between samples."""

    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 6))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        error = (self.layers(batch["images"]) - batch["images"]).square().mean(1)
        return {"loss": error.mean(), "largest": error.mean().detach()}


class Layer(nn.Module):
    """A layer without normalisation; records the dtypes of its weight and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.types = ("", "")

    def forward(self, states: Tensor) -> Tensor:
        self.types = (str(self.linear.weight.dtype), str(states.dtype))
        return states + functional.gelu(self.linear(states))


class Stack(Model):
    """Equal layers followed by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer(), Layer())
        self.last = nn.Linear(6, 6)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        predicted = self.last(self.layers(batch["images"]))
        return {"loss": (predicted - batch["words"]).square().mean()}


class Coin(Model):
    """Two layers; the second is unused from the third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.steps = 0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.steps += 1
        used = list(self.sides)[: 2 if self.steps < 3 else 1]
        found = [side(batch["images"]).square().mean() for side in used]
        return {"loss": torch.stack(found).sum()}


class VaryingCoin(Coin):
    """The same, but declares it."""

    varying = True


class VAEWithGivenNoise(VAE):
    """A VAE without random draws; each process has the noise of its own images."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss, _ = self.objective(batch["images"], batch["noise"])
        return {"loss": loss}


def small_vae(**settings: Any) -> VAE:
    return VAEWithGivenNoise(**TINY_VAE, kl_div_loss_weight=0.1, **settings)


def vae_batch(size: int, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    return {
        "index": torch.arange(size),
        "images": torch.rand(size, 3, 16, 16, generator=random),
        "noise": -torch.rand(size, 16, 12, generator=random).log().neg().log(),
    }


def small_dalle(**settings: Any) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_dalle(save_vae(Path(folder) / "vae.pth"), **settings)


def pairs_batch(size: int, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    index = {"index": torch.arange(size), "report_hash": torch.arange(size) % 3 - 1}
    index["labels"] = (torch.arange(size)[:, None] % torch.tensor([2, 3, 4]) == 0).float()
    index["input_ids"] = torch.arange(size)[:, None] * torch.tensor([2, 3, 5]) % 9 + 4
    index["attention_mask"] = torch.ones_like(index["input_ids"])
    return index | {name: torch.randn(size, 6, generator=random) for name in ("images", "words")}


SYSTEMS: dict[str, tuple[Callable[..., Model], Callable[..., Batch]]] = {
    "ConVIRT": (tiny_convirt, tiny_batch),
    "SimCLR": (tiny_simclr, tiny_views),
    "GLoRIA": (tiny_gloria, tiny_batch),
    "SimCLR of studies": (tiny_simclr, lambda *of, **how: several_images(tiny_views(*of, **how))),
    "GLoRIA of studies": (tiny_gloria, lambda *of, **how: several_images(tiny_batch(*of, **how))),
    "VAE": (small_vae, vae_batch),
    "DALLE": (small_dalle, dalle_batch),
    "Pairs": (Pairs, pairs_batch),
    "Compared": (Compared, pairs_batch),
    "Autoencoder": (Autoencoder, pairs_batch),
    "Stack": (Stack, pairs_batch),
    "Coin": (Coin, pairs_batch),
    "VaryingCoin": (VaryingCoin, pairs_batch),
}


def build(system: str, *, norm: bool = False, double: bool = False, **settings: Any) -> Model:
    """A model that is the same in every process, without dropout; `norm` uses batch statistics."""
    torch.manual_seed(0)
    model = SYSTEMS[system][0](**copy.deepcopy(settings))  # a loss may have parameters
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if norms:
        _set_statistics(model, norms, make_batches(system, [16])[0])
    for module in norms if not norm else []:
        module.eval()
        module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return model.double() if double else model


def _set_statistics(model: Any, norms: list[Any], batch: Batch) -> None:
    """Set running statistics to those of a batch: with others the activations would vanish."""
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        model.encode(batch)
    for module in norms:
        module.momentum = 0.1


def make_batches(system: str, sizes: Sequence[int] = SIZES) -> Batches:
    return [SYSTEMS[system][1](size, seed=seed) for seed, size in enumerate(sizes)]


def parts_of(batches: Batches) -> tuple[Batches, list[Part]]:
    """This process's part of the batches; reports are padded to the longest of its own."""
    rank, world = processes.rank(), processes.world_size()
    own, parts = [], []
    for batch in batches:
        pieces = {key: torch.tensor_split(value, world) for key, value in batch.items()}
        sizes = tuple(len(piece) for piece in pieces["index"])
        part = Part(sizes, rank)
        if not part.own:
            mine = {key: value[:2] for key, value in batch.items()}
        else:
            mine = {key: piece[rank] for key, piece in pieces.items()}
        if "attention_mask" in mine:
            width = int(mine["attention_mask"].sum(1).max())
            texts = {"input_ids", "attention_mask", "word_ids"} & mine.keys()
            mine |= {key: mine[key][:, :width] for key in texts}
        own.append(mine)
        parts.append(part)
    return own, parts


def train(
    model: Model, batches: Batches, steps: int = 1, **keys: Any
) -> tuple[TrainingStep, StepResult]:
    """Run steps on this process's part of a group of batches."""
    section = TrainorSection(**{"optimizer": "SGD", "optim_params": {"lr": 0.01}, **keys})
    prepare_network(model, section, CPU)
    model.train()
    step = TrainingStep(model, lambda batch: batch, make_optimizer(model, section), section, CPU)
    own, parts = parts_of(batches)
    for _ in range(steps):
        result = step(own, parts)
    return step, result


def outcome(step: TrainingStep, result: StepResult) -> dict[str, Any]:
    """The results of a step: gradients, weights, running statistics, loss and norm."""
    named = dict(step.model.named_parameters())
    return {
        "gradients": whole({k: p.grad.clone() for k, p in named.items() if p.grad is not None}),
        "state": copy.deepcopy(whole(step.model.state_dict())),
        "loss": result.loss,
        "norm": result.grad_norm,
        "parts": result.parts,
        "samples": result.samples,
    }


def compare(
    system: str,
    sizes: Sequence[int] = SIZES,
    *,
    norm: bool = False,
    double: bool = False,
    settings: Any = None,
    **keys: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the same steps in all processes together, and in each alone on the whole batches."""
    batches = make_batches(system, sizes)
    settings = {"norm": norm, "double": double, **(settings or {})}
    if double:
        batches = [
            {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
            for one in batches
        ]
    with processes.alone():
        expected = outcome(*train(build(system, **settings), batches, **keys))
    given = outcome(*train(build(system, **settings), batches, **keys))
    return given, expected
