"""Local features: the word and region vectors of a split, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vilmedic.datasets.aligned import SampleKey
from vilmedic.device import inference, move, weights_converted_once
from vilmedic.distributed import processes
from vilmedic.distributed.gather import gather_rows
from vilmedic.evaluation.features import evaluating

Aggregation = Literal["sum", "max"]

OF_REPORTS = ("input_ids", "attention_mask", "word_ids")
"""Report keys of a batch, which are removed before encoding images."""
BATCH = 64
MEMORY = 2**30
"""Most bytes of cached regions: 950 images of 19 x 19 regions and 768 channels."""


class Networks(Protocol):
    """Interface of the networks; `Ensemble` implements it."""

    members: Sequence[Callable[[], Any]]
    dataset: Callable[[str], Any]
    loader: Callable[[Any], Iterable[dict[str, Any]]]
    device: torch.device
    precision: str


class _Texts(NamedTuple):
    """Word features of some texts by one network, on the CPU."""

    places: Tensor  # [P]
    words: Tensor  # [P, L, D]
    mask: Tensor  # [P, L]


class _Regions(NamedTuple):
    """Region features of a batch by one network."""

    rows: Tensor  # [B], numbers of the samples
    regions: Tensor  # [B, D, h, w], or [B, D, N, h, w] of N images per sample
    shown: Tensor | None  # [B, N], which of these there are; None for one image per sample


class LocalFeatures:
    """Word and region similarities over a whole split, in bounded memory.

    Regions are computed one batch at a time. They are cached while those of all splits and networks
    together stay below 1 GiB, and computed again in every pass beyond that. Several networks are
    averaged.

    Args:
        networks: the networks.
    """

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._kept: dict[tuple[str, int], list[_Regions]] = {}
        self._bytes = 0

    def forget(self) -> None:
        """Clear the cached regions."""
        self._kept.clear()
        self._bytes = 0

    def similarity(
        self, split: str, texts: Sequence[str], aggregation: Aggregation
    ) -> Tensor | None:
        """The local similarity of every image of a split and every text.

        Args:
            split: name of the split, of N samples.
            texts: P texts; each is encoded once, however often it is there.
            aggregation: how the words of a text are aggregated.

        Returns:
            float32 [N, P] on the CPU; None when the networks or the data know no words or regions.
        """
        networks, dataset = self._networks, self._networks.dataset(split)
        if not hasattr(dataset, "encode_text"):
            return None
        unique = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        total: Tensor | None = None
        for number, member in enumerate(networks.members):
            model = member()
            if not hasattr(model, "local_similarity"):
                return None
            parts: list[Tensor] = [torch.empty(0, len(unique))]
            index: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
            with weights_converted_once(networks.device, networks.precision, model):
                encoded = self._encode_texts(model, dataset, list(unique))
                for rows, regions, shown in self._regions(split, number, model):
                    index.append(rows)
                    several = {} if shown is None else {"region_mask": shown}
                    part = torch.empty(len(regions), len(unique))
                    for block in encoded:
                        words, mask = (
                            block.words.to(networks.device),
                            block.mask.to(networks.device),
                        )
                        with torch.inference_mode():
                            found = model.local_similarity(
                                regions, words, mask, aggregation=aggregation, **several
                            )
                        part[:, block.places] = found.cpu()
                    parts.append(part)
            similarity = _in_order(torch.cat(parts), torch.cat(index)) / len(networks.members)
            total = similarity if total is None else total + similarity
        return None if total is None else total[:, [unique[text] for text in texts]]

    def attention(self, dataset: Any, indices: Sequence[int]) -> list[Tensor] | None:
        """Return the attention of each word of a sample's report over its image.

        Args:
            dataset: images with reports.
            indices: the samples, by their numbers in the data set.

        Returns:
            For each sample weights of the regions [L, h, w] of its first image, one map per word in
            the numbering of the data set's `words`, without the closing special token. None when
            the networks have none.
        """
        networks = self._networks
        total: list[Tensor] = []
        for member in networks.members:
            model = member()
            if not hasattr(model, "attention"):
                return None
            maps: list[Tensor] = []
            with weights_converted_once(networks.device, networks.precision, model):
                for start in range(0, len(indices), BATCH):
                    chosen = indices[start : start + BATCH]
                    batch = dataset.collate([dataset[SampleKey(int(index))] for index in chosen])
                    prepared = dataset.prepare(move(batch, networks.device))
                    features = self._run(model, "encode", prepared)
                    if "regions" not in features or "words" not in features:
                        return None
                    mask = features["word_mask"]
                    with torch.inference_mode():
                        found = model.attention(features["regions"], features["words"], mask)
                    found = found.cpu() / len(networks.members)
                    maps += [one[: int(n)] for one, n in zip(found, mask.sum(dim=1), strict=True)]
            total = [a + b for a, b in zip(total, maps, strict=True)] if total else maps
        return total

    def _regions(self, split: str, number: int, model: nn.Module) -> Iterator[_Regions]:
        """The regions of the batches that this process has."""
        networks = self._networks
        if (split, number) in self._kept:
            for one in self._kept[split, number]:
                yield one._replace(
                    regions=one.regions.to(networks.device),
                    shown=None if one.shown is None else one.shown.to(networks.device),
                )
            return
        dataset = networks.dataset(split)
        kept: list[_Regions] = []
        size = 0
        for batch in networks.loader(dataset):
            # All keys of images, including masks and augmentation numbers.
            images = {name: value for name, value in batch.items() if name not in OF_REPORTS}
            features = self._run(model, "encode", dataset.prepare(move(images, networks.device)))
            regions, shown = features["regions"], features.get("region_mask")
            size += regions.numel() * regions.element_size()
            if self._bytes + size <= MEMORY:
                on_cpu = None if shown is None else shown.cpu()
                kept.append(_Regions(batch["index"], regions.cpu(), on_cpu))
            yield _Regions(batch["index"], regions, shown)
        if self._bytes + size <= MEMORY:
            self._kept[split, number] = kept
            self._bytes += size

    def _run(self, model: nn.Module, method: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The features that a method of the model gives, in float32, on the networks' device."""
        device, precision = self._networks.device, self._networks.precision
        with evaluating(model), inference(device, precision):
            features = getattr(model, method)(batch)
        return {k: v.float() if v.is_floating_point() else v for k, v in features.items()}

    def _encode_texts(self, model: nn.Module, dataset: Any, texts: list[str]) -> list[_Texts]:
        """Group texts of similar length, so that blocks have little padding."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        encoded = []
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = dataset.encode_text([texts[place] for place in places])
            features = self._run(model, "encode_text", move(batch, self._networks.device))
            mask = features["word_mask"].cpu()
            longest = int(mask.sum(dim=1).max())
            words = features["words"][:, :longest].cpu()
            encoded.append(_Texts(torch.tensor(places), words, mask[:, :longest]))
        return encoded


def _in_order(rows: Tensor, index: Tensor) -> Tensor:
    """The rows of all processes in the order of the split."""
    sizes = tuple(count for (count,) in processes.exchange([len(index)]))
    return gather_rows(rows, sizes)[gather_rows(index, sizes).argsort()]
