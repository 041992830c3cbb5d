"""Evaluations of made-up features, without a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from scipy.sparse import csr_array
from torch import Tensor

from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.evaluation.features import SplitFeatures


class Lines:
    """The part of a data set that describes samples."""

    def lines(self, index: Iterable[int]) -> list[str]:
        return [f"data/x:y/test.image.tok:{int(i) + 1}" for i in index]

    def describe(self, index: int) -> dict[str, Any]:
        return {"image": [f"{index}.png", "b.png"], "labels": ["Effusion", "Mass"]}


class MadeUp(Ensemble):
    """An ensemble with given splits and text embeddings."""

    def __init__(
        self,
        splits: dict[str, SplitFeatures],
        text: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        super().__init__(
            members=[],
            dataset=lambda split: Lines(),
            loader=list,
            device=torch.device("cpu"),
            precision="fp32",
        )
        self._splits = splits
        self.text = text

    def encode_text(self, dataset: Any, texts: Sequence[str]) -> Tensor | None:
        return None if self.text is None else self.text(texts)


def sparse(labels: Tensor) -> csr_array:
    """Multi-hot labels [N, L] as evaluation stores them."""
    return csr_array(labels.bool().numpy())


def split_features(
    features: dict[str, Tensor],
    labels: Tensor | None = None,
    *,
    names: Sequence[str] = (),
    split: str = "test",
    multi_label: bool = True,
) -> SplitFeatures:
    size = len(next(iter(features.values())))
    return SplitFeatures(
        split=split,
        index=torch.arange(size),
        features=features,
        labels=None if labels is None else sparse(labels),
        label_names=tuple(names),
        multi_label=multi_label,
    )


def evaluation(
    *splits: SplitFeatures,
    text: Callable[[Sequence[str]], Tensor] | None = None,
    out_dir: Path = Path(),
    seed: int = 0,
) -> Evaluation:
    """An evaluation of the first split; the others are available."""
    networks = MadeUp({split.split: split for split in splits}, text)
    return Evaluation(
        name="run",
        split=splits[0].split,
        features=splits[0],
        dataset=Lines(),
        networks=networks,
        seed=seed,
        source="ConVIRT, epoch 1, seed 2",
        out_dir=out_dir,
    )


def undeclared(metric: Any, values: dict[str, Any]) -> list[str]:
    """The numbers that a metric returns but does not declare."""
    numbers = [name for name, value in values.items() if type(value) in (int, float)]
    assert numbers
    declared = type(metric).numbers
    return [n for n in numbers if not any(fnmatchcase(n, pattern) for pattern in declared)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
