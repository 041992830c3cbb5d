from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.toy_models import ToyData, ToyModel
from vilmedic.checkpoints.checkpoint import best_name, save_checkpoint
from vilmedic.config.namespaces import entries
from vilmedic.config.sections import EnsemblorSection, TrainorSection
from vilmedic.errors import CheckpointError, ConfigError, VilmedicError
from vilmedic.evaluation import ensemblor
from vilmedic.evaluation import evaluation as evaluation_module
from vilmedic.evaluation.ensemblor import Ensemblor
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.evaluation.features import collect
from vilmedic.metrics.retrieval import Retrieval
from vilmedic.registry import DATASETS, Registry

SPLITS = {"train": 40, "validate": 12, "test": 21}


@dataclass
class Config:
    """The parts of a configuration that the Ensemblor reads."""

    run_dir: Path
    ensemblor: EnsemblorSection
    name: str = "toy"
    ckpt: str | None = None
    trainor: TrainorSection = field(default_factory=TrainorSection)
    dataset: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def calls(self, section: str, key: str) -> list[Any]:
        given = getattr(getattr(self, section), key)
        return [{name: options} for name, options in entries(given)]


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Replace the configured data and model by toy ones."""

    def build(registry: Registry, node: dict[str, Any], **runtime: Any) -> Any:
        if registry is DATASETS:
            assert not runtime["training"]
            return ToyData(runtime["split"], SPLITS[runtime["split"]], **node)
        return ToyModel()

    def loader(data: ToyData, *, batch_size: int, **options: Any) -> Any:
        assert not options["drop_last"]
        return data.batches(batch_size)

    monkeypatch.setattr(ensemblor, "build", build)
    monkeypatch.setattr(evaluation_module, "build", build)
    monkeypatch.setattr(evaluation_module, "make_loader", loader)
    caplog.set_level(logging.INFO, "vilmedic")


@pytest.fixture
def models(tmp_path: Path) -> dict[float, ToyModel]:
    """Three trained checkpoints by score; as strings, 10 sorts before 9."""
    trained = {}
    for epoch, score in enumerate((10.0, 9.0, 9.5)):
        torch.manual_seed(epoch)
        trained[score] = ToyModel()
        state = {"model": trained[score].state_dict(), "epoch": epoch, "seed": 7}
        state |= {"metric": "validation_loss", "score": score}
        save_checkpoint(state, tmp_path / best_name(score, epoch, 7))
    return trained


def config(run_dir: Path, **section: Any) -> Config:
    return Config(run_dir, EnsemblorSection(**{"device": "cpu", "batch_size": 5, **section}))


def features(model: ToyModel, split: str) -> Any:
    data = ToyData(split, SPLITS[split])
    cpu = torch.device("cpu")
    return collect(model, data, data.batches(5), split=split, device=cpu, precision="fp32")


def test_evaluates_the_best_checkpoint_by_number(
    tmp_path: Path, models: dict[float, ToyModel]
) -> None:
    results = Ensemblor(config(tmp_path)).start()
    assert list(results) == ["validate", "test"]
    written = json.loads((tmp_path / "results_test.json").read_text())
    assert written == results["test"]
    assert written["loss"] == pytest.approx(features(models[9.0], "test").loss)
    assert written["checkpoints"] == [
        {"file": "9.0_1_7.pth", "epoch": 1, "metric": "validation_loss", "score": 9.0, "seed": 7}
    ]
    assert written["models_used"] == 1
    assert written["samples"] == 21
    assert written["protocols"] == {"retrieval": Retrieval().options()}
    assert written["metrics"]["retrieval"]["image_to_text_r10"] > 0


def test_an_ensemble_uses_all_models(
    tmp_path: Path, models: dict[float, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    made = Ensemblor(config(tmp_path, mode="all", splits=["test"]))
    result = made.start()["test"]
    made.print_tables()
    losses = [features(model, "test").loss for model in models.values()]
    assert result["loss"] == pytest.approx(sum(losses) / 3)
    assert result["models_used"] == 3
    used = "epoch 2, seed 7; epoch 3, seed 7; epoch 1, seed 7"
    assert f"split test: 21 samples, model, ensemble of 3 ({used})" in caplog.text
    for model in models.values():
        alone = Ensemblor(config(tmp_path, splits=["test"]))
        assert alone.paths[0].name == "9.0_1_7.pth"
        assert features(model, "test").loss != pytest.approx(result["loss"])


def test_ckpt_names_one_checkpoint(tmp_path: Path, models: dict[float, ToyModel]) -> None:
    settings = config(tmp_path, ckpt="10.0_0_7.pth", splits=["test"])
    result = Ensemblor(settings).start()["test"]
    assert result["loss"] == pytest.approx(features(models[10.0], "test").loss)
    settings = config(tmp_path, splits=["test"])
    settings.ckpt = "9.5_2_7.pt"
    with pytest.raises(CheckpointError, match=r"Did you mean '9.5_2_7.pth'"):
        Ensemblor(settings)


def test_baselines_are_reported_beside_the_model(
    tmp_path: Path, models: dict[float, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    section = {
        "splits": ["test"],
        "baselines": ["untrained", "raw_pixels"],
        "metrics": {"retrieval": None, "linear_probe": {"bootstrap": 20}},
        "seed": 3,
    }
    made = Ensemblor(config(tmp_path, **section))
    result = made.start()["test"]
    made.print_tables()
    untrained, pixels = result["baselines"]["untrained"], result["baselines"]["raw_pixels"]
    torch.manual_seed(3)
    assert untrained["loss"] == pytest.approx(features(ToyModel(), "test").loss)
    assert pixels["loss"] is None
    assert set(pixels["metrics"]["retrieval"].values()) == {None}
    assert pixels["metrics"]["linear_probe"]["auroc"] > 0.5
    header = next(
        line for line in caplog.text.splitlines() if "raw_pixels" in line and "model" in line
    )
    assert header.split() == ["test", "model", "untrained", "raw_pixels"]
    row = next(line for line in caplog.text.splitlines() if line.startswith("linear_probe auroc"))
    assert f"{result['metrics']['linear_probe']['auroc']:.3f}" in row
    assert f"{pixels['metrics']['linear_probe']['auroc']:.3f}" in row


def test_metrics_know_which_baseline_they_measure(
    tmp_path: Path, models: dict[float, ToyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measure(self: Retrieval, evaluation: Evaluation) -> dict[str, float]:
        seen.append((evaluation.name, evaluation.baseline))
        return {}

    monkeypatch.setattr(Retrieval, "__call__", measure)
    section = {"splits": ["test"], "baselines": ["raw_pixels"], "metrics": {"retrieval": None}}
    settings = config(tmp_path, **section)
    Ensemblor(settings).start()
    name = settings.name
    assert seen == [(name, False), (f"{name}, baseline raw_pixels", True)]


def test_each_checkpoint_encodes_each_split_once(
    tmp_path: Path, models: dict[float, ToyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    batches = ToyData.batches

    def counted(data: ToyData, batch_size: int) -> Any:
        seen.append(data.split)
        return batches(data, batch_size)

    monkeypatch.setattr(ToyData, "batches", counted)
    section = {
        "mode": "best-2",
        "metrics": ["retrieval", {"linear_probe": {"bootstrap": 5}}, {"knn": {"bootstrap": 5}}],
        "post_processing": {"save_representation": None},
    }
    Ensemblor(config(tmp_path, **section)).start()
    previews = 1
    assert seen.count("test") == 2 + previews
    assert seen.count("validate") == 2 + previews
    assert seen.count("train") == 2
    [folder] = (tmp_path / "evaluations").glob("best-2-*")
    assert (folder / "test_representation.npz").exists()


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "evaluations").iterdir() if path.is_dir())


def test_no_evaluation_overwrites_another(tmp_path: Path, models: dict[float, ToyModel]) -> None:
    """Each checkpoint, mode, protocol, baseline or seed gets its own folder."""
    base: dict[str, Any] = {"splits": ["test"], "metrics": {"knn": {"k": 3, "bootstrap": 5}}}
    changes: list[dict[str, Any]] = [
        {},
        {"ckpt": "10.0_0_7.pth"},
        {"mode": "best-2"},
        {"metrics": {"knn": {"k": 5, "bootstrap": 5}}},
        {"baselines": ["raw_pixels"]},
        {"seed": 1},
        {"batch_size": 7},
    ]
    written = []
    for number, change in enumerate(changes, start=1):
        result = Ensemblor(config(tmp_path, **{**base, **change})).start()["test"]
        written.append(result)
        assert len(folders(tmp_path)) == number
        copy = json.loads((tmp_path / "results_test.json").read_text())
        assert copy == result
    assert sum(name.startswith("best-1-") for name in folders(tmp_path)) == 5
    for result in written:
        path = tmp_path / "evaluations" / result["evaluation"] / "results_test.json"
        assert json.loads(path.read_text()) == result
    index = json.loads((tmp_path / "evaluations/index.json").read_text())
    assert {entry["folder"] for entry in index} == set(folders(tmp_path))
    [measured] = [entry for entry in index if len(entry["numbers"]["test"]) == 2]
    assert "raw_pixels" in measured["numbers"]["test"]

    # the same evaluation, another split or another machine: no new folder
    same = [{}, {"splits": ["validate"]}, {"num_workers": 0}, {"report": False}]
    same.append({"metrics": {"knn": {"k": 3, "bootstrap": 5, "temperature": 0.07}}})
    for change in same:
        Ensemblor(config(tmp_path, **{**base, **change})).start()
    assert len(folders(tmp_path)) == len(changes)
    best = next(name for name in folders(tmp_path) if name == written[0]["evaluation"])
    assert (tmp_path / "evaluations" / best / "results_validate.json").exists()


def test_a_new_best_checkpoint_gets_a_new_evaluation(
    tmp_path: Path, models: dict[float, ToyModel]
) -> None:
    first = Ensemblor(config(tmp_path, splits=["test"])).start()["test"]
    state = {"model": ToyModel().state_dict(), "epoch": 3, "seed": 7, "score": 1.0}
    save_checkpoint(state | {"metric": "validation_loss"}, tmp_path / best_name(1.0, 3, 7))
    second = Ensemblor(config(tmp_path, splits=["test"])).start()["test"]
    assert first["evaluation"] != second["evaluation"]
    kept = tmp_path / "evaluations" / first["evaluation"] / "results_test.json"
    assert json.loads(kept.read_text()) == first


def test_only_the_untrained_baseline_loads_published_weights(
    tmp_path: Path, models: dict[float, ToyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[bool] = []
    build = ensemblor.build

    def watched(registry: Registry, node: dict[str, Any], **runtime: Any) -> Any:
        if "filled" in runtime:
            filled.append(runtime["filled"] is not None)
        return build(registry, node, **runtime)

    monkeypatch.setattr(ensemblor, "build", watched)
    section = {"mode": "all", "splits": ["test"], "baselines": ["untrained", "raw_pixels"]}
    Ensemblor(config(tmp_path, **section)).start()
    assert filled == [True, False]


def test_other_prompts_in_the_same_file_are_another_protocol(
    tmp_path: Path, models: dict[float, ToyModel]
) -> None:
    prompts = tmp_path / "prompts.yml"
    for word in ("a", "bb"):
        prompts.write_text(f"Effusion: {{positive: [{word}], negative: [ccc]}}")
        metrics = {"zero_shot": {"prompts": str(prompts), "bootstrap": 0}}
        Ensemblor(config(tmp_path, splits=["test"], metrics=metrics)).start()
    assert len(folders(tmp_path)) == 2


def test_the_same_metric_twice_keeps_both(tmp_path: Path, models: dict[float, ToyModel]) -> None:
    metrics = [{"knn": {"k": 1, "bootstrap": 5}}, {"knn": {"k": 9, "bootstrap": 5}}]
    result = Ensemblor(config(tmp_path, metrics=metrics, splits=["test"])).start()["test"]
    assert list(result["metrics"]) == ["knn", "knn_2"]
    assert result["protocols"]["knn_2"]["k"] == 9


def test_unknown_names_are_refused_before_the_run(
    tmp_path: Path, models: dict[float, ToyModel]
) -> None:
    plot = {"plot_representation": {"keys": ["visul"]}}
    with pytest.raises(ConfigError, match=r"'visul'.*Did you mean 'visual'"):
        Ensemblor(config(tmp_path, post_processing=plot)).start()
    plot = {"plot_representation": {"keys": ["visual"], "labels_keep": ["Mas"]}}
    with pytest.raises(ConfigError, match=r"'Mas'.*Did you mean 'Mass'"):
        Ensemblor(config(tmp_path, post_processing=plot)).start()
    assert not list(tmp_path.rglob("results_*"))
    assert not (tmp_path / "evaluations").exists()


def test_failing_post_processing_keeps_the_metrics(
    tmp_path: Path, models: dict[float, ToyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vilmedic.post_processing.plot_representation import PlotRepresentation

    def fail(self: Any, evaluation: Any) -> list[Path]:
        raise RuntimeError("no ink")

    monkeypatch.setattr(PlotRepresentation, "__call__", fail)
    section = {
        "splits": ["test"],
        "post_processing": [{"plot_representation": {"keys": ["visual"]}}, "save_representation"],
    }
    with pytest.raises(VilmedicError, match="plot_representation on test: no ink"):
        Ensemblor(config(tmp_path, **section)).start()
    assert json.loads((tmp_path / "results_test.json").read_text())["loss"] is not None
    [folder] = (tmp_path / "evaluations").glob("best-1-*")
    assert (folder / "test_representation.csv").exists()


def test_without_labels_and_reports_numbers_are_null_and_plots_skipped(
    tmp_path: Path, models: dict[float, ToyModel], caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(
        tmp_path,
        splits=["test"],
        metrics={"retrieval": None, "linear_probe": None},
        post_processing={"plot_representation": {"keys": ["visual"], "labels_keep": ["Mass"]}},
    )
    settings.dataset = {"reports": False, "labels": False}
    result = Ensemblor(settings).start()["test"]
    assert result["loss"] is None
    assert result["metrics"]["linear_probe"]["auroc"] is None
    assert not list(tmp_path.rglob("*.png"))
    lines = [r.message for r in caplog.records if "no plot is drawn" in r.message]
    assert len(lines) == 1
    for override in ("dataset.proto=ImSeqLabel", "dataset.label.root=", "dataset.label.file="):
        assert override in lines[0]


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Ensemblor(config(tmp_path))


def test_scheduled_values_are_restored_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(ToyModel, "schedule", lambda self, step: steps.append(step))
    state = {"model": ToyModel().state_dict(), "progress": {"step": 7}}
    save_checkpoint(state, tmp_path / "last_1.pth")
    Ensemblor(config(tmp_path, ckpt="last_1.pth", splits=["test"])).start()
    assert steps == [7]


@pytest.mark.parametrize("given", ["auto", "fp32"])
def test_results_name_the_precision(
    tmp_path: Path, models: dict[float, ToyModel], given: str
) -> None:
    results = Ensemblor(config(tmp_path, precision=given)).start()["test"]
    assert (results["precision"], results["tf32"]) == ("fp32", False)


def test_gpu_evaluation_uses_the_reported_precision(
    tmp_path: Path, models: dict[float, ToyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, named = [], []

    def evaluate(self: Ensemblor) -> dict[str, Any]:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return {}

    monkeypatch.setattr(Ensemblor, "_evaluate", evaluate)
    networks: Any = SimpleNamespace(split=lambda _: [])
    for tf32 in (True, False):
        ours = Ensemblor(config(tmp_path, tf32=tf32))
        ours.device = torch.device("cuda", 0)
        ours.start()
        named.append(ours._header("test", networks)["tf32"])
        settings = ours._settings({path: {} for path in ours.paths})
        assert settings.get("tf32", False) is tf32
    assert seen == named == [True, False]
