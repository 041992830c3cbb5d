from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_models import ToyData, ToyModel
from vilmedic.config.load import Node
from vilmedic.config.namespaces import entries
from vilmedic.config.sections import TrainorSection, ValidatorSection
from vilmedic.config.tree import Mark, Tree
from vilmedic.errors import ConfigError, DataError
from vilmedic.evaluation import evaluation as evaluation_module
from vilmedic.training.validator import Validator


@dataclass
class Config:
    """The parts of a configuration that the Validator reads."""

    run_dir: Path
    validator: ValidatorSection
    name: str = "toy"
    trainor: TrainorSection = field(default_factory=TrainorSection)
    dataset: dict[str, Any] = field(default_factory=dict)

    def calls(self, section: str, key: str) -> list[Any]:
        given = getattr(getattr(self, section), key)
        return [{name: options} for name, options in entries(given)]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "build", lambda *_, split, **__: ToyData(split, 12))
    monkeypatch.setattr(
        evaluation_module, "make_loader", lambda data, *, batch_size, **_: data.batches(batch_size)
    )


def make(tmp_path: Path, **section: Any) -> Validator:
    config = Config(tmp_path, ValidatorSection(batch_size=5, **section))
    return Validator(config, seed=0, device=torch.device("cpu"))  # type: ignore[arg-type]


def test_scores_carry_the_name_of_the_split(tmp_path: Path) -> None:
    model = ToyModel()
    state = torch.random.get_rng_state()
    scores = make(tmp_path, splits=["validate", "test"], metrics={"representation": None}).score(
        model
    )
    assert {"validation_loss", "test_loss", "validation_representation_alignment"} <= scores.keys()
    assert "test_representation_visual_effective_rank" in scores
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_score_has_a_direction(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.yml"
    prompts.write_text("Effusion: {positive: [a], negative: [bb]}")
    metrics: list[Any] = [
        "representation",
        "retrieval",
        {"zero_shot": {"prompts": str(prompts), "bootstrap": 0}},
        {"linear_probe": {"bootstrap": 0}},
        {"knn": {"k": 1, "bootstrap": 0}},
        {"knn": {"k": 5, "bootstrap": 0}},
    ]
    made = make(tmp_path, metrics=metrics)
    scores = made.score(ToyModel())
    better = {name: made.better(name, ema=False) for name in scores}
    assert len(better) > 20
    assert better["validation_loss"] == "lower"
    assert better["validation_retrieval_image_to_text_median_rank"] == "lower"
    assert better["validation_retrieval_image_to_text_r1"] == "higher"
    assert scores["validation_knn_auroc"] != scores["validation_knn_2_auroc"]
    assert better["validation_knn_2_auroc"] == "higher"
    with pytest.raises(ConfigError, match=r"early_stop_metric: .*Did you mean 'validation_loss'"):
        made.better("ema_validation_loss", ema=False)


def test_plugin_metrics_declare_their_direction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Frechet:
        """A plugin metric without declarations."""

        def __call__(self, evaluation: Any) -> dict[str, float]:
            return {"distance": 1.0}

    monkeypatch.setattr(evaluation_module, "build_calls", lambda *_: [("frechet", Frechet())])
    made = make(tmp_path)
    with pytest.raises(ConfigError, match=r"frechet\. Declare it in the class.*numbers"):
        made.better("validation_frechet_distance", ema=False)
    monkeypatch.setattr(Frechet, "numbers", {"distance": "lower"}, raising=False)
    assert made.better("validation_frechet_distance", ema=False) == "lower"


@pytest.mark.parametrize("metrics", [{}, {"representation": None}, {"retrieval": None}])
def test_a_collapse_is_logged_once_with_any_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, metrics: dict[str, Any]
) -> None:
    model = ToyModel()
    model.image.weight.data.zero_()  # only the bias remains, the same for every image
    scores = make(tmp_path, metrics=metrics).score(model)
    lines = [r.message for r in caplog.records if "has collapsed" in r.message]
    assert len(lines) == 1
    assert "toy, split validate: 'visual' has collapsed" in lines[0]
    assert any("representation" in name for name in scores) == ("representation" in metrics)


def test_nothing_is_logged_without_a_collapse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path).score(ToyModel())
    assert not caplog.records


def test_invalid_options_are_refused_before_training(tmp_path: Path) -> None:
    model = ToyModel()
    metrics = {"representation": {"features": ["visul"]}}
    with pytest.raises(ConfigError, match="Did you mean 'visual'"):
        make(tmp_path, metrics=metrics).check(model)
    prompts = tmp_path / "prompts.yml"
    prompts.write_text("Efusion: {positive: [a], negative: [b]}")
    with pytest.raises(DataError, match="Did you mean 'Effusion'"):
        make(tmp_path, metrics={"zero_shot": {"prompts": str(prompts)}}).check(model)
    assert model.seen == [5, 5]
    make(tmp_path).check(model)
    assert model.seen == [5, 5]


def test_an_error_names_the_key_and_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "representation": {"features": ["visul"]},
        "retrieval": {"similarity": "local"},
        "zero_shot": {"prompts": str(tmp_path / "none.yml")},
        "prompted_findings": {
            "root": str(tmp_path),
            "prompts": {name: {"prompt": "p", "finding": "f"} for name in "ab"},
        },
        "reconstruction": {},
    }
    for line, (name, options) in enumerate(given.items(), start=3):
        path = ("validator", "metrics", name)
        marked = (*path, *options) if len(options) == 1 else path  # otherwise the model refuses it
        marks = {marked: Mark(f"toy.yml:{line}")}
        node = Node({"proto": name, **options}, path, Tree({}, marks), {})
        monkeypatch.setattr(Config, "calls", _only_metrics(node))
        with pytest.raises(ConfigError) as refused:
            make(tmp_path).check(ToyModel())
        assert str(refused.value).startswith(f"{'.'.join(marked)} (toy.yml:{line}): "), name


def _only_metrics(node: Node) -> Any:
    return lambda _, section, key: [node] if key == "metrics" else []


def test_a_split_of_one_sample_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "build", lambda *_, split, **__: ToyData(split, 1))
    model = ToyModel()
    with pytest.raises(DataError, match=r"'validate' of validator\.splits has one sample"):
        make(tmp_path, splits=["validate"]).check(model)
