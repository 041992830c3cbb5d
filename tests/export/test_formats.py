"""Exports of the five systems give our features in other libraries, without this package."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

import vilmedic
from tests.export import exports
from tests.export.exports import TEXTS, image_file, save_run
from tests.export.hub import Hub
from tests.parity.reference import missing_packages
from vilmedic import cli
from vilmedic.config.load import load
from vilmedic.phantom.write import Plan, build
from vilmedic.trained_model import TrainedModel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
PROMPT = "Large left pleural effusion."


class Exports:
    """The exports, and the outputs of other libraries on them."""

    def __init__(self, folder: Path) -> None:
        self.grey = image_file(folder / "grey.png")
        self.color = image_file(folder / "color.png", color=True)
        ViTModel(ViTConfig(**exports.VIT)).save_pretrained(folder / "vit")
        vit = exports.cnn(str(folder / "vit"), output_layer="last_hidden_state")
        configs = {
            "convirt": load(ROOT / "config/phantom/convirt.yml").data,
            "simclr": exports.simclr(vit, 16),
            "simclr-swin": exports.simclr(exports.cnn("swin_t", output_layer="features.1"), 96),
            "gloria": exports.gloria(),
            "vae": exports.vae(),
            "dalle": exports.dalle(folder),
        }
        with_onnx = set(configs) - {"simclr-swin", "dalle"}
        self.folders = {name: folder / "out" / name for name in configs}
        self.runs = {name: folder / "ckpt" / name for name in configs}
        for name, config in configs.items():
            save_run(self.runs[name], config)
            words = [str(self.runs[name]), str(self.folders[name])]
            assert cli.export(words + ["--onnx"] * (name in with_onnx)) == 0
        script = [str(HERE / "without_us.py"), str(self.grey), str(self.color)]
        script += [str(HERE.parent / "parity/reference.py"), *map(str, self.folders.values())]
        done = subprocess.run(
            [sys.executable, *script], cwd=folder, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr
        self.theirs = {name: dict(np.load(f"{path}.npz")) for name, path in self.folders.items()}

    def ours(self, name: str) -> TrainedModel:
        return vilmedic.load(self.runs[name], device="cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    if missing := missing_packages():
        pytest.skip(f"dalle-pytorch is needed ({', '.join(missing)}); `make test` installs it")
    return Exports(tmp_path_factory.mktemp("formats"))


def near(found: Any, expected: Tensor) -> None:
    assert expected.abs().max() > 1e-3  # not constant
    torch.testing.assert_close(torch.from_numpy(np.asarray(found)), expected, **NEAR)


def image_features(model: TrainedModel, path: Path) -> tuple[Tensor, Tensor]:
    both = ("visual", "visual_backbone")
    found = [model.embed_images(path, features=one, normalize=False) for one in both]  # type: ignore[arg-type]
    return found[0], found[1]


def test_timm_torchvision_transformers_and_onnx_give_the_features_of_convirt(
    exported: Exports,
) -> None:
    theirs, model = exported.theirs["convirt"], exported.ours("convirt")
    visual, backbone = image_features(model, exported.grey)
    near(theirs["pixels"], model.preprocess(exported.grey)[None])
    near(theirs["backbone"], backbone)
    near(theirs["torchvision"], backbone)
    assert sorted(theirs["missing"]) == ["fc.bias", "fc.weight"]
    near(theirs["visual"], visual)
    linguistic = model.embed_texts(card_texts(), normalize=False)
    near(theirs["linguistic"], linguistic)
    near(theirs["cosines"], model.similarity(visual, linguistic))
    near(theirs["on_images_0"], visual)
    near(theirs["on_images_1"], backbone)
    near(theirs["on_texts_0"], linguistic)
    config = json.loads((exported.folders["convirt"] / "image_encoder/config.json").read_text())
    assert config["architecture"] == "resnet18"


def card_texts() -> list[str]:
    return ["No acute findings.", PROMPT]


def test_transformers_and_onnx_give_the_features_of_a_vision_transformer(
    exported: Exports,
) -> None:
    theirs = exported.theirs["simclr"]
    visual, backbone = image_features(exported.ours("simclr"), exported.color)
    near(theirs["backbone"], backbone)  # at another image size than in pretraining
    near(theirs["visual"], visual)
    near(theirs["on_images_0"], visual)


def test_torchvision_gives_the_features_of_a_layer_inside_a_network(exported: Exports) -> None:
    visual, backbone = image_features(exported.ours("simclr-swin"), exported.color)
    near(exported.theirs["simclr-swin"]["backbone"], backbone)
    near(exported.theirs["simclr-swin"]["visual"], visual)


def test_torchvision_transformers_and_onnx_give_the_features_of_gloria(exported: Exports) -> None:
    theirs, model = exported.theirs["gloria"], exported.ours("gloria")
    visual, backbone = image_features(model, exported.grey)
    near(theirs["backbone"], backbone)
    near(theirs["visual"], visual)
    linguistic = model.embed_texts(card_texts(), normalize=False)
    near(theirs["linguistic"], linguistic)
    near(theirs["on_images_0"], visual)
    near(theirs["on_texts_0"], linguistic)
    system: Any = model.model
    batch = {"images": model.preprocess(exported.grey)[None]}
    near(theirs["on_images_1"], system.encode(batch)["regions"])
    words = model._tokens(card_texts())
    length = theirs["on_texts_1"].shape[1]
    near(theirs["on_texts_1"], system.encode_text(words)["words"][:, :length])


def test_dalle_pytorch_and_onnx_give_codes_and_images_of_the_vae(exported: Exports) -> None:
    theirs, model = exported.theirs["vae"], exported.ours("vae")
    codes = model.encode(exported.grey)
    assert len(codes.unique()) > 1
    assert np.array_equal(theirs["codes"], codes)
    assert np.array_equal(theirs["logits"].reshape(1, 24, -1).argmax(1), codes)
    near(theirs["made"], model.decode(codes))
    vae: Any = model.model
    near(vae.pixels.restore(torch.from_numpy(theirs["again"])), model.decode(codes))


def test_dalle_pytorch_gives_the_scores_of_dalle(exported: Exports) -> None:
    theirs, model = exported.theirs["dalle"], exported.ours("dalle")
    assert np.array_equal(theirs["codes"], model.encode(exported.grey))
    system: Any = model.model
    batch = model._tokens([PROMPT])
    text = system.text_tokens(batch["input_ids"], batch["attention_mask"])
    with torch.inference_mode():
        expected = system.to_logits(system.states(text, model.encode(exported.grey)))
    allowed = torch.from_numpy(theirs["scores"]) > -1e30  # the reference masks the rest
    assert allowed.any()
    near(theirs["scores"][allowed], expected[allowed])


@pytest.mark.parametrize("name", ["convirt", "simclr", "simclr-swin", "gloria", "vae", "dalle"])
def test_an_export_gives_the_features_of_its_run(exported: Exports, name: str) -> None:
    model = exported.ours(name)
    again = vilmedic.load(exported.folders[name], device="cpu")
    assert again.abilities == model.abilities
    expected: Mapping[str, Tensor] = model.model.state_dict()
    found = again.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    if "embed_images" in model.abilities:
        path = exported.color if "simclr" in name else exported.grey
        for own, other in zip(
            image_features(model, path), image_features(again, path), strict=True
        ):
            torch.testing.assert_close(other, own, rtol=0, atol=1e-6)
    if "embed_texts" in model.abilities:
        torch.testing.assert_close(
            again.embed_texts(TEXTS), model.embed_texts(TEXTS), rtol=0, atol=1e-6
        )
    if "encode" in model.abilities:
        assert torch.equal(again.encode(exported.grey), model.encode(exported.grey))


SNIPPET = re.compile(
    r"^```python\n(.*?)^```$|^    python bin/(export|train|ensemble)\.py ([^\n]*)$", re.M | re.S
)
SMALL = (
    *("trainor.epochs=1", "trainor.batch_size=8", "trainor.precision=fp32"),
    *("trainor.num_workers=0", "trainor.early_stop_metric=validation_loss", "~validator.metrics"),
)
PLAIN = (
    *("ensemblor.splits=[test]", "ensemblor.metrics={retrieval: }", "ensemblor.baselines=[]"),
    *("ensemblor.post_processing={}", "ensemblor.report=False", "ensemblor.batch_size=4"),
)


def test_every_snippet_of_the_docs_page_runs(
    exported: Exports,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder like a clone after `make demo` and the first command of the page."""
    shutil.copytree(exported.runs["convirt"], tmp_path / "ckpt/demo-convirt")
    shutil.copytree(exported.folders["convirt"], tmp_path / "out/demo-convirt")
    (tmp_path / "config").symlink_to(ROOT / "config")
    plan = Plan(train=16, validate=8, test=4, size=64)
    build(tmp_path / "data/phantom", plan, force=False, workers=1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    done: list[str] = []
    for code, command, words in SNIPPET.findall((ROOT / "docs/sharing.md").read_text()):
        if code:
            exec(compile(code, "docs/sharing.md", "exec"), names)
        else:
            more = {"train": SMALL, "ensemble": PLAIN}.get(command, ())
            status = getattr(cli, command)([*shlex.split(words), *more])
            assert status == 0, capsys.readouterr().err
        done.append(command or "python")
    assert done.count("python") == 7
    assert done.count("export") == 3
    assert done.count("train") == 1
    assert done.count("ensemble") == 1
    [results] = (tmp_path / "ckpt/from-export/evaluations").glob("*/results_test.json")
    found = json.loads(results.read_text())
    assert found["metrics"]["retrieval"]
    assert [one["file"] for one in found["checkpoints"]] == ["demo-convirt"]
    assert names["classifier"](names["pixels"]).shape == (1, 5)
    assert names["visual"].shape == (1, 128)
    assert list((tmp_path / "ckpt/started-from-export").glob("last_*.pth"))
    assert "onnx/image_encoder.onnx" in hub.files["user/name"]
    assert not hub.public
    assert names["shared"].path != Path("out/demo-convirt")
