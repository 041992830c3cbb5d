"""Zero-shot classification with positive and negative prompts.

The sentences that stand for a class come from a YAML file, which is read and checked here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import Tensor
from torch.nn import functional

from vilmedic.config.types import Resamples, UsedWith
from vilmedic.config.yaml_source import compose, read_file_text
from vilmedic.datasets.label import label_counts
from vilmedic.datasets.lines import shown
from vilmedic.errors import ArgumentError, ConfigError, DataError, nearest
from vilmedic.evaluation.evaluation import LABEL_OVERRIDES, Evaluation
from vilmedic.metrics.contract import Metric

if TYPE_CHECKING:
    from vilmedic.metrics.classification import Scores

logger = logging.getLogger(__name__)

SIDES = ("positive", "negative")
LISTED = 50  # labels that a message lists


class ZeroShot(Metric):
    """Scores each class by similarity to positive prompts, less that to negative ones.

    The score of an image is its mean cosine similarity with the positive prompts of a class minus
    the mean with the negative ones: the dot product with the difference of the mean normalised
    text embeddings (Radford et al. 2021 average prompts in this way; the pair of a positive and a
    negative follows Tiu et al. 2022). Only the ranking counts, so no threshold is needed. Classes
    that the file leaves out are not evaluated.

    `scoring: normalized_max` is the rule of GLoRIA (Huang et al. 2021) instead: the similarity with
    the best of the positive prompts, less its mean over the images of the split and divided by its
    standard deviation. Negative prompts have no part in it and may be left out of the file.

    Where every sample has exactly one of the classes, the accuracy is the share of samples whose
    own class has the largest score; classes that share it share the decision.

    Models that compare words with regions (GLoRIA) can be asked for that similarity instead of the
    cosine, or for the mean of the two; prompts are averaged in the same way.

    Args:
        prompts: YAML file of `{class: {positive: [text, ...], negative: [text, ...]}}`, in the
            style of the reports the model was trained on.
        scoring: how the prompts of a class become its score: difference, positive less negative
            ones, or normalized_max.
        similarity: what an image and a prompt are compared by: global (whole image, whole
            prompt), local (regions, words) or both, the mean of the two.
        local_aggregation: how the words of a prompt count together in the local similarity: max,
            the best word without the opening special token, as published evaluations have it, or
            sum, over all words and that token, as in training.
        on_missing: whether a class of the file without a positive or without a negative sample in
            the split, for which no ranking can be evaluated, is an error or is reported as null.
        bootstrap: resamples behind each 95% interval; 0 leaves intervals out.
    """

    numbers: ClassVar = {"auroc": "higher", "average_precision": "higher", "accuracy": "higher"}

    def __init__(
        self,
        *,
        prompts: str,
        scoring: Literal["difference", "normalized_max"] = "difference",
        similarity: Literal["global", "local", "both"] = "global",
        local_aggregation: Annotated[
            Literal["sum", "max"], UsedWith("similarity", ("local", "both"))
        ] = "max",
        on_missing: Literal["raise", "skip"] = "raise",
        bootstrap: Resamples = 1000,
    ) -> None:
        self.prompts = prompts
        self.scoring = scoring
        self.similarity = similarity
        self.local_aggregation = local_aggregation
        self.on_missing = on_missing
        self.bootstrap = bootstrap

    def check(self, evaluation: Evaluation) -> None:
        """Read the prompt file against the labels of the data, and look for the similarity."""
        if self.similarity != "global":
            evaluation.check_local("similarity", self.similarity)
        names = evaluation.features.label_names
        if evaluation.features.labels is not None:
            classes = load_prompts(self.prompts, names, negative=self._negative)
            counts = label_counts(evaluation.dataset)
            if counts is not None:
                self._check_counts(classes, counts, len(evaluation.dataset), evaluation.split)

    def __call__(self, evaluation: Evaluation) -> dict[str, Any]:
        """`auroc` and `average_precision`, means over classes with intervals; `classes`.

        And `accuracy` where every sample has exactly one of the classes.
        """
        # imported here: options are checked, and models trained, without it
        from vilmedic.metrics.classification import report_classes, undefined

        features = evaluation.features
        if features.labels is None:
            logger.warning(
                "zero_shot: no labels on the split '%s', so it is null. Add %s",
                evaluation.split,
                LABEL_OVERRIDES,
            )
            return undefined()
        classes = load_prompts(self.prompts, features.label_names, negative=self._negative)
        scores = self._scores(evaluation, classes)
        if scores is None:
            return undefined()
        places = {name: column for column, name in enumerate(features.label_names)}
        columns = [places[c.name] for c in classes]
        targets = features.labels.tocsc()[:, columns].tocsr()
        counts = targets.sum(axis=0).tolist()
        present = {c.name: count for c, count in zip(classes, counts, strict=True)}
        self._check_counts(classes, present, len(features), evaluation.split)
        evaluation.record_scores(scores, [c.name for c in classes])
        unknown = features.unknown
        exclusive = not features.multi_label and bool((targets.sum(axis=1) == 1).all())
        return report_classes(
            scores,
            targets,
            [c.name for c in classes],
            unknown=None if unknown is None else unknown.tocsc()[:, columns].tocsr(),
            multi_label=False if exclusive else None,
            bootstrap=self.bootstrap,
            seed=evaluation.seed,
            context=f"zero_shot, {evaluation.name}, split {evaluation.split}",
        )

    @property
    def _negative(self) -> bool:
        """Whether negative prompts are needed."""
        return self.scoring == "difference"

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
            "so that no ranking can be evaluated. Leave these classes out of the file, or set "
            "on_missing=skip beside zero_shot's prompts to report them as null."
        )

    def _scores(self, evaluation: Evaluation, classes: list[ClassPrompts]) -> Scores | None:
        """The score of every image for the classes; None without images or text."""
        if self.scoring == "normalized_max":
            return self._normalized_max(evaluation, classes)
        visual = evaluation.feature("visual")
        directions = None if visual is None else class_directions(evaluation, classes)
        if visual is None or directions is None:
            return None
        images = evaluation.repeats("image")
        unit = functional.normalize(visual.to(evaluation.device, torch.float64), dim=1)
        local, weights = None, prompt_weights(classes)
        if self.similarity != "global":
            texts = [text for c in classes for side in (c.positive, c.negative) for text in side]
            local = evaluation.local_similarity(texts, self.local_aggregation)
            if local is None:
                return None
            local = local[images].double()

        def scores(block: slice) -> NDArray[np.float64]:
            whole = (unit @ directions[block].T.to(unit)).cpu()[images].numpy()
            if local is None:
                return whole
            words = local.numpy() @ weights[:, block]
            return words if self.similarity == "local" else (whole + words) / 2

        return scores

    def _normalized_max(self, evaluation: Evaluation, classes: list[ClassPrompts]) -> Scores | None:
        """The scores of GLoRIA's rule; None without images or text."""
        visual = evaluation.feature("visual")
        texts = [text for c in classes for text in c.positive]
        embedded = None if visual is None else evaluation.encode_text(texts)
        if visual is None or embedded is None or not torch.isfinite(embedded).all():
            return None
        images = evaluation.repeats("image")
        unit = [
            functional.normalize(x.to(evaluation.device, torch.float64), dim=1)
            for x in (visual, embedded)
        ]
        similarity = (unit[0] @ unit[1].T).cpu()[images]
        if self.similarity != "global":
            local = evaluation.local_similarity(texts, self.local_aggregation)
            if local is None:
                return None
            words = local[images].double()
            similarity = words if self.similarity == "local" else (similarity + words) / 2
        parts = similarity.split([len(c.positive) for c in classes], dim=1)
        best = torch.stack([part.amax(dim=1) for part in parts], dim=1)
        spread, mean = torch.std_mean(best, dim=0, correction=0)
        normalized = ((best - mean) / spread.where(spread > 0, 1.0)).numpy()
        return lambda block: normalized[:, block]


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of one class.

    Args:
        name: the label.
        positive: sentences that say it is there.
        negative: sentences that say it is not.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


def load_prompts(
    path: str, labels: Sequence[str] | None, *, negative: bool = True
) -> list[ClassPrompts]:
    """Read `{class: {positive: [...], negative: [...]}}`.

    Args:
        path: the YAML file.
        labels: the label names of the data; a class must be one of them. None takes any class.
        negative: whether each class needs negative prompts.

    Returns:
        The classes in the order of the file.

    Raises:
        ArgumentError: there is no such file.
        DataError: the file is empty, is not of this form or names an unknown label; all that is
            wrong is said at once, each with its line.
    """
    file = Path(path)
    if not file.is_file():  # a pipe, or a device that gives data for ever, is none
        beside = [str(p) for p in sorted(file.parent.glob("*.y*ml"))]
        raise ArgumentError({"prompts": f"there is no file '{path}'.{nearest(path, beside)}"})
    try:
        root = compose(read_file_text(path), lambda line: f"{path}:{line}")
    except ConfigError as error:
        raise DataError(f"{path}: not a readable YAML file: {error}") from None
    if root is None:
        raise DataError(f"{path}: the file is empty. {_form()}")
    if not isinstance(root, yaml.MappingNode):
        raise DataError(f"{path}:{_line(root)}: not a mapping. {_form()}")
    classes: dict[str, ClassPrompts] = {}
    allowed = None if labels is None else set(labels)
    problems: list[str] = []
    for key, value in root.value:
        name, where = str(key.value), f"{path}:{_line(key)}"
        if name in classes:
            problems.append(f"{where}: the class '{name}' is given twice.")
        if labels is not None and allowed is not None and name not in allowed:
            problems.append(
                f"{where}: the data has no label '{name}'. Allowed: {shown(labels, LISTED)}."
                f"{nearest(name, labels)}"
            )
        sides, found = _sides(value, name, path, negative=negative)
        problems += found
        classes[name] = ClassPrompts(name, sides["positive"], sides["negative"])
    if problems:
        raise DataError("\n".join(problems))
    return list(classes.values())


def as_prompts(prompts: Mapping[str, Any]) -> list[ClassPrompts]:
    """The same out of a mapping; its classes may be any.

    Raises:
        DataError: it is not of this form.
    """
    classes = []
    for name, sides in prompts.items():
        texts = [sides.get(side) for side in SIDES] if isinstance(sides, Mapping) else [None]
        whole = isinstance(sides, Mapping) and set(sides) == set(SIDES)
        for one in texts:
            few = isinstance(one, Sequence) and not isinstance(one, str) and len(one) > 0
            whole = whole and few and all(isinstance(t, str) and t.strip() for t in one or ())
        if not whole:
            raise DataError(f"The prompts of the class '{name}' are not of this form. {_form()}")
        classes.append(ClassPrompts(str(name), *(tuple(one) for one in texts if one)))
    if not classes:
        raise DataError(f"There are no prompts. {_form()}")
    return classes


def prompt_weights(classes: list[ClassPrompts]) -> csc_array:
    """Weight of each prompt in the score of each class: [P, L], float64.

    The mean over the positive prompts of a class minus that over the negative ones; prompts in the
    order of the classes, positive ones first.
    """
    shares: list[float] = []
    starts = [0]
    for c in classes:
        shares += [1 / len(c.positive)] * len(c.positive) + [-1 / len(c.negative)] * len(c.negative)
        starts.append(len(shares))
    return csc_array((shares, range(len(shares)), starts), shape=(len(shares), len(classes)))


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


def _sides(
    node: yaml.Node, name: str, path: str, *, negative: bool
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    sides: dict[str, tuple[str, ...]] = dict.fromkeys(SIDES, ())
    where = f"{path}:{_line(node)}: class '{name}'"
    if not isinstance(node, yaml.MappingNode):
        return sides, [f"{where}: not a mapping. {_form()}"]
    problems = []
    entries = {str(key.value): (key, value) for key, value in node.value}
    for side, (key, value) in entries.items():
        if side not in SIDES:
            problems.append(
                f"{path}:{_line(key)}: class '{name}' has the unknown key '{side}'. "
                f"Allowed: {', '.join(SIDES)}.{nearest(side, SIDES)}"
            )
        elif not isinstance(value, yaml.SequenceNode):
            problems.append(f"{path}:{_line(value)}: {side} of '{name}' is not a list. {_form()}")
        else:
            texts = [item.value for item in value.value if isinstance(item, yaml.ScalarNode)]
            if len(texts) < len(value.value) or not all(text.strip() for text in texts):
                problems.append(
                    f"{path}:{_line(value)}: {side} of '{name}' holds a prompt that is empty or "
                    "not a text."
                )
            sides[side] = tuple(texts)
    for side in SIDES:
        if side not in entries and not negative and side == "negative":
            continue
        if side not in entries:
            problems.append(f"{where} has no {side} prompts. {_form()}")
        elif isinstance(entries[side][1], yaml.SequenceNode) and not entries[side][1].value:
            problems.append(f"{where}: the list of {side} prompts is empty. {_form()}")
    return sides, problems


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _form() -> str:
    return "Expected: {class: {positive: [text, ...], negative: [text, ...]}}."
