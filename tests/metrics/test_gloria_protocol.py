"""The CheXpert 5x200 protocol against independent formulas in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from tests.made_up_evaluations import evaluation, split_features
from vilmedic.errors import DataError
from vilmedic.metrics.retrieval import Retrieval
from vilmedic.metrics.zero_shot import ZeroShot

NAMES = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PROMPTS = {name: [f"{name} {n}" for n in range(5)] for name in NAMES}
EACH = 40


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.yml"
    path.write_text(yaml.safe_dump({name: {"positive": texts} for name, texts in PROMPTS.items()}))
    return str(path)


def embedding(text: str) -> NDArray[np.float32]:
    """The embedding of a prompt: the direction of its class plus its own noise."""
    name, _, number = text.rpartition(" ")
    own = np.random.default_rng(10 * NAMES.index(name) + int(number)).normal(size=16)
    return (3 * np.eye(16)[NAMES.index(name)] + own).astype(np.float32)


def made() -> tuple[Any, NDArray[Any], NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng(0)
    classes = np.repeat(np.arange(5), EACH)
    images = (2 * np.eye(16)[classes] + random.normal(size=(5 * EACH, 16))).astype(np.float32)
    reports = (2 * np.eye(16)[classes] + random.normal(size=(5 * EACH, 16))).astype(np.float32)
    features = {"visual": torch.from_numpy(images), "linguistic": torch.from_numpy(reports)}
    split = split_features(
        features, torch.eye(5)[torch.from_numpy(classes)], names=NAMES, multi_label=False
    )

    def text(texts: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([embedding(one) for one in texts]))

    return evaluation(split, text=text), images, reports, classes


def cosine(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1))
    return one @ other.T / lengths


def test_zero_shot_accuracy_matches_the_formula(prompts: str) -> None:
    given, images, _, classes = made()
    found = ZeroShot(prompts=prompts, scoring="normalized_max", bootstrap=50)(given)

    columns = []
    for name in NAMES:
        texts = np.stack([embedding(text) for text in PROMPTS[name]])
        columns.append(cosine(images, texts).max(axis=1))
    scores = np.stack(columns, axis=1)
    scores = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    expected = (scores.argmax(axis=1) == classes).mean()
    assert 0.5 < expected < 1
    assert found["accuracy"] == pytest.approx(expected, abs=1e-6)
    low, high = found["accuracy_interval"]
    assert low < expected < high
    given.recorded = {}
    ZeroShot(prompts=prompts, scoring="normalized_max", bootstrap=0)(given)
    np.testing.assert_allclose(given.recorded["scores"], scores, atol=1e-6)


def test_precision_at_k_matches_the_formula() -> None:
    given, images, reports, classes = made()
    found = Retrieval(precision_at=[5, 10, 100])(given)
    for direction, queries, targets in (
        ("image_to_text", images, reports),
        ("text_to_image", reports, images),
    ):
        similarity = cosine(queries, targets)
        for k in (5, 10, 100):
            precisions = []
            for query in range(len(queries)):
                best = np.argsort(similarity[query])[::-1][:k]
                precisions.append((classes[best] == classes[query]).sum() / k)
            assert found[f"{direction}_p{k}"] == pytest.approx(np.mean(precisions), abs=1e-6)


def test_negative_prompts_are_needed_for_the_difference(prompts: str) -> None:
    given, *_ = made()
    with pytest.raises(DataError, match="class 'Atelectasis' has no negative prompts"):
        ZeroShot(prompts=prompts).check(given)


def test_no_accuracy_if_samples_have_none_of_the_classes(prompts: str) -> None:
    given, *_ = made()
    some = {name: {"positive": PROMPTS[name]} for name in NAMES[:3]}
    Path(prompts).write_text(yaml.safe_dump(some))
    found = ZeroShot(prompts=prompts, scoring="normalized_max", bootstrap=0)(given)
    assert "accuracy" not in found
    assert found["auroc"] > 0.8
