"""A run with adapters on both encoders, from training to loading and fine-tuning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

import vilmedic
from tests.crash.systems import CONVIRT
from tests.end_to_end.conftest import ROOT, Run
from tests.finished_runs import EVALUATION, SMALL
from tests.training.test_optimization import LAYERS
from vilmedic.checkpoints.checkpoint import scored
from vilmedic.models.from_checkpoint import from_checkpoint
from vilmedic.phantom.write import Plan, build

WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import torch, vilmedic
found = [vilmedic.load(path) for path in sys.argv[2:]]
images = [sys.argv[1]]
torch.save([(one.embed_images(images), one.embed_texts(["small left effusion"])) for one in found],
           "features.pth")
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("lora")
    build(folder / "data", Plan(train=21, validate=9, test=10, size=48), force=False, workers=1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, **LAYERS, image_size=32, patch_size=16)
    ViTModel(config).save_pretrained(folder / "vit")
    return [
        *CONVIRT.arguments(folder / "data"),
        *SMALL,
        "trainor.batch_size=8",
        "model.forward_batch_size=null",
        "trainor.optim_params.lr=0.01",
        "trainor.lr_decay=null",
        f"model.cnn.backbone={folder / 'vit'}",
        "model.cnn.pretrained=True",
        "model.cnn.lora.rank=2",
        "model.encoder.lora={rank: 3, alpha: 5, dropout: 0.1}",
        "model.projection.visual_embedding_dim=16",
        f"ckpt_dir={folder / 'ckpt'}",
    ]


def best_of(run: Path) -> Path:
    return scored(run)[0]


def newest(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run / "last_3.pth", weights_only=True)
    return state


@pytest.fixture(scope="module")
def run_dir(words: list[str], run_here: Run) -> Path:
    done = run_here("bin/train.py", *words, "name=whole", "trainor.epochs=2")
    assert re.search(r"[\d,]+ trained of [\d,]+ parameters", done.stdout)
    return Path(words[-1].partition("=")[2]) / "whole"


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(
    words: list[str], run_here: Run, run_dir: Path
) -> None:
    run_here("bin/train.py", *words, "name=parts", "trainor.epochs=1")
    run_here("bin/train.py", *words, "name=parts", "trainor.epochs=2", "ckpt=last")
    whole, parts = newest(run_dir), newest(run_dir.with_name("parts"))
    assert any(".lora_B." in name for name in whole["model"])
    for kind in ("model", "ema"):
        assert whole[kind].keys() == parts[kind].keys()
        for name, value in whole[kind].items():
            assert torch.equal(value, parts[kind][name]), name
    for number, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, parts["optimizer"]["state"][number][name])
    without = [word for word in words if ".lora" not in word]
    done = run_here(
        "bin/train.py", *without, "name=parts", "trainor.epochs=3", "ckpt=last", status=2
    )
    assert "was trained with lora, and the configuration does not have it" in done.stderr


def test_base_weights_are_frozen_and_adapters_trained(run_dir: Path) -> None:
    state = newest(run_dir)["model"]
    start = ViTModel.from_pretrained(run_dir.parents[1] / "vit").state_dict()
    for name, value in start.items():
        layer, _, last = name.rpartition(".")
        same = state.get(f"cnn.network.{name}", state.get(f"cnn.network.{layer}.base_layer.{last}"))
        assert torch.equal(same, value), name
    matrices = [value for name, value in state.items() if ".lora_B." in name]
    assert all(value.abs().max() > 0 for value in matrices)


@pytest.mark.slow
def test_checkpoints_and_exports_load_without_peft(words: list[str], run_dir: Path) -> None:
    best = best_of(run_dir)
    state = torch.load(best, weights_only=True)
    assert not any("lora" in name or "base_layer" in name for name in state["model"])
    assert "lora" not in state["config"]["model"]["encoder"]
    exported = run_dir.parent / "exported"
    vilmedic.load(run_dir / "last_3.pth").export(exported)
    assert "lora" not in from_checkpoint(exported).config["model"]["encoder"]
    image = next((run_dir.parents[1] / "data/images").rglob("*.png"))
    paths = [run_dir / "last_3.pth", best, exported]
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT, image, *paths],
        cwd=run_dir,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    last, merged, folder = torch.load(run_dir / "features.pth", weights_only=True)
    data = newest(run_dir)
    settings = data["config"]["model"]
    assert settings["encoder"]["lora"]["rank"] == 3
    for one, other in zip(last, folder, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert all(one.isfinite().all() for one in merged)


@pytest.mark.slow
def test_evaluation_and_fine_tuning_use_merged_weights(
    words: list[str], run_here: Run, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    metrics = ["~ensemblor.post_processing", "ensemblor.metrics={retrieval: null}"]
    small = [word for word in SMALL if word.startswith("trainor")]
    run_here("bin/ensemble.py", *words, "name=whole", *EVALUATION, *metrics)
    assert (run_dir / "results_test.json").is_file()
    without = [word for word in words if ".lora" not in word and "cnn.pretrained" not in word]
    run_here(
        "bin/train.py",
        *without,
        *small,
        "name=tuned",
        f"model.cnn.pretrained={run_dir}",
        "trainor.epochs=1",
        "model.cnn.freeze=True",
    )
    tuned = newest(run_dir.with_name("tuned"))["model"]
    merged = torch.load(best_of(run_dir), weights_only=True)["model"]
    names = [name for name in tuned if name.startswith("cnn.network.")]
    assert names
    assert all(torch.equal(tuned[name], merged[name]) for name in names)
