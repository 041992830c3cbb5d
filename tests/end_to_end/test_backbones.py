"""Training, resuming, loading and exporting with backbones of timm and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vilmedic
from tests.crash.systems import CONVIRT
from tests.end_to_end.conftest import ROOT, Run
from tests.small_backbones import FAMILIES, Family, saved
from vilmedic import cli, run
from vilmedic.phantom.write import Plan, build

WIDTHS = {"timm ConvNeXt": 32, "DINOv2": 16}
"""One family of each library with its feature width; the others differ only in the network."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backbones") / "data"
    build(root, Plan(train=9, validate=5, test=4, size=32), force=False, workers=1)
    return root


@pytest.mark.parametrize("name", WIDTHS)
def test_a_run_is_trained_resumed_loaded_and_exported(
    run_here: Run,
    data: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "write_pages", lambda run_dir: None)
    family: Family = FAMILIES[name]
    backbone, _ = saved(family, tmp_path / "model")
    words = [
        *CONVIRT.arguments(data),
        f"model.cnn.backbone={backbone}",
        "model.cnn.output_layer=avgpool",
        "model.cnn.pretrained=true",
        f"model.projection.visual_embedding_dim={WIDTHS[name]}",
        "trainor.num_workers=0",
        "trainor.save_every=null",
        "trainor.ema=null",
        "trainor.lr_decay=null",  # a schedule would depend on the number of epochs
        f"ckpt_dir={tmp_path}",
        "name=run",
    ]
    run_here("bin/train.py", *words, "trainor.epochs=2")
    whole = torch.load(tmp_path / "run/last_3.pth", weights_only=True)["model"]
    run_here("bin/train.py", *words, "trainor.epochs=1", "name=parts")
    more = ["trainor.epochs=2", "name=parts", "ckpt=auto", "trainor.activation_checkpointing=true"]
    run_here("bin/train.py", *words, *more)
    parts = torch.load(tmp_path / "parts/last_3.pth", weights_only=True)["model"]
    for key, value in whole.items():
        assert torch.equal(parts[key], value), key

    timm = name.startswith("timm")  # the slow parts run once: the plan here, ONNX there
    if timm:
        assert cli.train([*words, "--plan"]) == 0
        assert "parameters" in capsys.readouterr().out
    tuned = [*words, "name=tuned", f"model.cnn.pretrained={tmp_path}/run", "trainor.epochs=0"]
    run_here("bin/train.py", *tuned)
    start = torch.load(tmp_path / "tuned/last_3.pth", weights_only=True)["model"]
    (best,) = sorted((tmp_path / "run").glob("[0-9]*.pth"))[:1]
    from_run = torch.load(best, weights_only=True)["model"]
    names = [key for key in start if key.startswith("cnn.")]
    assert names
    assert all(torch.equal(start[key], from_run[key]) for key in names)

    (tmp_path / "model").rename(tmp_path / "elsewhere")
    model = vilmedic.load(tmp_path / "run", device="cpu")
    pictures = sorted((data / "images").rglob("*.png"))[:2]
    expected = model.embed_images(pictures)
    onnx = [] if timm else ["--onnx"]
    assert cli.export([str(tmp_path / "run"), str(tmp_path / "out"), *onnx]) == 0
    again = vilmedic.load(tmp_path / "out", device="cpu").embed_images(pictures)
    torch.testing.assert_close(again, expected)
