from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from tests.full_disk import odd_file
from tests.made_up_evaluations import evaluation, random, split_features
from tests.pairs_on_disk import gloria_evaluation
from vilmedic.errors import ConfigError, DataError
from vilmedic.metrics.zero_shot import ZeroShot, load_prompts

NAMES = ("Effusion", "Mass", "Nodule")
PROMPTS = """
Mass:
  positive: [a mass, big mass]
  negative: [no mass]
Effusion:
  positive: [effusion]
  negative: [no effusion, clear]
"""


LABELS = ("Effusion", "Mass", "No Finding")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.yml"
    path.write_text(PROMPTS)
    return str(path)


def embed(texts: Sequence[str]) -> Tensor:
    """A fixed vector for each text, with various norms."""
    return torch.stack([random(8, seed=len(t)) * len(t) for t in texts])


def labelled(size: int = 80) -> tuple[Tensor, Tensor]:
    labels = (random(size, 3, seed=5) > 0.5).float()
    visual = 3 * random(size, 8, seed=6) + labels[:, :1] * random(8, seed=8)
    return visual, labels


def test_scores_are_positive_minus_negative_similarity(prompts: str) -> None:
    visual, labels = labelled()
    split = split_features({"visual": visual}, labels, names=NAMES)
    result = ZeroShot(prompts=prompts, bootstrap=200)(evaluation(split, text=embed))

    def mean_cosine(texts: Sequence[str]) -> Tensor:
        return functional.cosine_similarity(visual[:, None], embed(texts)[None], dim=2).mean(dim=1)

    mass = mean_cosine(["a mass", "big mass"]) - mean_cosine(["no mass"])
    effusion = mean_cosine(["effusion"]) - mean_cosine(["no effusion", "clear"])
    areas = {
        "Mass": roc_auc_score(labels[:, 1], mass),
        "Effusion": roc_auc_score(labels[:, 0], effusion),
    }
    assert list(result["classes"]) == ["Mass", "Effusion"]
    for name, area in areas.items():
        entry = result["classes"][name]
        assert entry["auroc"] == pytest.approx(area)
        assert entry["auroc_interval"][0] < area < entry["auroc_interval"][1]
        assert entry["positives"] + entry["negatives"] == 80
    assert result["auroc"] == pytest.approx(sum(areas.values()) / 2)
    assert result["auroc_interval"][0] < result["auroc"] < result["auroc_interval"][1]
    again = ZeroShot(prompts=prompts, bootstrap=200)(evaluation(split, text=embed))
    assert again == result
    other = ZeroShot(prompts=prompts, bootstrap=200)(evaluation(split, text=embed, seed=1))
    assert other["auroc"] == result["auroc"]
    assert other["auroc_interval"] != result["auroc_interval"]


@pytest.mark.parametrize(("value", "count"), [(0, 0), (1, 80)])
def test_a_class_without_positives_or_negatives_is_refused(
    prompts: str, value: int, count: int
) -> None:
    visual, labels = labelled()
    labels[:, 1] = value
    run = evaluation(split_features({"visual": visual}, labels, names=NAMES), text=embed)
    message = rf"prompts\.yml: the split 'test' lacks.*'Mass' \({count} of 80 samples\).*skip"
    with pytest.raises(DataError, match=message):
        ZeroShot(prompts=prompts)(run)


def test_classes_are_counted_before_the_run(tmp_path: Path) -> None:
    run = gloria_evaluation(tmp_path)
    path = tmp_path / "prompts.yml"
    path.write_text("Effusion: {positive: [effusion], negative: [no effusion]}")
    ZeroShot(prompts=str(path)).check(run)
    run.dataset.kept = run.dataset.kept[[0, 2]]  # both have it
    with pytest.raises(DataError, match=r"'Effusion' \(2 of 2 samples\)"):
        ZeroShot(prompts=str(path)).check(run)
    ZeroShot(prompts=str(path), on_missing="skip").check(run)


@pytest.mark.parametrize("similarity", ["local", "both"])
def test_local_similarity_scores_classes(
    tmp_path: Path, similarity: Literal["local", "both"]
) -> None:
    run = gloria_evaluation(tmp_path)
    path = tmp_path / "prompts.yml"
    path.write_text("Effusion: {positive: [left effusion, small], negative: [no effusion]}")
    metric = ZeroShot(prompts=str(path), similarity=similarity, bootstrap=5)
    metric.check(run)
    local = run.local_similarity(["left effusion", "small", "no effusion"], "max")
    visual = run.feature("visual")
    text = run.encode_text(["left effusion", "small", "no effusion"])
    assert local is not None
    assert visual is not None
    assert text is not None
    scores = local
    if similarity == "both":
        scores = (local + functional.cosine_similarity(visual[:, None], text[None], dim=2)) / 2
    difference = scores[:, :2].mean(dim=1) - scores[:, 2]
    labels = run.features.labels
    assert labels is not None
    column = run.features.label_names.index("Effusion")
    area = roc_auc_score(labels.toarray()[:, column], difference)
    assert metric(run)["auroc"] == pytest.approx(area)
    plain = evaluation(split_features({"visual": random(2, 3)}))
    plain.networks.members = [lambda: torch.nn.Linear(1, 1)]
    with pytest.raises(ConfigError, match=rf"^similarity: given {similarity}, but Linear"):
        metric.check(plain)


def test_a_class_without_positives_is_excluded_and_named(
    prompts: str, caplog: pytest.LogCaptureFixture
) -> None:
    visual, labels = labelled()
    labels[:, 1] = 0
    split = split_features({"visual": visual}, labels, names=NAMES)
    with caplog.at_level(logging.WARNING):
        metric = ZeroShot(prompts=prompts, bootstrap=50, on_missing="skip")
        result = metric(evaluation(split, text=embed))
    assert "Mass" in caplog.text
    assert result["excluded"] == ["Mass"]
    assert result["classes"]["Mass"]["auroc"] is None
    assert result["auroc"] == result["classes"]["Effusion"]["auroc"] is not None


def test_missing_text_or_labels_give_null(prompts: str, caplog: pytest.LogCaptureFixture) -> None:
    visual, labels = labelled()
    split = split_features({"visual": visual}, labels, names=NAMES)
    assert ZeroShot(prompts=prompts)(evaluation(split))["auroc"] is None
    assert not caplog.records
    result = ZeroShot(prompts=prompts)(evaluation(split_features({"visual": visual}), text=embed))
    assert result["auroc"] is None
    assert "dataset.label.file=label.tok" in caplog.text


def test_the_prompt_file_is_checked_before_the_run(tmp_path: Path) -> None:
    split = split_features({"visual": random(2, 8)}, torch.zeros(2, 3), names=NAMES)
    with pytest.raises(Exception, match="no file"):
        ZeroShot(prompts=str(tmp_path / "absent.yml")).check(evaluation(split))
    ZeroShot(prompts="absent").check(evaluation(split_features({"visual": random(2, 8)})))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "prompts.yml"
    path.write_text(text)
    return str(path)


def test_reads_classes_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Mass: {positive: [a, b], negative: [no]}\nEffusion: {positive: [e], negative: [n]}",
    )
    mass, effusion = load_prompts(path, LABELS)
    assert (mass.name, mass.positive, mass.negative) == ("Mass", ("a", "b"), ("no",))
    assert effusion.name == "Effusion"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no file .*Did you mean '.*prompts.yml'"):
        load_prompts(str(tmp_path / "prompt.yml"), LABELS)
    with pytest.raises(ConfigError, match="no file"):
        load_prompts(str(tmp_path), LABELS)


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load_prompts(str(odd_file(tmp_path / "prompts.yml", kind)), LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n- b\n", ":1: not a mapping"),
        ("a: [", "not a readable YAML file"),
        ("\nEfusion: {positive: [a], negative: [b]}", ":2: .*'Efusion'.*Did you mean 'Effusion'"),
        ("Mass: {positive: [a]}", "'Mass' has no negative prompts"),
        ("Mass: {positive: [a], negative: []}", "negative prompts is empty"),
        ("Mass: {positive: a mass, negative: [b]}", "positive of 'Mass' is not a list"),
        ("Mass: {positive: [' '], negative: [b]}", "empty or not a text"),
        ("Mass: {positive: [[a]], negative: [b]}", "empty or not a text"),
        ("Mass: {positive: [a], negativ: [b]}", "'negativ'.*Did you mean 'negative'"),
        ("Mass: [a]", "class 'Mass': not a mapping"),
        ("Mass: {positive: [a], negative: [b]}\nMass: {positive: [a], negative: [b]}", "twice"),
    ],
)
def test_prompt_file_errors_are_specific(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(write(tmp_path, text), LABELS)


def test_all_prompt_file_errors_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path, "Mas: {positive: [a], negative: [b]}\nEffusion: {positive: [a]}")
    with pytest.raises(DataError) as caught:
        load_prompts(path, LABELS)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: &a [x, x]\n"
        + "\n".join(
            f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]" for n in range(20)
        ),
    ],
)
def test_exponentially_growing_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompts.yml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"not a readable YAML file: .* (nests deeper|more than)"):
        load_prompts(str(path), ["a"])
