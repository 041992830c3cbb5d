"""Zero-shot classification: findings recognised by sentences that say they are there."""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import Resamples, UsedWith
from vilmedic.datasets.label import label_counts
from vilmedic.errors import DataError
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.metrics.classification import report_classes, undefined
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.prompts import ClassPrompts, load_prompts, prompt_weights

logger = logging.getLogger(__name__)


class ZeroShot(Metric):
    """Scores each class by similarity to positive prompts, less that to negative ones.

    The score of an image is its mean cosine similarity with the positive prompts of a class minus
    the mean with the negative ones: the dot product with the difference of the mean normalised
    text embeddings (Radford et al. 2021 average prompts in this way; the pair of a positive and a
    negative follows Tiu et al. 2022). Only the ranking counts, so no threshold is needed. Classes
    that the file leaves out are not evaluated.

    Models that compare words with regions (GLoRIA) can be asked for that similarity instead of the
    cosine, or for the mean of the two; prompts are averaged in the same way.

    Args:
        prompts: YAML file of `{class: {positive: [text, ...], negative: [text, ...]}}`, in the
            style of the reports the model was trained on.
        similarity: what an image and a prompt are compared by: global (whole image, whole
            prompt), local (regions, words) or both, the mean of the two.
        local_aggregation: how the words of a prompt count together in the local similarity: max,
            the best word without the opening special token, as published evaluations have it, or
            sum, over all words and that token, as in training.
        on_missing: whether a class of the file without a positive or without a negative sample in
            the split, of which no ranking can be judged, is an error or is reported as null.
        bootstrap: resamples behind each 95% interval; 0 leaves intervals out.
    """

    numbers: ClassVar = {"auroc": "higher", "average_precision": "higher"}

    def __init__(
        self,
        *,
        prompts: str,
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Annotated[
            Literal["sum", "max"], UsedWith("similarity", ("local", "both"))
        ] = "max",
        on_missing: Literal["raise", "skip"] = "raise",
        bootstrap: Resamples = 1000,
    ) -> None:
        self.prompts = prompts
        self.similarity = similarity
        self.local_aggregation = local_aggregation
        self.on_missing = on_missing
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Read the prompt file against the labels of the data, and look for the similarity."""
        if self.similarity != "global":
            evaluation.check_local(f"zero_shot.similarity: given {self.similarity}")
        names = evaluation.features.label_names
        if evaluation.features.labels is not None:
            classes = load_prompts(self.prompts, names)
            counts = label_counts(evaluation.dataset)
            if counts is not None:
                self._check_counts(classes, counts, len(evaluation.dataset), evaluation.split)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`auroc` and `average_precision`, means over classes with intervals; `classes`."""
        features = evaluation.features
        if features.labels is None:
            logger.warning(
                "zero_shot: no labels on the split '%s', so it is null. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
            return undefined()
        classes = load_prompts(self.prompts, features.label_names)
        scores = self._scores(evaluation, classes)
        if scores is None:
            return undefined()
        columns = [features.label_names.index(c.name) for c in classes]
        counts = features.labels.sum(dim=0).long().tolist()
        present = dict(zip(features.label_names, counts, strict=True))
        self._check_counts(classes, present, len(features), evaluation.split)
        return report_classes(
            scores[evaluation.repeats("image")].numpy(),
            features.labels[:, columns].numpy().astype(np.bool_),
            [c.name for c in classes],
            bootstrap=self.bootstrap,
            seed=evaluation.seed,
            context=f"zero_shot, {evaluation.name}, split {evaluation.split}",
        )

    def _check_counts(
        self, classes: list[ClassPrompts], counts: dict[str, int], samples: int, split: str
    ) -> None:
        """Refuse classes that every sample of a split has, or none."""
        missing = [c.name for c in classes if counts[c.name] in (0, samples)]
        if not missing or self.on_missing == "skip":
            return
        found = ", ".join(f"'{name}' ({counts[name]} of {samples} samples)" for name in missing)
        raise DataError(
            f"{self.prompts}: the split '{split}' lacks positive or negative samples of {found}, "
            "so that no ranking can be judged. Leave these classes out of the file, or set "
            "on_missing=skip beside zero_shot's prompts to report them as null."
        )

    def _scores(self, evaluation: Evaluation, classes: list[ClassPrompts]) -> Tensor | None:
        """The score of every image for every class, [N, L]; None without images or text."""
        visual = evaluation.feature("visual")
        directions = None if visual is None else class_directions(evaluation, classes)
        if visual is None or directions is None:
            return None
        whole = functional.normalize(visual.double(), dim=1) @ directions.T
        if self.similarity == "global":
            return whole
        texts = [text for c in classes for side in (c.positive, c.negative) for text in side]
        similarity = evaluation.local_similarity(texts, self.local_aggregation)
        if similarity is None:
            return None
        local = similarity.double() @ prompt_weights(classes)
        return local if self.similarity == "local" else (whole + local) / 2


def class_directions(evaluation: Evaluation, classes: list[ClassPrompts]) -> Tensor | None:
    """Mean normalised positive embedding minus mean normalised negative one: [L, D], float64.

    Returns:
        None when the model knows no text or its embeddings are not finite.
    """
    sides = [side for c in classes for side in (c.positive, c.negative)]
    embedded = evaluation.encode_text([text for side in sides for text in side])
    if embedded is None or not torch.isfinite(embedded).all():
        return None
    unit = functional.normalize(embedded.double(), dim=1)
    means = torch.stack([part.mean(dim=0) for part in unit.split([len(side) for side in sides])])
    return means[0::2] - means[1::2]
