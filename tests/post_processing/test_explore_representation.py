from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.made_up_evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.post_processing.explore_representation import ExploreRepresentation, sampled


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def test_the_file_holds_maps_samples_and_neighbours(tmp_path: Path) -> None:
    features = {"visual": random(12, 4), "linguistic": random(12, 4, seed=1), "x": random(12, 2)}
    labels = torch.eye(12, 2)
    run = evaluation(split_features(features, labels, names=("A", "B")), out_dir=tmp_path)

    [path] = ExploreRepresentation(neighbours=3)(run)

    assert path == tmp_path / "test_explorer.json.gz"
    found = content(path)
    assert [(m["key"], m["method"]) for m in found["maps"]] == [
        ("visual", "PCA"),
        ("linguistic", "PCA"),
    ]
    x = np.array(found["maps"][0]["x"])
    assert (x.min(), x.max(), len(x)) == (0.0, 1.0, 12)
    assert found["samples"]["line"] == list(range(1, 13))
    assert found["samples"]["image"][3] == "3.png, b.png"
    assert found["samples"]["labels"] == [[0], [1], *[[]] * 10]
    assert found["samples"]["thumbnail"] == [""] * 12
    relations = {one["name"]: one for one in found["neighbours"]}
    assert list(relations) == [
        "same visual",
        "same linguistic",
        "reports for this image",
        "images for this report",
    ]
    unit = torch.nn.functional.normalize
    cosine = unit(features["visual"]) @ unit(features["linguistic"]).T
    expected = cosine.topk(3)
    assert relations["reports for this image"]["index"] == expected.indices.tolist()
    assert np.allclose(relations["reports for this image"]["cosine"], expected.values, atol=1e-3)


def test_the_same_features_give_the_same_file(tmp_path: Path) -> None:
    run = evaluation(split_features({"visual": random(30, 4)}), out_dir=tmp_path)
    step = ExploreRepresentation(max_samples=10)
    first = step(run)[0].read_bytes()
    assert step(run)[0].read_bytes() == first
    assert len(content(tmp_path / "test_explorer.json.gz")["samples"]["line"]) == 10


def test_other_features_are_explored_without_labels(tmp_path: Path) -> None:
    run = evaluation(split_features({"code": random(5, 3)}), out_dir=tmp_path)
    ExploreRepresentation()(run)
    found = content(tmp_path / "test_explorer.json.gz")
    assert [one["key"] for one in found["maps"]] == ["code"]
    assert "labels" not in found["samples"]


def test_numbers_of_codes_and_single_numbers_are_not_mapped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes = torch.arange(45).view(9, 5)
    run = evaluation(split_features({"error": random(9, 1), "codes": codes}), out_dir=tmp_path)
    assert ExploreRepresentation()(run) == []
    assert caplog.text == ""


def test_nothing_is_written_without_features(tmp_path: Path) -> None:
    for features in (random(2, 3), torch.ones(9, 3), torch.full((9, 3), torch.nan)):
        run = evaluation(split_features({"visual": features}), out_dir=tmp_path)
        assert ExploreRepresentation()(run) == []
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked() -> None:
    run = evaluation(split_features({"visual": random(9, 3)}))
    with pytest.raises(ConfigError, match=r"^keys: .*Allowed: visual"):
        ExploreRepresentation(keys=["visuel"]).check(run)


def test_sampled_indices_are_distinct_and_sorted() -> None:
    assert sampled(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    some = sampled(100, 10, 0)
    assert sorted(set(some.tolist())) == some.tolist()
    assert len(some) == 10
    assert sampled(100, 10, 1).tolist() != some.tolist()


def test_labels_and_reports_hold_no_control_characters(tmp_path: Path) -> None:
    names = ("A\x1b[31m", "B\u202e")
    features = split_features({"visual": random(12, 4)}, torch.eye(12, 2), names=names)
    [path] = ExploreRepresentation()(evaluation(features, out_dir=tmp_path))
    assert content(path)["labels"] == ["A\\x1b[31m", "B\\u202e"]
