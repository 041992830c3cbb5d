"""Validation during training."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vilmedic.config.declared import KEY, PUBLISHED_NAMES, Scores, is_declaration
from vilmedic.device import inference, random_state_kept
from vilmedic.distributed import processes
from vilmedic.errors import ConfigError, DataError, VilmedicError
from vilmedic.evaluation.evaluation import Evaluation, Splits
from vilmedic.log import LOGGER, Progress
from vilmedic.training.health import warn_of_collapsed_codes
from vilmedic.training.parallel import frozen_cache_gib, gathered

if TYPE_CHECKING:
    from vilmedic.config.load import Config
    from vilmedic.metrics.contract import Metric

WATCHED = 1000
"""Samples used to detect a collapse: enough to see it, and fast."""
FEW = 64
"""Images used to detect a collapsed codebook: each has many codes."""


class Validator:
    """Evaluates a model on the validation splits.

    The data sets are built at the start, so that unusable splits are reported before training.

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
        self._device = device
        self._splits = Splits(
            config,
            where="validator",
            metrics=config.calls("validator", "metrics"),
            post_processing=config.calls("validator", "post_processing"),
            seed=seed,
            batch_size=self._section.batch_size,
            num_workers=config.trainor.num_workers,
            precision=config.trainor.precision,
            device=device,
            frozen_gib=frozen_cache_gib(config.trainor),
        )
        # A collapse is logged even if the metric is not configured.
        self._watches = all(name != "representation" for name, _ in self._splits.metrics)
        for split in self._section.splits:
            self._splits.dataset(split)

    def compute_features(self) -> None:
        """Keep no features of frozen encoders: networks with other weights are scored as well."""
        self._splits.frozen_gib = 0.0

    def check(self, model: nn.Module) -> None:
        """Let metrics and post-processing refuse their options on the first batch of each split.

        Args:
            model: on the device; its mode and the random state are restored afterwards.

        Raises:
            ConfigError: an option does not fit the model or the data.
            DataError: a file that an option names is not as it must be.
        """
        self._check_sizes(model)
        networks = self._splits.networks([lambda: model])
        with random_state_kept(self._device), gathered(model), processes.alone():
            for split in self._section.splits:
                self._splits.tokens_ready(split, model)
                self._splits.check(networks, split)
            codes: Any = getattr(model, "image_tokens", None)
            if self._section.splits and codes is not None:
                with inference(self._device, "fp32"):
                    batches = self._splits.first_batches(self._section.splits[0], FEW)
                    warn_of_collapsed_codes(model, map(codes, batches))

    def _check_sizes(self, model: nn.Module) -> None:
        """Refuse a split that has no loss, since no checkpoint could then be the best."""
        if not getattr(getattr(model, "module", model), "cross_sample", False):
            return
        for split in self._section.splits:
            if len(self._splits.tokens_ready(split, model)) < 2:
                raise DataError(
                    f"The split '{split}' of validator.splits has one sample, but this model "
                    "compares samples and has no loss for one alone. Give the split 2 samples or "
                    "more, or leave it out of validator.splits."
                )

    def better(self, score: str, *, ema: bool) -> str:
        """Return whether `higher` or `lower` values of a score are better, as its metric declares.

        Args:
            score: the name of a score.
            ema: whether there are scores of an averaged copy as well.

        Raises:
            ConfigError: no evaluation gives it, or its metric does not declare it.
        """
        declared = [(name, _declared(metric)) for name, metric in self._splits.metrics]
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

    def score(self, model: nn.Module, figures: Path | None = None) -> dict[str, float]:
        """The loss and the metrics of every split; a collapsed representation is logged.

        Args:
            model: on the device; its mode and the random state are restored afterwards.
            figures: folder for the figures of post-processing; None makes none.

        Returns:
            `<split>_loss` and `<split>_<metric>_<number>`, with `validation` for the split
            `validate`; what is undefined on the data is left out.
        """
        networks = self._splits.networks([lambda: model])
        scores: dict[str, float] = {}
        with random_state_kept(self._device), gathered(model):
            for split in self._section.splits:
                self._splits.tokens_ready(split, model)
                prefix = PUBLISHED_NAMES.get(split, split)
                evaluation = self._splits.evaluation(networks, split, out_dir=self._config.run_dir)
                if evaluation.features.loss is not None:
                    scores[f"{prefix}_loss"] = evaluation.features.loss
                measure = partial(self._measure, evaluation, prefix)
                scores |= networks.once(measure)
                if figures is not None and processes.is_main():
                    with processes.alone():
                        self._draw(evaluation, figures)
        return scores

    def _measure(self, evaluation: Evaluation, prefix: str) -> dict[str, float]:
        """Return the numbers of every metric, and check for a collapsed representation."""
        scores: dict[str, float] = {}
        for name, metric in self._splits.metrics:
            with Progress(f"{name} of {evaluation.split}"):
                scores |= _numbers(f"{prefix}_{name}", metric(evaluation))
        if self._watches:
            _watch()(evaluation)
        return scores

    def _draw(self, evaluation: Evaluation, folder: Path) -> None:
        """Make the figures of a split; one that fails is logged and does not end the training."""
        for name, action in self._splits.post_processing:
            try:
                folder.parent.mkdir(exist_ok=True)  # the run's directory is not made again
                folder.mkdir(exist_ok=True)
                with Progress(f"{name} of {evaluation.split}"):
                    action(replace(evaluation, out_dir=folder))
            except VilmedicError:
                raise
            except OSError as error:  # a full disk say
                LOGGER.warning("%s failed on the split %s: %s", name, evaluation.split, error)
            except Exception:
                LOGGER.exception("%s failed on the split %s", name, evaluation.split)


@cache
def _watch() -> Metric:
    """The metric whose scores indicate a collapse."""
    from vilmedic.metrics.representation import Representation  # nothing before the first score

    return Representation(max_samples=WATCHED)


def _declared(metric: Any) -> dict[str, str] | None:
    """Return the numbers that a metric declares; None for one that declares nothing."""
    numbers = getattr(metric, "numbers", None)
    return dict(numbers) if numbers and is_declaration(numbers) else None


def _numbers(prefix: str, values: dict[str, Any]) -> dict[str, float]:
    """The headline numbers of a metric; those of single classes are for evaluation."""
    return {
        f"{prefix}_{key}": float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
