"""Feature extraction: one pass of a model over a split, for evaluation and validation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn import functional

from vilmedic.device import inference, move, weights_converted_once, widest_float
from vilmedic.distributed import processes
from vilmedic.distributed.gather import gather_rows, widened
from vilmedic.errors import DataError
from vilmedic.log import progress
from vilmedic.models.contract import LOGITS, TARGETS, ContrastiveModel

logger = logging.getLogger(__name__)

SIDE = 32
"""Pixels along a side of the baseline's image feature."""


@dataclass(kw_only=True)
class SplitFeatures:
    """Features of a model, or of an ensemble, for the N samples of a split.

    Args:
        split: name of the split.
        index: sample numbers, int64 [N]; sample i is line i + 1 of the split's files.
        features: name to float32 [N, D] on the CPU, rows in the order of `index`.
        labels: multi-hot bool [N, L], sparse, as of many classes a sample has few; None when the
            data set has no labels.
        unknown: which labels are unknown, bool [N, L], sparse; None if all are known. Metrics of a
            class exclude samples whose label is unknown.
        label_names: the L class names.
        multi_label: whether a sample may have several labels.
        loss: mean over samples of the batch losses; None if the data lacks its inputs.
    """

    split: str
    index: Tensor
    features: dict[str, Tensor]
    labels: csr_array | None = None
    unknown: csr_array | None = None
    label_names: tuple[str, ...] = ()
    multi_label: bool = False
    loss: float | None = None

    def __len__(self) -> int:
        return len(self.index)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode and restore the mode of every module afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def collect(
    model: nn.Module,
    dataset: Any,
    loader: Iterable[dict[str, Any]],
    *,
    split: str,
    device: torch.device,
    precision: str,
    keep: Sequence[str] = (),
) -> SplitFeatures:
    """Run a model once over a split, without gradients and in evaluation mode.

    Several processes share the batches of the split; each gets the whole result, equal to that of
    one process.

    Contrastive models are called by `encode` and `contrast`, others by `forward`. Every output with
    one vector per sample is kept. Larger ones (feature maps, reconstructions) would fill the memory
    on a large split and are kept only if named.

    Args:
        model: already on `device`; each module's mode is restored afterwards.
        dataset: gives `spec`, `prepare` and the number of samples.
        loader: its batches, each with `index`.
        split: name of the split, for messages and the result.
        device: where the model runs.
        precision: `fp32` or `bf16`.
        keep: outputs of more dimensions to keep as well, [B, ...] of one shape in all batches,
            besides those that the model names itself.

    Returns:
        The features of the split. The loss leaves out a batch of one for models that compare
        samples, and is None if the data lacks its inputs.

    Raises:
        DataError: the split has no samples.
    """
    outputs: dict[str, Tensor] = {}
    labels, unknown = (_Labels(len(dataset.spec.labels)) for _ in range(2))
    filled = 0
    losses: list[Tensor] = []
    weights: list[tuple[int, int]] = []
    rows = len(dataset)
    with evaluating(model), weights_converted_once(device, precision, model):
        for batch in progress(loader, f"Split {split}", "batches"):
            size = len(batch["index"])
            with inference(device, precision):
                produced, loss = _run(model, dataset, move(batch, device), device)
                produced["index"] = batch["index"]
                if "labels" in batch:
                    labels.add(batch["labels"])
                if "labels_known" in batch:
                    unknown.add(~batch["labels_known"])
                if loss is not None:
                    losses.append(loss.to(widest_float(loss.device)))
                    weights.append((int(batch["index"][0]), size))
            if not outputs:
                names = (*keep, *getattr(model, "keep", ()))
                wanted = [k for k, v in produced.items() if _one_row_a_sample(k, v, size, names)]
                # Allocated outside inference mode, so that it is usable anywhere.
                outputs = {k: _buffer(produced[k], rows) for k in wanted}
            for key, buffer in outputs.items():
                buffer[filled : filled + size].copy_(produced[key])
            filled += size
    outputs = {key: buffer[:filled] for key, buffer in outputs.items()}
    values = torch.stack(losses).tolist() if losses else []
    if processes.world_size() > 1:
        for skipped in processes.gather(dataset.skipped):
            dataset.skip(skipped)
        labels.gather(outputs.get("index"))
        unknown.gather(outputs.get("index"))
        outputs = _from_all(outputs)
        values, weights = _losses_of_all(values, weights)
    if not len(outputs.get("index", ())):
        raise DataError(f"The split '{split}' has no samples to evaluate.")
    weight = sum(size for _, size in weights)
    total = sum(value * size for value, (_, size) in zip(values, weights, strict=True))
    return SplitFeatures(
        split=split,
        index=outputs.pop("index"),
        labels=labels.table(),
        unknown=unknown.table(),
        features=outputs,
        label_names=tuple(dataset.spec.labels),
        multi_label=dataset.spec.multi_label,
        loss=total / weight if weight else None,
    )


def ensemble(members: Sequence[SplitFeatures]) -> SplitFeatures:
    """Combine the features of several models into those of an ensemble.

    Every feature is L2-normalised for each of the M models, divided by sqrt(M) and concatenated:
    a dot product of two ensembled features is the mean of the models' cosine similarities. Logits
    of classes are averaged instead. The loss is the mean of the losses. One model alone keeps its
    features as they are.

    Args:
        members: the features of the same split by each model.
    """
    first = members[0]
    if len(members) == 1:
        return first
    losses = [member.loss for member in members]
    known = [loss for loss in losses if loss is not None]
    return SplitFeatures(
        split=first.split,
        index=first.index,
        labels=first.labels,
        unknown=first.unknown,
        label_names=first.label_names,
        multi_label=first.multi_label,
        features={
            key: (average if key == LOGITS else concatenate)([one.features[key] for one in members])
            for key in first.features
        },
        loss=sum(known) / len(known) if len(known) == len(losses) else None,
    )


def average(features: Sequence[Tensor]) -> Tensor:
    """The mean of M features of the same samples."""
    return torch.stack(list(features)).mean(dim=0)


def concatenate(features: Sequence[Tensor]) -> Tensor:
    """M features [N, ...] of the same samples as one [N, M * D] with averaged cosines."""
    if len(features) == 1:
        return features[0]
    scale = len(features) ** -0.5
    return torch.cat([functional.normalize(f.flatten(1), dim=1) * scale for f in features], dim=1)


def _run(
    model: Any, dataset: Any, batch: dict[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    size = len(batch["index"])
    countable = size > 1 or not getattr(model, "cross_sample", False)
    batch = dataset.prepare(batch)
    if not isinstance(model, ContrastiveModel):
        outputs = dict(model(batch))
        loss = outputs.pop("loss", None)
        return outputs, loss if countable else None
    features = dict(model.encode(batch))
    if not countable or model.lacks(features):
        return features, None
    # Outside autocast: the loss of a reduced-precision model is still summed in float32.
    exact = {k: v.float() if v.is_floating_point() else v for k, v in features.items()}
    with torch.autocast(device.type, enabled=False):
        return features, model.contrast(exact)["loss"]


def _from_all(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes, in the order of the split."""
    tables = processes.gather({k: (v.dtype, list(v.shape)) for k, v in own.items()})
    known = next((table for table in tables if table), {})
    result = {}
    for key, (dtype, shape) in known.items():
        shapes = [table[key][1] if table else [0, *shape[1:]] for table in tables]
        rows = own[key] if own else torch.empty(0, *shape[1:], dtype=dtype)
        widths = [max(sides) for sides in zip(*(one[1:] for one in shapes), strict=True)]
        result[key] = gather_rows(widened(rows, widths), tuple(one[0] for one in shapes))
    if not result:
        return {}
    order = result["index"].argsort()
    return {key: value[order] for key, value in result.items()}


def _losses_of_all(
    values: list[float], weights: list[tuple[int, int]]
) -> tuple[list[float], list[tuple[int, int]]]:
    """Return the batch losses of all processes in the order of the split, for an equal sum."""
    everything = [
        pair
        for values, weights in processes.gather((values, weights))
        for pair in zip(values, weights, strict=True)
    ]
    everything.sort(key=lambda pair: pair[1][0])
    return [value for value, _ in everything], [weight for _, weight in everything]


def _one_row_a_sample(key: str, value: Any, size: int, keep: Sequence[str]) -> bool:
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != size:
        return False
    if key == TARGETS:
        return False
    if key == "index" or key in keep:
        return True
    return value.ndim == 2 and value.is_floating_point()  # a mask is as wide as its batch


def _buffer(like: Tensor, rows: int) -> Tensor:
    dtype = torch.float32 if like.is_floating_point() else torch.int64
    return torch.empty((rows, *like.shape[1:]), dtype=dtype)


class _Labels:
    """The labels of the samples seen so far, one row per sample.

    Args:
        classes: L.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts: list[Tensor] = []  # of each sample, how many it has
        self.columns: list[Tensor] = []  # and which these are

    def add(self, labels: Tensor) -> None:
        """Add a batch: multi-hot [B, L], or with one label per sample its number [B]."""
        if labels.ndim == 1:
            counts, columns = torch.ones_like(labels), labels
        else:
            rows, columns = labels.nonzero(as_tuple=True)
            counts = rows.bincount(minlength=len(labels))
        self.counts.append(counts.int())
        self.columns.append(columns.int())

    def gather(self, index: Tensor | None) -> None:
        """Take the labels of all processes, in the order of the split.

        Args:
            index: numbers of the samples that this process saw; None when it saw none.
        """
        own = [torch.empty(0)] * 3
        if index is not None and self.counts:
            own = [index, torch.cat(self.counts), torch.cat(self.columns)]
        everything = [part for part in processes.gather(own) if len(part[0])]
        self.counts = [counts for _, counts, _ in everything]
        self.columns = [columns for _, _, columns in everything]
        if everything:
            order = torch.cat([index for index, _, _ in everything]).argsort()
            columns = torch.cat(self.columns).split(torch.cat(self.counts).tolist())
            self.counts = [torch.cat(self.counts)[order]]
            self.columns = [columns[row] for row in order.tolist()]

    def table(self) -> csr_array | None:
        """All rows, bool [N, L]; None without any."""
        if not self.counts:
            return None
        columns = torch.cat(self.columns).numpy()
        starts = np.append(0, torch.cat(self.counts).numpy().cumsum(dtype=np.int64))
        shape = (len(starts) - 1, self.classes)
        table = csr_array((np.ones(len(columns), np.bool_), columns, starts), shape=shape)
        table.check_format()  # refuses numbers that are no class
        return table


class RawPixels(nn.Module):
    """Baseline: the image itself as a feature, without any learning.

    `visual_backbone` is the grey image, averaged down to 32 x 32 pixels, flattened and
    standardised (mean 0, variance 1) for each image: [B, 1024]. Of several images or views of a
    sample it takes the first. There are no texts, so metrics that need them are null.
    """

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`visual_backbone` of a prepared batch; nothing when it has no images."""
        if "images" not in batch:
            logger.warning("raw_pixels: the data has no images, so this baseline is null.")
            return {}
        images = batch["images"].float()
        while images.ndim > 4:
            images = images[:, 0]
        grey = functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SIDE).flatten(1)
        spread, mean = torch.std_mean(grey, dim=1, keepdim=True)
        return {"visual_backbone": (grey - mean) / spread.clamp(min=1e-6)}
