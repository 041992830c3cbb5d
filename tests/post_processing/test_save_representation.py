from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.made_up_evaluations import evaluation, random, split_features
from vilmedic.errors import ConfigError
from vilmedic.post_processing import save_representation
from vilmedic.post_processing.save_representation import SaveRepresentation


def test_files_hold_features_labels_and_sample_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_representation, "BLOCK", 6)  # labels of three samples
    features = {"visual": random(4, 3), "linguistic": random(4, 2, seed=1)}
    split = split_features(features, torch.eye(4, 2), names=("Effusion", "Mass"))
    run = evaluation(split, out_dir=tmp_path)
    assert [path.name for path in SaveRepresentation()(run)] == [
        "test_representation.npz",
        "test_representation.csv",
    ]
    saved = np.load(tmp_path / "test_representation.npz", allow_pickle=False)
    assert sorted(saved) == ["index", "label_names", "labels", "linguistic", "visual"]
    assert np.array_equal(saved["visual"], features["visual"].numpy())
    assert saved["label_names"].tolist() == ["Effusion", "Mass"]
    assert np.array_equal(saved["labels"], np.eye(4, 2))
    with open(tmp_path / "test_representation.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[2] == {"line": "3", "image": "2.png,b.png", "labels": "Effusion,Mass"}
    assert len(rows) == 4


def test_keys_select_features_and_are_validated(tmp_path: Path) -> None:
    run = evaluation(
        split_features({"visual": random(4, 3), "code": random(4, 2)}), out_dir=tmp_path
    )
    SaveRepresentation(keys=["code"])(run)
    assert sorted(np.load(tmp_path / "test_representation.npz")) == ["code", "index"]
    with pytest.raises(ConfigError, match="Allowed: code, visual"):
        SaveRepresentation(keys=["linguistic"]).check(run)
