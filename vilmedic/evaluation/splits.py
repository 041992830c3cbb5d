"""The splits that a model is evaluated on, during training and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vilmedic.config import build, build_calls
from vilmedic.config.declared import distinct
from vilmedic.datasets.loader import make_loader
from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.registry import DATASETS, METRICS, POST_PROCESSING

if TYPE_CHECKING:
    from vilmedic.config.load import Config


class Splits:
    """Data sets, batches and evaluations of some splits, and what is computed on them.

    Data sets are built when they are first asked for, and kept.

    Args:
        config: the checked configuration, whose `dataset` describes the splits.
        where: the section that says what is computed, for messages: `validator` or `ensemblor`.
        metrics: what of it is `metrics`.
        post_processing: what of it is `post_processing`.
        seed: seed of whatever an evaluation draws.
        batch_size: samples a batch.
        num_workers: processes that load; None takes what the machine has.
        precision: `fp32` or `bf16`.
        device: where models run.
        source: which model is evaluated, for titles; empty in training.

    Attributes:
        metrics: name and metric, each name once.
        post_processing: name and step, each name once.
    """

    def __init__(
        self,
        config: Config,
        *,
        where: str,
        metrics: Any,
        post_processing: Any,
        seed: int,
        batch_size: int,
        num_workers: int | None,
        precision: str,
        device: torch.device,
        source: str = "",
    ) -> None:
        self.config, self.seed, self.source = config, seed, source
        self.batch_size, self.num_workers = batch_size, num_workers
        self.precision, self.device = precision, device
        self.metrics = distinct(build_calls(METRICS, metrics, f"{where}.metrics"))
        self.post_processing = distinct(
            build_calls(POST_PROCESSING, post_processing, f"{where}.post_processing")
        )
        self.dataset = cache(self._build_dataset)

    def tokens_ready(self, split: str, model: nn.Module) -> Any:
        """The data set of a split, which gives image tokens from now on if it is to."""
        dataset = self.dataset(split)
        tokens_ready(dataset, model, self.device, self.num_workers)
        return dataset

    def networks(self, members: Sequence[Callable[[], nn.Module]]) -> Ensemble:
        """Models that are measured as one; see `Ensemble`."""
        return Ensemble(
            members=members,
            dataset=self.dataset,
            loader=self._loader,
            device=self.device,
            precision=self.precision,
        )

    def evaluation(
        self,
        networks: Ensemble,
        split: str,
        *,
        out_dir: Path,
        features: SplitFeatures | None = None,
    ) -> Evaluation:
        """What metrics and post-processing are given.

        Args:
            networks: what is evaluated.
            split: name of the split.
            out_dir: where files are written.
            features: those to look at; None takes those of the whole split.
        """
        return Evaluation(
            name=self.config.name,
            split=split,
            features=features or networks.split(split),
            dataset=self.dataset(split),
            networks=networks,
            seed=self.seed,
            source=self.source,
            out_dir=out_dir,
        )

    def check(self, networks: Ensemble, split: str) -> None:
        """Let metrics and post-processing refuse their options on the first batch of a split.

        Everything that is wrong with names is known after a second rather than after the run.

        Raises:
            ConfigError: an option does not fit the model or the data.
            DataError: a file that an option names is not as it must be.
        """
        steps = [step for _, step in (*self.metrics, *self.post_processing)]
        if not steps:
            return
        loader = self._loader(self.dataset(split), num_workers=0)
        features = networks.preview(split, loader)
        evaluation = self.evaluation(networks, split, out_dir=Path(), features=features)
        for step in steps:
            step.check(evaluation)

    def _build_dataset(self, split: str) -> Any:
        return build(
            DATASETS,
            self.config.dataset,
            split=split,
            training=False,
            seed=self.seed,
            run_dir=self.config.run_dir,
        )

    def _loader(self, dataset: Any, num_workers: int | None = None) -> Any:
        return make_loader(
            dataset,
            batch_size=self.batch_size,
            training=False,
            seed=self.seed,
            drop_last=False,
            num_workers=self.num_workers if num_workers is None else num_workers,
        )


def tokens_ready(
    dataset: Any, model: nn.Module, device: torch.device, num_workers: int | None
) -> None:
    """Let a data set give image tokens from now on, if it is to; see `cache_tokens`."""
    if any(getattr(part, "tokens", None) for part in dataset.parts):
        from vilmedic.datasets.token_file import cache_tokens

        cache_tokens(dataset, model, device, num_workers)
