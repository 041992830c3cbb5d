"""Zero-shot classification: findings recognised by sentences that say they are there."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vilmedic.executors.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.metrics.classification import report_classes, undefined
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.prompts import ClassPrompts, load_prompts

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
            as published evaluations have it, or sum, as in training.
        bootstrap: resamples behind each 95% interval; 0 leaves intervals out.
    """

    def __init__(
        self,
        *,
        prompts: str,
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Literal["sum", "max"] = "max",
        bootstrap: int = 1000,
    ) -> None:
        self.prompts = prompts
        self.similarity = similarity
        self.local_aggregation = local_aggregation
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Read the prompt file against the labels of the data, and look for the similarity."""
        if self.similarity != "global":
            evaluation.check_local(f"zero_shot.similarity: given {self.similarity}")
        if evaluation.features.labels is not None:
            load_prompts(self.prompts, evaluation.features.label_names)

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
        return report_classes(
            scores.numpy(),
            features.labels[:, columns].numpy().astype(np.bool_),
            [c.name for c in classes],
            bootstrap=self.bootstrap,
            seed=evaluation.seed,
            context=f"zero_shot, {evaluation.name}, split {evaluation.split}",
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


def prompt_weights(classes: list[ClassPrompts]) -> Tensor:
    """What each prompt contributes to each class: [P, L], float64.

    The mean over the positive prompts of a class minus that over the negative ones; prompts in the
    order of the classes, positive ones first.
    """
    columns = []
    for c in classes:
        share = [1 / len(c.positive)] * len(c.positive) + [-1 / len(c.negative)] * len(c.negative)
        columns.append(torch.tensor(share, dtype=torch.float64).unsqueeze(1))
    return torch.block_diag(*columns)


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
