from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made_up_evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import Evaluation
from vilmedic.post_processing import plot_representation
from vilmedic.post_processing.plot_representation import PlotRepresentation, capped
from vilmedic.post_processing.projection import fitting_method

NAMES = ("A", "B", "C", "D")


def make(tmp_path: Path, size: int = 40) -> Evaluation:
    """Sample i has label A, every fifth has B instead, every seventh has C as well."""
    labels = torch.zeros(size, 4)
    rows = torch.arange(size)
    labels[:, 0] = (rows % 5 != 0).float()
    labels[:, 1] = (rows % 5 == 0).float()
    labels[:, 2] = (rows % 7 == 0).float()
    features = {
        "visual": random(size, 6) + 2 * labels[:, :1],
        "linguistic": random(size, 6, seed=1),
    }
    return evaluation(split_features(features, labels, names=NAMES), out_dir=tmp_path)


def test_writes_both_plots_and_their_data(tmp_path: Path) -> None:
    run = make(tmp_path)
    plot = PlotRepresentation(
        keys=["visual", "linguistic"], labels_keep=["B", "A"], max_samples_per_class=5, method="pca"
    )
    files = plot(run)
    names = {
        f"test_{kind}_{key}.{end}"
        for kind in ("full", "sampled")
        for key in ("visual", "linguistic")
        for end in ("png", "npz", "csv")
    }
    assert {path.name for path in files} == names == {path.name for path in tmp_path.iterdir()}
    full = np.load(tmp_path / "test_full_visual.npz", allow_pickle=False)
    assert full["index"].tolist() == list(range(40))
    assert full["labels"].tolist() == ["B" if i % 5 == 0 else "A" for i in range(40)]
    assert full["embedding"].shape == (40, 2)
    sampled = np.load(tmp_path / "test_sampled_visual.npz", allow_pickle=False)
    assert sorted(sampled["labels"].tolist()) == ["A"] * 5 + ["B"] * 5
    with open(tmp_path / "test_sampled_visual.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["line"]) - 1 for row in rows] == sampled["index"].tolist()
    assert [row["label"] for row in rows] == sampled["labels"].tolist()
    x = [float(row["x"]) for row in rows]
    np.testing.assert_allclose(x, sampled["embedding"][:, 0], rtol=1e-4)
    with Image.open(tmp_path / "test_full_visual.png") as picture:
        assert picture.width > 1000


def test_colours_samples_with_exactly_one_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "vilmedic"):
        PlotRepresentation(keys=["visual"], method="pca")(make(tmp_path))
    full = np.load(tmp_path / "test_full_visual.npz")
    assert full["index"].tolist() == list(range(40))
    # the others are drawn in grey
    assert [i for i in range(40) if full["labels"][i] == ""] == [i for i in range(40) if i % 7 == 0]
    assert "34 of 40 samples have exactly one of 4 labels" in caplog.text


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    contents = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        plot = PlotRepresentation(keys=["visual"], max_samples_per_class=4, method="tsne")
        contents.append([path.read_bytes() for path in plot(make(tmp_path / run))])
    for first, second in zip(*contents, strict=True):
        assert first == second


@pytest.mark.slow
def test_umap_is_seeded_and_takes_few_samples(tmp_path: Path) -> None:
    plot = PlotRepresentation(keys=["visual"], max_samples_per_class=2, method="umap")
    first = [path.read_bytes() for path in plot(make(tmp_path, 30))]
    assert len(first) == 6
    assert [path.read_bytes() for path in plot(make(tmp_path, 30))] == first
    for size in (4, 5, 6, 12, 17):
        assert len(plot(make(tmp_path, size))) >= 3
        assert np.isfinite(np.load(tmp_path / "test_full_visual.npz")["embedding"]).all()


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("size", [4, 5, 12])
def test_few_samples_give_only_the_full_plot(tmp_path: Path, method: str, size: int) -> None:
    plot = PlotRepresentation(keys=["visual"], method=method)  # type: ignore[arg-type]
    assert len(plot(make(tmp_path, size))) == 3  # the sampled plot would be the same
    assert np.isfinite(np.load(tmp_path / "test_full_visual.npz")["embedding"]).all()


def test_features_that_cannot_be_drawn_are_skipped_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plot = PlotRepresentation(keys=["visual"], method="pca")
    assert plot(make(tmp_path, 2)) == []
    assert "fewer than 3" in caplog.text
    collapsed = make(tmp_path)
    collapsed.features.features["visual"] = torch.ones(40, 6)
    assert plot(collapsed) == []
    assert "the same 'visual'" in caplog.text
    bare = evaluation(split_features({"visual": random(9, 3)}), out_dir=tmp_path)
    assert plot(bare) == []
    assert "dataset.proto=ImSeqLabel dataset.label.root=" in caplog.text
    assert not list(tmp_path.iterdir())


def test_pca_is_the_default_method_for_few_samples() -> None:
    assert fitting_method(None, 99) == "pca"
    assert fitting_method(None, 100) == "umap"
    assert fitting_method("tsne", 5) == "tsne"


def test_the_title_names_features_data_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        plot_representation, "draw_scatter", lambda *_, **texts: calls.append(texts)
    )
    PlotRepresentation(keys=["visual"], labels_keep=["C", "A"])(make(tmp_path))
    assert calls[0]["title"] == "Image embeddings of x:y, test split"
    assert calls[0]["caption"].startswith("PCA; 30 of 40 samples have exactly one of 2 labels")
    assert calls[0]["places"] == [2, 0]  # colours depend on the labels of the data


def test_without_a_cap_there_is_no_sampled_plot(tmp_path: Path) -> None:
    plot = PlotRepresentation(keys=["visual"], max_samples_per_class=None, method="pca")
    assert plot(make(tmp_path))[0].name == "test_full_visual.png"
    assert not list(tmp_path.glob("*sampled*"))


def test_unknown_keys_and_labels_are_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'linguistic'"):
        PlotRepresentation(keys=["linguistics"]).check(run)
    with pytest.raises(ConfigError, match=r"no label 'E'\. Allowed: A, B, C, D"):
        PlotRepresentation(keys=["visual"], labels_keep=["A", "E"]).check(run)
    PlotRepresentation(keys=["visual"], labels_keep=["A"]).check(run)


def test_capping_takes_the_same_number_of_each_class() -> None:
    classes = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = capped(classes, 10, seed=0)
    assert np.bincount(classes[chosen]).tolist() == [10, 3, 10]
    assert (np.diff(chosen) > 0).all()
    assert (capped(classes, 10, seed=0) == chosen).all()
    assert (capped(classes, 10, seed=1) != chosen).any()
