from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.finished_runs import ROOT
from vilmedic import run
from vilmedic.cli import ensemble
from vilmedic.phantom.write import Plan, build


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given") / "data"
    build(root, Plan(train=12, validate=4, test=10, size=32), force=False, workers=1)
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)


def embeddings(data: Path, file: Path, **changes: Any) -> Path:
    """Every report has the embedding of its image, except the first of the test split."""
    random = np.random.default_rng(0)
    paths, texts, visual, linguistic = [], [], [], []
    for split in ("train", "test"):
        images = (data / f"{split}.image.tok").read_text().split()
        reports = (data / f"{split}.impression.tok").read_text().splitlines()
        for image, report in zip(images, reports, strict=True):
            paths.append(image)
            visual.append(random.normal(size=8))
            if report not in texts:
                texts.append(report)
                linguistic.append(visual[-1])
    arrays = {
        "visual": np.array(visual, np.float32),
        "path": np.array(paths, np.str_),
        "linguistic": np.array(linguistic, np.float32),
        "text": np.array(texts, np.str_),
    }
    arrays["visual_backbone"] = 2 * arrays["visual"]
    arrays |= {key: change(arrays[key]) for key, change in changes.items()}
    np.savez(file, **{key: value for key, value in arrays.items() if value is not None})
    return file


def evaluate(data: Path, tmp_path: Path, file: Path, *words: str) -> int:
    roots = [f"dataset.{part}.root={data}" for part in ("image", "seq", "label")]
    fixed = [f"ckpt_dir={tmp_path}", "name=peer", "ensemblor.splits=[test]", *roots]
    fixed += ["ensemblor.post_processing={}", "ensemblor.baselines=[]", "ensemblor.num_workers=0"]
    fixed += ["ensemblor.report=False", "ensemblor.device=cpu"]
    metrics = "ensemblor.metrics={retrieval: null, knn: {k: 3}, linear_probe: {bootstrap: 0}}"
    config = "config/phantom/convirt.yml"
    return ensemble([config, "--embeddings", str(file), *fixed, metrics, *words])


def test_protocols_run_on_embeddings_of_another_program(data: Path, tmp_path: Path) -> None:
    assert evaluate(data, tmp_path, embeddings(data, tmp_path / "peer.npz")) == 0
    results = json.loads((tmp_path / "peer/results_test.json").read_text())
    assert results["system"] == "peer"
    assert results["checkpoints"][0]["file"] == "peer.npz"
    reports = (data / "test.impression.tok").read_text().splitlines()
    own = len({*reports} - {*(data / "train.impression.tok").read_text().splitlines()})
    assert results["metrics"]["retrieval"]["image_to_text_r1"] > own / 10 / 2
    assert results["metrics"]["knn"]["auroc"] is not None
    with np.load(tmp_path / "peer/predictions_test.npz") as found:
        assert found["lines"].tolist() == list(range(1, 11))
        assert found["knn/scores"].shape == found["labels"].shape
        assert found["retrieval/image_to_text_above"].shape == (10,)


def test_the_untrained_baseline_is_skipped(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embeddings(data, tmp_path / "peer.npz")
    assert evaluate(data, tmp_path, file, "ensemblor.baselines=[untrained,raw_pixels]") == 0
    results = json.loads((tmp_path / "peer/results_test.json").read_text())
    assert list(results["baselines"]) == ["raw_pixels"]
    assert "The baseline untrained is left out" in "".join(capsys.readouterr())


def test_duplicate_inputs_need_equal_embeddings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, x[:3]])

    texts = {"text": twice, "linguistic": lambda x: np.concatenate([x, x[:3] * 1.001])}
    file = embeddings(data, tmp_path / "peer.npz", **texts)
    assert evaluate(data, tmp_path, file) == 0
    for key, name in (("path", "visual"), ("text", "linguistic")):
        changes = {key: twice, name: lambda x: np.concatenate([x, x[3:6]])}
        if key == "path":
            changes["visual_backbone"] = twice
        file = embeddings(data, tmp_path / "peer.npz", **changes)
        assert evaluate(data, tmp_path, file) == 2
        told = capsys.readouterr().err
        assert f"{key} has " in told
        assert f"but {name} is not the same there. Give each one embedding." in told


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"path": lambda x: x[:-1]}, "expected are numbers"),
        ({"path": lambda x: np.where(np.arange(len(x)) == 15, "z.png", x)}, "path lacks 1 of the"),
        ({"text": lambda x: np.char.add(x, "!")}, "text lacks 10 of 10 texts"),
        ({"text": lambda x: None}, "holds linguistic or text, but not both"),
        ({"linguistic": lambda x: x[:, :5]}, "visual has 8 columns and linguistic 5"),
    ],
)
def test_invalid_embedding_files_are_refused(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    problem: str,
) -> None:
    file = embeddings(data, tmp_path / "peer.npz", **changes)
    assert evaluate(data, tmp_path, file) == 2
    assert problem in capsys.readouterr().err


def test_protocols_that_need_the_model_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embeddings(data, tmp_path / "peer.npz")
    local = "ensemblor.metrics={retrieval: {similarity: local}}"
    assert evaluate(data, tmp_path, file, local) == 2
    assert "compares no words with regions" in capsys.readouterr().err
    assert evaluate(data, tmp_path, tmp_path / "none.npz") == 2
    assert "--embeddings: there is no file" in capsys.readouterr().err
    (tmp_path / "odd.npz").write_text("no archive")
    assert evaluate(data, tmp_path, tmp_path / "odd.npz") == 2
    assert "cannot be read" in capsys.readouterr().err
