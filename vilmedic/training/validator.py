"""Scores of a model while it is being trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vilmedic.config.build import build, build_calls
from vilmedic.config.scores import KEY, PUBLISHED_NAMES, Scores, distinct, is_declaration
from vilmedic.datasets.image_tokens import cache_tokens
from vilmedic.datasets.loader import make_loader
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, DataError, VilmedicError
from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.log import LOGGER
from vilmedic.metrics.representation import Representation
from vilmedic.registry import DATASETS, METRICS, POST_PROCESSING
from vilmedic.training.parallel import gathered

if TYPE_CHECKING:
    from vilmedic.config.load import Config

WATCHED = 1000
"""Samples of a split in which a collapse is looked for: enough to see it, and quickly."""


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
        self._metrics = distinct(
            build_calls(METRICS, self._section.metrics, where="validator.metrics")
        )
        self._post_processing = build_calls(
            POST_PROCESSING, self._section.post_processing, "validator.post_processing"
        )
        # Whether or not its numbers are asked for, a collapse is worth a line in the log.
        named = any(isinstance(metric, Representation) for _, metric in self._metrics)
        self._watch = None if named else Representation(max_samples=WATCHED)
        self._dataset = cache(self._build_dataset)
        for split in self._section.splits:
            self._dataset(split)

    def check(self, model: nn.Module) -> None:
        """Let metrics and pictures refuse their options on the first batch of each split.

        Args:
            model: on the device; its mode and the random state are as before afterwards.

        Raises:
            ConfigError: an option does not fit the model or the data.
            DataError: a file that an option names is not as it must be.
        """
        self._check_sizes(model)
        steps = [step for _, step in (*self._metrics, *self._post_processing)]
        if not steps:
            return
        networks = self._networks(model)
        with self._random_state_kept(), gathered(model), processes.alone():
            for split in self._section.splits:
                loader = self._loader(self._ready(split, model), num_workers=0)
                evaluation = self._evaluation(networks, split, networks.preview(split, loader))
                for step in steps:
                    step.check(evaluation)

    def _check_sizes(self, model: nn.Module) -> None:
        """Refuse a split that can have no loss, so that no checkpoint could be the best."""
        if not getattr(getattr(model, "module", model), "cross_sample", False):
            return
        for split in self._section.splits:
            if len(self._ready(split, model)) < 2:
                raise DataError(
                    f"The split '{split}' of validator.splits has one sample, but this model "
                    "compares samples and has no loss for one alone. Give the split 2 samples or "
                    "more, or leave it out of validator.splits."
                )

    def better(self, score: str, *, ema: bool) -> str:
        """Whether `higher` or `lower` values of a score are better, as its metric declares.

        Args:
            score: the name of a score.
            ema: whether there are scores of an averaged copy as well.

        Raises:
            ConfigError: no evaluation gives it, or its metric does not declare it.
        """
        declared = [(name, _declared(metric)) for name, metric in self._metrics]
        try:
            better = Scores(self._section.splits, declared, ema=ema).better(score)
        except ConfigError as error:
            raise ConfigError(f"{KEY}: {error}") from None
        if better is None:
            silent = ", ".join(name for name, numbers in declared if numbers is None)
            raise ConfigError(
                f"{KEY}: given '{score}', but the metric does not say whether a higher or a lower "
                f"value of it is better: {silent}. Declare it in the class of the metric: numbers "
                '= {"<number>": "lower"} (or "higher").'
            )
        return better

    def score(self, model: nn.Module, pictures: Path | None = None) -> dict[str, float]:
        """The loss and the metrics of every split; a collapsed representation is logged.

        Args:
            model: on the device; its mode and the random state are as before afterwards.
            pictures: folder for what post-processing makes; None makes none.

        Returns:
            `<split>_loss` and `<split>_<metric>_<number>`, with `validation` for the split
            `validate`; what is undefined on the data is left out.
        """
        networks = self._networks(model)
        scores: dict[str, float] = {}
        with self._random_state_kept(), gathered(model):
            for split in self._section.splits:
                self._ready(split, model)
                prefix = PUBLISHED_NAMES.get(split, split)
                features = networks.split(split)
                if features.loss is not None:
                    scores[f"{prefix}_loss"] = features.loss
                evaluation = self._evaluation(networks, split, features)
                for name, metric in self._metrics:
                    scores.update(_numbers(f"{prefix}_{name}", metric(evaluation)))
                if self._watch is not None:
                    self._watch(evaluation)
                if pictures is not None and processes.is_main():
                    with processes.alone():
                        self._draw(evaluation, pictures)
        return scores

    def _networks(self, model: nn.Module) -> Ensemble:
        return Ensemble(
            members=[lambda: model],
            dataset=self._dataset,
            loader=self._loader,
            device=self._device,
            precision=self._config.trainor.precision,
        )

    def _evaluation(self, networks: Ensemble, split: str, features: SplitFeatures) -> Evaluation:
        return Evaluation(
            name=self._config.name,
            split=split,
            features=features,
            dataset=self._dataset(split),
            networks=networks,
            seed=self._seed,
            out_dir=self._config.run_dir,
        )

    def _random_state_kept(self) -> AbstractContextManager[None]:
        cuda = [self._device] if self._device.type == "cuda" else []
        return torch.random.fork_rng(devices=cuda)

    def _draw(self, evaluation: Evaluation, folder: Path) -> None:
        """Make the pictures of a split; one that fails is logged and does not end the training."""
        for name, action in self._post_processing:
            try:
                folder.parent.mkdir(exist_ok=True)  # the run's directory is not made again
                folder.mkdir(exist_ok=True)
                action(replace(evaluation, out_dir=folder))
            except VilmedicError:
                raise
            except OSError as error:  # a full disk say
                LOGGER.warning("%s failed on the split %s: %s", name, evaluation.split, error)
            except Exception:
                LOGGER.exception("%s failed on the split %s", name, evaluation.split)

    def _ready(self, split: str, model: nn.Module) -> Any:
        """The data set of a split, which gives image tokens from now on if it is to."""
        dataset = self._dataset(split)
        cache_tokens(dataset, model, self._device, self._config.trainor.num_workers)
        return dataset

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

    def _loader(self, dataset: Any, num_workers: int | None = None) -> Any:
        return make_loader(
            dataset,
            batch_size=self._section.batch_size,
            training=False,
            seed=self._seed,
            drop_last=False,
            num_workers=self._config.trainor.num_workers if num_workers is None else num_workers,
        )


def _declared(metric: Any) -> dict[str, str] | None:
    """What a metric declares of its numbers; None for one of elsewhere that does not."""
    numbers = getattr(metric, "numbers", None)
    return dict(numbers) if numbers and is_declaration(numbers) else None


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """The headline numbers of a metric; those of single classes are for evaluation."""
    return {
        f"{prefix}_{key}": float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
