"""The `Evaluation` that metrics and post-processing get: features of a split and their source."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vilmedic.config import build, build_calls
from vilmedic.config.declared import distinct
from vilmedic.config.load import located, nodes_of
from vilmedic.datasets.lines import join_names, shown
from vilmedic.datasets.loader import features_ready, make_loader, tokens_ready
from vilmedic.device import inference, move, weights_converted_once
from vilmedic.distributed import processes
from vilmedic.errors import ArgumentError, escaped, nearest
from vilmedic.evaluation.features import (
    SplitFeatures,
    collect,
    concatenate,
    ensemble,
    evaluating,
)
from vilmedic.models.contract import ContrastiveModel
from vilmedic.registry import DATASETS, METRICS, POST_PROCESSING

if TYPE_CHECKING:
    from vilmedic.config.load import Config
    from vilmedic.evaluation.local_features import Aggregation, LocalFeatures

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROMPT_BATCH = 64
MOST_SCORES = 1 << 26
"""Samples times classes of the scores that are written: half a gigabyte before compression."""
LISTED = 50  # labels that a message lists
LABEL_OVERRIDES = (
    "dataset.proto=ImSeqLabel dataset.label.root=<folder of the label file> "
    "dataset.label.file=label.tok"
)


class Ensemble:
    """One or more networks that are evaluated as one.

    Only one network is in memory at a time.

    Args:
        members: functions that return a network on `device`, one for each checkpoint.
        dataset: the data set of a split, by name.
        loader: the batches of a data set, in order and complete.
        device: where the networks run.
        precision: `fp32` or `bf16`.
        ready: called before a pass over a split, with its name and a network.
    """

    def __init__(
        self,
        *,
        members: Sequence[Callable[[], Any]],
        dataset: Callable[[str], Any],
        loader: Callable[[Any], Iterable[dict[str, Any]]],
        device: torch.device,
        precision: str,
        ready: Callable[[str, Any], object] | None = None,
    ) -> None:
        self.members, self.ready = members, ready
        self.dataset = dataset
        self.loader = loader
        self.device = device
        self.precision = precision
        self._splits: dict[str, SplitFeatures] = {}
        self._leads = False  # whether the other processes wait for requests of this one

    def once(self, work: Callable[[], T]) -> T:
        """Compute something once in the main process, and give all processes the result.

        The others wait and take part in passes over data: `split` and `local_similarity`.

        Args:
            work: the computation; returns JSON values.
        """
        if processes.world_size() == 1:
            return work()
        if processes.is_main():
            self._leads = True
            try:
                result = work()
            finally:
                self._leads = False
            processes.on_main(lambda: ["", json.dumps(result)])
            return result
        while True:
            method, *given = processes.on_main(list[Any])
            if not method:
                received: T = json.loads(given[0])
                return received
            getattr(self, method)(*given)

    def _ask(self, method: str, *given: Any) -> None:
        """Make the processes that wait in `once` call the same method."""
        if self._leads:
            processes.on_main(lambda: [method, *given])

    def split(self, name: str) -> SplitFeatures:
        """Return the features of a split, computed at the first request and cached."""
        if name not in self._splits:
            self._ask("split", name)
            dataset = self.dataset(name)
            if self.ready is not None:
                self.ready(name, self.members[0]())
            self._splits[name] = ensemble(
                [
                    collect(
                        member(),
                        dataset,
                        self.loader(dataset),
                        split=name,
                        device=self.device,
                        precision=self.precision,
                    )
                    for member in self.members
                ]
            )
        return self._splits[name]

    def preview(self, name: str, loader: Iterable[dict[str, Any]]) -> SplitFeatures:
        """The features of a split's first batch, from the first network.

        Args:
            name: name of the split.
            loader: its batches; only the first is taken.
        """
        return collect(
            self.members[0](),
            self.dataset(name),
            itertools.islice(loader, 1),
            split=name,
            device=self.device,
            precision=self.precision,
        )

    def forget(self) -> None:
        """Clear the cached features."""
        self._splits.clear()
        self.__dict__.pop("local", None)

    def local_similarity(
        self, split: str, texts: Sequence[str], aggregation: Aggregation
    ) -> Tensor | None:
        """See `LocalFeatures.similarity`."""
        self._ask("local_similarity", split, list(texts), aggregation)
        return self.local.similarity(split, texts, aggregation)

    @cached_property
    def local(self) -> LocalFeatures:
        """Word and region features of the networks."""
        from vilmedic.evaluation.local_features import LocalFeatures  # most models have none

        return LocalFeatures(self)

    def encode_text(self, dataset: Any, texts: Sequence[str]) -> Tensor | None:
        """The embeddings of texts, comparable to the `visual` features: float32 [P, D].

        Returns:
            None if the networks or the data set have no texts.
        """
        if not hasattr(dataset, "encode_text"):
            return None
        members = []
        for member in self.members:
            model = member()
            if not isinstance(model, ContrastiveModel):
                return None
            parts = []
            with (
                evaluating(model),
                weights_converted_once(self.device, self.precision, model),
                inference(self.device, self.precision),
            ):
                for start in range(0, len(texts), PROMPT_BATCH):
                    batch = dataset.encode_text(list(texts[start : start + PROMPT_BATCH]))
                    embedded = model.encode_text(move(batch, self.device)).get("linguistic")
                    if embedded is None:
                        return None
                    parts.append(embedded.float().cpu())
            members.append(torch.cat(parts))
        return concatenate(members)


@dataclass(kw_only=True)
class Evaluation:
    """One split under evaluation.

    Args:
        name: the run's name, for messages and titles.
        split: name of the split.
        features: the features of the network or ensemble.
        dataset: the data set of the split.
        networks: the networks that compute the features.
        seed: seed of the random draws of metrics and post-processing.
        source: the model, for titles: system, epoch and seed; empty in training.
        out_dir: where files are written.
        recorded: gets the predictions of metrics; None discards them.
        baseline: whether the networks are a baseline, about which nobody needs advice.
    """

    name: str
    split: str
    features: SplitFeatures
    dataset: Any
    networks: Ensemble
    seed: int = 0
    source: str = ""
    out_dir: Path = Path()
    recorded: dict[str, NDArray[Any]] | None = None
    baseline: bool = False

    def record(self, **arrays: NDArray[Any]) -> None:
        """Record predictions of a metric, for `predictions_<split>.npz`."""
        if self.recorded is not None:
            self.recorded |= arrays

    def record_scores(
        self, scores: Callable[[slice], NDArray[np.float64]], names: Sequence[str]
    ) -> None:
        """Record the score of every sample for every class.

        Args:
            scores: of a slice of the classes, [N, C].
            names: the classes.
        """
        if self.recorded is None:
            return
        if len(self.features) * len(names) > MOST_SCORES:
            logger.info(
                "%s, split %s: %d x %d scores are too many to be written",
                self.name,
                self.split,
                len(self.features),
                len(names),
            )
            return
        self.record(scores=scores(slice(0, len(names))), classes=np.array(names, np.str_))

    def samples(self) -> dict[str, NDArray[Any]]:
        """Return the sample metadata for `predictions_<split>.npz`."""
        features = self.features
        index = features.index.tolist()
        images = [self.dataset.describe(i).get("image") for i in index]
        paths = ["" if image is None else join_names(list(image)) for image in images]
        found = {
            "lines": np.array(self.line_numbers(index), np.int64),
            "images": np.array(paths, np.str_),
            "label_names": np.array(features.label_names, np.str_),
        }
        if features.labels is not None and features.labels.shape[1] * len(index) <= MOST_SCORES:
            labels = features.labels.toarray().astype(np.int8)
            if features.unknown is not None:
                labels[features.unknown.toarray()] = -1
            found["labels"] = labels
        return found

    @property
    def device(self) -> torch.device:
        """Device for products of all features in float64: a GPU if the networks are on one."""
        device = self.networks.device  # other accelerators have no float64
        return device if device.type == "cuda" else torch.device("cpu")

    @property
    def title(self) -> str:
        """The run and the evaluated model, for captions."""
        return f"{self.name}, {self.source}" if self.source else self.name

    @property
    def data(self) -> str:
        """The name of the data, for titles; see `data_name`."""
        return data_name(self.dataset)

    def other(self, split: str) -> SplitFeatures:
        """The features of another split, from the same networks."""
        return self.features if split == self.split else self.networks.split(split)

    def encode_text(self, texts: Sequence[str]) -> Tensor | None:
        """Embeddings [P, D] of texts; None when the networks know no text."""
        return self.networks.encode_text(self.dataset, texts)

    def feature(self, name: str, split: str | None = None) -> Tensor | None:
        """A feature [N, D] of this or another split.

        Returns:
            None if there is no such feature or it has values that are not finite, for which no
            metric is defined; the latter is logged.
        """
        features = self.features if split is None else self.other(split)
        value = features.features.get(name)
        if value is not None and not torch.isfinite(value).all():
            logger.warning(
                "%s, split %s: the feature '%s' holds values that are not finite; "
                "what is computed from it is null.",
                self.name,
                features.split,
                name,
            )
            return None
        return value

    def repeats(self, what: str) -> Tensor:
        """Return the first sample with the same image, or the same report, as each sample.

        Features of equal inputs differ by rounding, depending on the batch and its padding. Rows
        indexed by these numbers are equal for equal inputs, so that rounding decides no rank.

        Args:
            what: `image` (the same files) or `report` (word for word).

        Returns:
            Places within the split, int64 [N].
        """
        first: dict[Any, int] = {}
        places = []
        for place, index in enumerate(self.features.index.tolist()):
            value = self.dataset.describe(index).get(what, place)
            key = tuple(value) if isinstance(value, list) else value
            places.append(first.setdefault(key, place))
        return torch.tensor(places, dtype=torch.int64)

    def line_numbers(self, index: Iterable[int]) -> list[int]:
        """The line of each sample in the files of the split, counted from 1."""
        return [int(where.rpartition(":")[2]) for where in self.dataset.lines(index)]

    def local_similarity(self, texts: Sequence[str], aggregation: Aggregation) -> Tensor | None:
        """Return the local similarity of texts and the regions of each image: [N, P].

        Returns:
            None if the networks do not compare regions with words.
        """
        return self.networks.local_similarity(self.split, texts, aggregation)

    def attention(self, indices: Sequence[int]) -> list[Tensor] | None:
        """Return word attention maps [L, h, w] of samples' reports; None without regions."""
        return self.networks.local.attention(self.dataset, indices)

    def check_local(self, argument: str = "", given: str = "") -> None:
        """Refuse a model that does not compare regions with words.

        Args:
            argument: the argument of the metric or step that needs it; empty for no single one.
            given: its value.

        Raises:
            ArgumentError: the model only compares whole images and reports.
        """
        model = self.networks.members[0]()
        if not hasattr(model, "local_similarity"):
            raise ArgumentError(
                {
                    argument: f"{f'given {given}, but ' if given else ''}{type(model).__name__} "
                    "compares no words with regions of images, as GLoRIA does."
                }
            )

    def check_feature(self, name: str, argument: str = "", *, compared: bool = True) -> None:
        """Refuse a feature that the networks do not produce, or that cannot be compared.

        Args:
            name: the feature asked for.
            argument: the argument of the metric or step that asks for it; empty for no single one.
            compared: whether samples are compared by it: numbers of codes have no distance.

        Raises:
            ArgumentError: there is none of that name, or it holds numbers of codes.
        """
        found = self.features.features
        available = sorted(
            key for key, value in found.items() if value.is_floating_point() or not compared
        )
        if name in found and name not in available:
            raise ArgumentError(
                {
                    argument: f"the feature '{name}' holds numbers of codes, and the distance of "
                    f"two numbers means nothing. Allowed: {', '.join(available)}."
                }
            )
        if name not in available:
            raise ArgumentError(
                {
                    argument: f"the model gives no feature '{name}' on this data. "
                    f"Allowed: {', '.join(available)}.{nearest(name, available)}"
                }
            )

    def check_label(self, name: str, argument: str) -> None:
        """Refuse a label that the data does not have.

        Raises:
            ArgumentError: there is none of that name.
        """
        labels = self.features.label_names
        if name not in labels:
            raise ArgumentError(
                {
                    argument: f"the data has no label '{name}'. Allowed: "
                    f"{shown(labels, LISTED)}.{nearest(name, labels)}"
                }
            )


def data_name(dataset: Any) -> str:
    """Return the name of a data set: that of the folder with the files of its split."""
    where = dataset.lines([0])[0].rpartition(":")[0]
    return escaped(Path(where).absolute().parent.name)


class Splits:
    """Data sets, batches and evaluations of some splits, with their metrics and post-processing.

    Data sets are built at the first request and kept.

    Args:
        config: the checked configuration, whose `dataset` describes the splits.
        where: the section, for messages: `validator` or `ensemblor`.
        metrics: its `metrics`.
        post_processing: its `post_processing`.
        seed: seed of all random draws of an evaluation.
        batch_size: samples per batch.
        num_workers: processes that load; None takes what the machine has.
        precision: `fp32` or `bf16`.
        device: where models run.
        source: which model is evaluated, for titles; empty in training.
        frozen_gib: see `cache_features`; above 0 only if all networks are the same frozen ones.

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
        frozen_gib: float = 0.0,
    ) -> None:
        self.frozen_gib = frozen_gib
        self.config, self.seed, self.source = config, seed, source
        self.batch_size, self.num_workers = batch_size, num_workers
        self.precision, self.device = precision, device
        asked = nodes_of(metrics, f"{where}.metrics")
        steps = nodes_of(post_processing, f"{where}.post_processing")
        self._nodes = [*asked, *steps]
        self.metrics = distinct(build_calls(METRICS, asked))
        self.post_processing = distinct(build_calls(POST_PROCESSING, steps))
        self.dataset = cache(self._build_dataset)

    def tokens_ready(self, split: str, model: nn.Module) -> Any:
        """Return the data set of a split, with cached features if configured."""
        dataset = self.dataset(split)
        tokens_ready(dataset, model, self.device, self.num_workers)
        features_ready(
            dataset,
            model,
            self.device,
            precision=self.precision,
            gib=self.frozen_gib,
            folder=self.config.run_dir,
            num_workers=self.num_workers,
        )
        return dataset

    def networks(self, members: Sequence[Callable[[], nn.Module]]) -> Ensemble:
        """Models that are evaluated as one; see `Ensemble`."""
        return Ensemble(
            members=members,
            dataset=self.dataset,
            loader=self._loader,
            device=self.device,
            precision=self.precision,
            ready=self.tokens_ready if self.frozen_gib else None,
        )

    def evaluation(
        self,
        networks: Ensemble,
        split: str,
        *,
        out_dir: Path,
        features: SplitFeatures | None = None,
        baseline: str = "",
    ) -> Evaluation:
        """Return the `Evaluation` for metrics and post-processing.

        Args:
            networks: the networks.
            split: name of the split.
            out_dir: where files are written.
            features: the features to use; None takes those of the whole split.
            baseline: the baseline that the networks are; empty for the trained model.
        """
        name = self.config.name
        return Evaluation(
            name=f"{name}, baseline {baseline}" if baseline else name,
            split=split,
            features=features or networks.split(split),
            dataset=self.dataset(split),
            networks=networks,
            seed=self.seed,
            source=self.source,
            out_dir=out_dir,
            baseline=bool(baseline),
        )

    def check(self, networks: Ensemble, split: str) -> None:
        """Check the options of metrics and post-processing on the first batch of a split.

        Wrong names are reported after a second rather than after the run.

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
        for step, node in zip(steps, self._nodes, strict=True):
            try:
                step.check(evaluation)
            except ArgumentError as error:
                raise located(error, node.tree, node.path) from error

    def first_batches(self, split: str, samples: int) -> Iterator[dict[str, Any]]:
        """Yield prepared batches of a split on the device, up to a number of samples.

        Args:
            split: name of the split.
            samples: the number of samples.
        """
        dataset, seen = self.dataset(split), 0
        for batch in self._loader(dataset, num_workers=0):
            yield dataset.prepare(move(batch, self.device))
            seen += len(batch["index"])
            if seen >= samples:
                return

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
