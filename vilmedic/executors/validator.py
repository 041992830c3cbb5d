"""Scores of a model while it is being trained."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vilmedic.config.build import build, build_calls
from vilmedic.datasets.loader import make_loader
from vilmedic.executors.evaluation import Ensemble, Evaluation
from vilmedic.executors.parallel import gathered
from vilmedic.registry import DATASETS, METRICS

if TYPE_CHECKING:
    from vilmedic.config.load import Config

PUBLISHED_NAMES = {"validate": "validation"}
"""Score names start with the split; `validate` gives the published name `validation_loss`."""


class Validator:
    """Evaluates a model on the validation splits.

    The data sets are built at once, so that a split that cannot be used is known before training.

    Args:
        config: the checked configuration; its section `validator` says what is computed.
        seed: seed of whatever an evaluation draws.
        device: where the model is.

    Raises:
        DataError: a split cannot be used.
    """

    def __init__(self, config: Config, *, seed: int, device: torch.device) -> None:
        self._config = config
        self._section = config.validator
        self._seed = seed
        self._device = device
        self._metrics = build_calls(METRICS, self._section.metrics, where="validator.metrics")
        self._dataset = cache(self._build_dataset)
        for split in self._section.splits:
            self._dataset(split)

    def score(self, model: nn.Module) -> dict[str, float]:
        """The loss and the metrics of every split.

        Args:
            model: on the device; its mode and the random state are as before afterwards.

        Returns:
            `<split>_loss` and `<split>_<metric>_<number>`, with `validation` for the split
            `validate`; what is undefined on the data is left out.
        """
        networks = Ensemble(
            members=[lambda: model],
            dataset=self._dataset,
            loader=self._loader,
            device=self._device,
            precision=self._config.trainor.precision,
        )
        scores: dict[str, float] = {}
        cuda = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), gathered(model):
            for split in self._section.splits:
                prefix = PUBLISHED_NAMES.get(split, split)
                features = networks.split(split)
                if features.loss is not None:
                    scores[f"{prefix}_loss"] = features.loss
                evaluation = Evaluation(
                    name=self._config.name,
                    split=split,
                    features=features,
                    dataset=self._dataset(split),
                    networks=networks,
                    seed=self._seed,
                    out_dir=self._config.run_dir,
                )
                for name, metric in self._metrics:
                    scores.update(_numbers(f"{prefix}_{name}", metric(evaluation)))
        return scores

    def _build_dataset(self, split: str) -> Any:
        return build(
            DATASETS,
            self._config.dataset,
            where="dataset",
            split=split,
            training=False,
            seed=self._seed,
            run_dir=self._config.run_dir,
        )

    def _loader(self, dataset: Any) -> Any:
        return make_loader(
            dataset,
            batch_size=self._section.batch_size,
            training=False,
            seed=self._seed,
            drop_last=False,
            num_workers=self._config.trainor.num_workers,
        )


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """The headline numbers of a metric; those of single classes are for evaluation."""
    return {
        f"{prefix}_{key}": float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
