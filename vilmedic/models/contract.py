"""Base classes of models: `Model` and `ContrastiveModel`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vilmedic.config.declared import no_targets
from vilmedic.datasets.aligned import IMAGE_FEATURES, REPORT_HASH, DataSpec
from vilmedic.device import HOST, IMAGES
from vilmedic.distributed.gather import WHOLE, Part
from vilmedic.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from vilmedic.blocks.vision import VisionEncoder
    from vilmedic.losses.learned import LearnedLoss
    from vilmedic.losses.targets import Targets

Batch = dict[str, Tensor]
Features = dict[str, Tensor]
TARGETS = "targets"
"""The feature by which a loss finds positives beside the own pair; no output of the model."""
LOGITS = "logits"
"""The output of a model that classifies: log odds of the classes, or unnormalised log shares."""


@dataclass(frozen=True)
class Tower:
    """An encoder of a model whose output can be kept while it is frozen.

    Args:
        name: what it is called in messages.
        network: what has to be frozen as a whole.
        encode: one vector per sample, [B, F], of a prepared batch, before dropout of the output.
        settings: what the output depends on besides weights, modules and the batch.
        dropout: of the output, applied to what was kept as to what is computed.
    """

    name: str
    network: nn.Module
    encode: Callable[[Batch], Tensor]
    settings: str = ""
    dropout: float = 0.0

    def frozen(self) -> bool:
        """Whether training leaves the output unchanged; read with the model in training mode."""
        weights = list(self.network.parameters())
        trained = any(weight.requires_grad for weight in weights)
        # In training mode there are dropout, and statistics of the batch.
        moving = any(module.training for module in self.network.modules())
        return bool(weights) and not trained and not moving


class Model(nn.Module, ABC):
    """A system that can be trained: a batch goes in, a loss comes out.

    A model moves no tensor between devices, writes no file and sees no data loader.
    """

    cross_sample: ClassVar[bool] = False
    """Whether the loss compares the samples of a batch, so that the batch size changes it."""
    keep: ClassVar[tuple[str, ...]] = ()
    """Outputs, besides vectors of floats, that an evaluation keeps for every sample."""
    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Options of `ImageDataset` that the model needs, with the values it supports.

    Like `cross_sample` and the next three attributes this is a literal: configurations are checked
    against them without importing the class.
    """
    training_image_options: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Further options that training needs; an evaluation can use others."""
    reads_reports: ClassVar[bool] = False
    """Whether the data set has to have reports."""
    reads_labels: ClassVar[bool] = False
    """Whether training needs a data set with labels."""
    prefixes: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes that weight names may have in files of older formats."""
    further_parts: ClassVar[tuple[str, ...]] = ()
    """Parts with weights that the constructor makes by itself, for `trainor.optim_groups`."""
    own_rates: ClassVar[tuple[str, ...]] = ()
    """Arguments that set rates of parts (`learning_rates`) instead of `trainor.optim_groups`."""
    reads_tokens: bool = False
    """Whether the model needs the tokens of reports even if a batch has `report_features`."""
    varying: ClassVar[bool] = False
    """Whether steps use different weights, as with layers that are dropped at random.

    Data-parallel processes then search each step for its unused weights. Weights that no step uses
    need no declaration: they are found in the first step.
    """

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The scalar `loss` of a batch, and other scalars worth logging."""

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks that follow on each other, such as the layers of a transformer.

        `trainor.compile` compiles each block, `trainor.activation_checkpointing` computes each
        twice, and `trainor.parallel=fsdp` gathers each separately. So each block must be called as
        a whole, and no code may read the weights inside it instead.
        """
        from vilmedic.blocks.repeated import repeated_blocks

        return repeated_blocks(self)

    def stated_vae(self) -> dict[str, Any] | None:
        """Return VAE settings that the weights do not determine; None for a model without a VAE.

        A checkpoint and an export hold it, since a configuration may leave it out.
        """
        return None

    def towers(self) -> dict[str, Tower]:
        """Return the encoders whose output a batch may hold instead of their input.

        While one is frozen as a whole, training computes it once for all epochs.
        """
        return {}

    def learning_rates(self, base: float) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of the parameters that are trained, each with its learning rate.

        Args:
            base: `trainor.optim_params.lr`.

        Returns:
            Nothing when all have that one.
        """
        return []

    def schedule(self, step: int) -> dict[str, float]:
        """Set what changes during training, such as a temperature.

        Called before each optimizer step, and when a checkpoint is evaluated. The values depend on
        the step alone, so that a resumed run equals an uninterrupted one.

        Args:
            step: number of the next step, from 1.

        Returns:
            Names and values for the log.
        """
        return {}


class ContrastiveModel(Model):
    """A model whose loss compares samples: `encode` sees each alone, `contrast` all together.

    Args:
        forward_batch_size: largest number of samples encoded at once; None encodes the whole
            batch. The loss sees all of the batch in any case. In training the memory needed is
            that of one chunk, and batch normalisation sees a chunk.
        targets: finds further positives among the pairs of a batch; None leaves it at the own ones.
    """

    cross_sample: ClassVar[bool] = True
    contrast_needs: ClassVar[tuple[str, ...]] = ("visual", "linguistic")
    """The features without which `contrast` is undefined; data that lacks one has no loss."""

    def __init__(
        self, forward_batch_size: int | None = None, targets: Targets | None = None
    ) -> None:
        super().__init__()
        self.forward_batch_size = forward_batch_size
        self.targets = targets
        self.reads_tokens = targets is not None and targets.needs == "input_ids"
        self.observer: Callable[[Features], None] | None = None  # gets the contrasted features

    @abstractmethod
    def encode(self, batch: Batch) -> Features:
        """Embed every sample on its own.

        Args:
            batch: the batch after the data set's `prepare`.

        Returns:
            `visual` and `linguistic`, each [B, D] and not normalised, and what else the loss
            compares, for what the batch holds;
            outside training also `visual_backbone` [B, F], the pooled features of the image
            encoder in front of the projection. Everything trainable that the loss uses is in here.
        """

    def encode_text(self, batch: Batch) -> Features:
        """The part of `encode` for reports alone, such as prompts: `linguistic` [B, D].

        A model that reads no reports gives nothing.
        """
        return {}

    @abstractmethod
    def contrast(self, features: Features) -> dict[str, Tensor]:
        """The scalar `loss` of a batch's features, and its parts: all interaction of samples.

        Called with all features of the batch, those of other processes included. A method with a
        second argument `part` (`vilmedic.distributed.gather.Part`) is called with the features of
        the own samples instead, and gives scalars whose averages over the processes are those of
        the whole batch. On a GPU, training adds what `move` keeps on the host.
        """

    @property
    def reads_hashes(self) -> bool:
        """Whether batches have to hold `report_hash`, which identifies equal reports."""
        return self.targets is not None and self.targets.needs == REPORT_HASH

    def targets_of(self, batch: Batch, like: Tensor) -> Features:
        """The feature `targets` of a batch; nothing where there are none or the batch lacks them.

        Args:
            batch: what is encoded.
            like: its features, whose floating-point type counts.
        """
        found = None if self.targets is None else self.targets(batch, like)
        return {} if found is None else {TARGETS: found}

    def given_targets(self, features: Features) -> Features:
        """The feature `targets` as an argument of the loss; nothing for a model without targets.

        Raises:
            ConfigError: the data set did not give what they are made of.
        """
        if self.targets is None:
            return {}
        if TARGETS not in features:
            raise ConfigError(
                f"model.targets={self.targets.proto} needs {self.targets.needs} in each batch, but "
                "the data set gives none."
            )
        return {TARGETS: features[TARGETS]}

    def lacks(self, features: Features) -> list[str]:
        """Return the features that `contrast` needs and that are missing."""
        needed = self.contrast_needs if self.targets is None else (*self.contrast_needs, TARGETS)
        return [name for name in needed if name not in features]

    def learned(self, features: Features | None = None) -> Features:
        """Return the learned scalars of the loss, such as a temperature, by name.

        Args:
            features: what `encode` gave, of which these are returned; None for the weights of the
                loss as they are now, which `encode` gives among its features: only there has a
                sharded model its weights at hand, and only what is encoded is replayed in chunks.
        """
        loss = self._learned_loss()
        if loss is None:
            return {}
        if features is None:
            return loss.learned()
        return {name: features[name] for name in loss.learns if name in features}

    def _learned_loss(self) -> LearnedLoss | None:
        loss = getattr(self, "loss", None)
        return loss if hasattr(loss, "learned") else None

    def schedule(self, step: int) -> dict[str, float]:
        """Bring what the loss learns back within its bounds, as after each optimizer step."""
        loss = self._learned_loss()
        if loss is not None:
            loss.clamp()
        return {}

    def chance_loss(self, size: int) -> float | None:
        """Return the loss of a batch of `size` samples with uninformative features.

        It is what training curves are compared with: what the loss gives as its own `chance_loss`,
        or the ln(B) of a cross-entropy over the batch. A model whose loss is another sum says so
        here; None when there is no such number.
        """
        own = getattr(getattr(self, "loss", None), "chance_loss", None)
        if own is None:
            return math.log(size)
        # Of a loss of its own only that of a single positive is known.
        return own(size) if self.targets is None else None

    def temperature_of(self, features: Features) -> float | None:
        """The temperature by which cosine similarities are divided, fixed or learned.

        Args:
            features: of a batch; a learned temperature is among them.
        """
        tau = features.get("temperature", getattr(getattr(self, "loss", None), "tau", None))
        return None if tau is None else float(tau)

    def forward(
        self,
        batch: Batch,
        prepare: Callable[[Batch], Batch] | None = None,
        part: Part = WHOLE,
    ) -> dict[str, Tensor]:
        """Encode, chunk by chunk where `forward_batch_size` says so, then contrast.

        Args:
            batch: a batch as the loader gives it, on the device.
            prepare: turns a part of it into the input of `encode`; None if that is already done.
            part: which samples of the batch of all processes these are. A process without samples
                gets one that is not counted.

        Returns:
            What `contrast` gives.
        """
        chunks = [
            lambda chunk=chunk: self.encode(chunk if prepare is None else prepare(chunk))
            for chunk in self.chunks(batch, max(part.sizes, default=None))
        ]
        if len(chunks) == 1:
            features = chunks[0]()
        else:
            from vilmedic.models.constant_memory import encode_in_constant_memory, join

            if torch.is_grad_enabled():
                features = encode_in_constant_memory(self, chunks)
            else:
                features = join([encode() for encode in chunks])
        if not part.alone:
            features = {k: v[: part.own] if v.ndim else v for k, v in features.items()}
        if self.observer is not None:
            self.observer(features)
        own = None if part.alone else part.own
        if "part" in signature(self.contrast).parameters:
            features |= {key: value[:own] for key, value in batch.items() if key.startswith(HOST)}
        return part.call(self.contrast, features)

    def chunks(self, batch: Batch, largest: int | None = None) -> Iterator[Batch]:
        """Split a batch into parts of nearly equal size, none above `forward_batch_size`.

        Equal parts rather than full ones and a rest: a rest of one sample has no batch statistics.

        Args:
            batch: the batch.
            largest: samples of the process that has most. All make the same number of chunks, as
                each may wait for the others while it encodes one: a process with fewer samples than
                chunks repeats some, at the end, where they are not counted.
        """
        size = len(next(iter(batch.values())))
        limit = self.forward_batch_size
        count = math.ceil((largest or size) / limit) if limit else 1
        wanted = min(max(size, count), largest) if limit and largest else size
        if wanted != size:
            batch = {key: _repeated(value, wanted) for key, value in batch.items()}
        if count <= 1:
            yield batch
            return
        each, rest = divmod(wanted, count)
        end = 0
        for number in range(count):
            start, end = end, end + each + (number < rest)
            yield {key: value[start:end] for key, value in batch.items()}


def visual_tower(cnn: VisionEncoder) -> dict[str, Tower]:
    """An image encoder that a model reads by `visual_backbone`, for `Model.towers`."""
    settings = f"{cnn.output_layer} {getattr(cnn.network, 'config', '')}"

    def encode(batch: Batch) -> Tensor:
        return cnn.pooled_images(*several_images(batch))

    return {
        IMAGE_FEATURES: Tower("image encoder", cnn.network, encode, settings, cnn.dropout.p),
    }


def visual_backbone(cnn: VisionEncoder, batch: Batch) -> Tensor | None:
    """One vector per sample, [B, F], computed or as the batch has it; None without images."""
    if IMAGE_FEATURES in batch:
        return cnn.dropout(batch[IMAGE_FEATURES])
    return cnn.pooled_images(*several_images(batch)) if "images" in batch else None


def make_targets(
    targets: Literal["identity", "same_text", "soft"] | Targets, loss: nn.Module, spec: DataSpec
) -> Targets | None:
    """The targets of a model that compares images with reports.

    Args:
        targets: a word, which leaves all settings at their defaults, or the targets.
        loss: what is to take them.
        spec: the data properties.

    Returns:
        None for identity.

    Raises:
        ArgumentError: the loss takes no targets.
    """
    proto = targets if isinstance(targets, str) else targets.proto
    if proto == "identity":
        return None
    if TARGETS not in signature(loss.forward).parameters:
        raise ArgumentError({"targets": no_targets(type(loss).__name__, proto)})
    if isinstance(targets, str):
        from vilmedic.losses.targets import Targets

        return Targets(spec=spec, proto=targets)
    return targets


def several_images(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, list[int] | None]:
    """Of a batch with one image per sample or several: images, mask, and how many each has."""
    return batch["images"], batch.get("images_mask"), batch.get(IMAGES)


def _repeated(values: Any, count: int) -> Any:
    """Repeat samples, a tensor or a list, from the first one on up to a number."""
    if isinstance(values, Tensor):
        return values[torch.arange(count, device=values.device) % len(values)]
    return [values[number % len(values)] for number in range(count)]
