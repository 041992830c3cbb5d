from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vilmedic
from tests.export.exports import BEST, cnn, convirt, dalle, image_file, save_run, simclr
from tests.export.without_us import snippets
from tests.full_disk import no_file_beyond
from tests.small_dalles import save_vae
from vilmedic import cli
from vilmedic.checkpoints.checkpoint import load_checkpoint
from vilmedic.errors import ConfigError
from vilmedic.export.folder import write_export
from vilmedic.run import load


def test_the_folder_has_all_parts_without_training_state(made: Path) -> None:
    files = {path.relative_to(made / "out").as_posix() for path in (made / "out").rglob("*.*")}
    assert files == {
        *("README.md", "vilmedic.json", "preprocessor_config.json", "heads.safetensors"),
        *("image_encoder/config.json", "image_encoder/model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("text_encoder/tokenizer.json", "text_encoder/tokenizer_config.json"),
    }
    state = load_checkpoint(made / "run" / BEST)
    found: dict[str, Any] = {}
    for name, prefix in (
        ("image_encoder/model", "cnn.network."),
        ("text_encoder/model", "encoder.network."),
        ("heads", ""),
    ):
        weights = load_file(made / "out" / f"{name}.safetensors")
        found |= {prefix + key: value for key, value in weights.items()}
    assert found.keys() == state["model"].keys()
    assert all(torch.equal(found[key], value) for key, value in state["model"].items())


def test_files_are_readable_by_other_users(made: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (made / "out").rglob("*.*")}
    assert len(set(modes.values())) == 1, modes


def test_preprocessing_is_written_in_transformers_format(made: Path) -> None:
    said = json.loads((made / "out/preprocessor_config.json").read_text())
    assert said["size"] == {"shortest_edge": 40}
    assert said["crop_size"] == {"height": 32, "width": 32}
    assert said["image_mean"] == [0.485, 0.456, 0.406]
    assert said["image_std"] == [0.229, 0.224, 0.225]
    assert (said["color"], said["antialias"], said["resample"]) == ("grey", True, 2)


def test_a_repeated_export_changes_nothing(made: Path, out: Path, capsys: Any) -> None:
    card = out / "README.md"
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert cli.export([str(made / "run"), str(out)]) == 0
    assert "holds this export already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_another_export_is_replaced_only_with_force(
    made: Path, out: Path, run_dir: Path, capsys: Any
) -> None:
    words = [str(run_dir), str(out), "--ema"]
    assert cli.export(words) == 2
    assert f"{out}: holds an export of other weights. Replace it" in capsys.readouterr().err
    assert cli.export([*words, "--force"]) == 0
    averaged = load_checkpoint(run_dir / BEST)["ema"]
    weights = load_checkpoint(out)["model"]
    assert all(torch.equal(weights[name], value) for name, value in averaged.items())
    assert "The weights are averages over training." in (out / "README.md").read_text()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "run"]
    again = load(out, device="cpu")
    expected = load(run_dir, ema=True, device="cpu")
    image = image_file(out.parent / "a.png")
    assert torch.equal(again.embed_images(image), expected.embed_images(image))


def test_a_damaged_export_is_fixed_with_force(made: Path, out: Path) -> None:
    model = load(made / "run", device="cpu")
    (out / "heads.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"is damaged.*Write it again with --force"):
        model.export(out)
    model.export(out, force=True)
    assert load(out, device="cpu").abilities == model.abilities


def test_other_folders_and_files_are_never_replaced(made: Path, tmp_path: Path) -> None:
    model = load(made / "run", device="cpu")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match="holds something that is no export"):
            model.export(tmp_path / "thesis", force=force)
        with pytest.raises(ConfigError, match="is a file; an export is a folder"):
            model.export(tmp_path / "thesis" / "chapter.tex", force=force)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "mine"
    with pytest.raises(ConfigError, match="cannot be written"):
        model.export(tmp_path / "thesis" / "chapter.tex" / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (model.export(empty) / "vilmedic.json").is_file()


def test_an_incomplete_export_leaves_no_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise KeyboardInterrupt

    model = load(made / "run", device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("vilmedic.export.folder.write_card", fail)
        with pytest.raises(KeyboardInterrupt):
            model.export(tmp_path / "new")
    assert not os.listdir(tmp_path)
    (tmp_path / ".new.tmp").mkdir()  # left by a killed export
    (tmp_path / ".new.tmp" / "half").write_text("x")
    model.export(tmp_path / "new")
    assert os.listdir(tmp_path) == ["new"]


def test_an_export_can_be_exported(out: Path, tmp_path: Path) -> None:
    again = load(out, device="cpu").export(tmp_path / "again")
    for name in ("README.md", "image_encoder/model.safetensors", "text_encoder/tokenizer.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    manifests = [json.loads((one / "vilmedic.json").read_text()) for one in (out, again)]
    for one in manifests:
        del one["source"]["checkpoint"]
    assert manifests[0] == manifests[1]


def test_exporting_does_not_change_the_model(made: Path, tmp_path: Path) -> None:
    model = load(made / "run", device="cpu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert write_export(model._loaded, tmp_path / "new")
    assert not write_export(model._loaded, tmp_path / "new")
    after = model.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module.training for module in model.model.modules())


def test_a_run_that_cannot_be_loaded_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert cli.export([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "there is no such run directory or checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        cli.export(["--help"])
    assert caught.value.code == 0
    assert "averaged weights" in capsys.readouterr().out


def test_a_full_disk_is_an_error_and_leaves_nothing(made: Path, tmp_path: Path) -> None:
    model = load(made / "run", device="cpu")
    with no_file_beyond(50_000), pytest.raises(ConfigError, match=r"cannot be written: File too"):
        model.export(tmp_path / "new")
    assert not os.listdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be the name of a folder"):
        model.export("a\0b")


def test_dalle_needs_no_image_size_in_its_configuration(tmp_path: Path) -> None:
    """The checkpoint and the export hold it; for older checkpoints the data set gives it."""
    config = dalle(tmp_path)
    del config["model"]["vae"]["image_size"]
    scale = [[0.25] * 3, [0.75] * 3]
    config["model"]["vae"]["ckpt"] = str(save_vae(tmp_path / "v.pth", normalization=scale))
    model = save_run(tmp_path / "older", config)
    said = model.stated_vae()
    assert said == {"image_size": 16, "normalization": scale}
    save_run(tmp_path / "run", config, vae=said)
    for file in ("vae.pth", "v.pth"):
        (tmp_path / file).unlink()
    assert load(tmp_path / "older", device="cpu").model.vae.image_size == 16
    out = load(tmp_path / "run", device="cpu").export(tmp_path / "out")
    shutil.rmtree(tmp_path / "run")
    for place in (out, load(out, device="cpu").export(tmp_path / "again")):
        assert load(place, device="cpu").model.stated_vae() == said


def test_encoder_decoder_models_are_exported(tmp_path: Path) -> None:
    """Only the encoder is trained; transformers loads the exported folder."""
    from transformers import AutoModel, T5Config, T5Model

    settings = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5Model(T5Config(**settings, vocab_size=15)).save_pretrained(tmp_path / "t5")
    config = convirt("shufflenet_v2_x0_5", 1024)
    config["model"]["encoder"] = {"proto": str(tmp_path / "t5"), "pooling": "mean"}
    save_run(tmp_path / "run", config)
    model = vilmedic.load(tmp_path / "run", device="cpu")
    out = model.export(tmp_path / "out")
    encoder = AutoModel.from_pretrained(out / "text_encoder").get_encoder().eval()
    tokens = model._tokens(["small effusion", "large left pleural effusion ."])
    del tokens["word_ids"]
    with torch.inference_mode():
        found = encoder(**tokens).last_hidden_state
        expected = model.text_encoder.network(**tokens).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(found, expected)
    again = vilmedic.load(out, device="cpu")
    texts = ["small effusion"]
    assert torch.equal(again.embed_texts(texts), model.embed_texts(texts))


@pytest.mark.parametrize(
    ("backbone", "layer", "width"),
    [("mnasnet0_5", "avgpool", 1280), ("densenet121", "features.denseblock1", 256)],
)
def test_card_snippets_work_for_special_networks(
    tmp_path: Path, backbone: str, layer: str, width: int
) -> None:
    """With a network that needs state dict metadata, and one that changes weights in place."""
    save_run(tmp_path / "run", simclr(cnn(backbone, output_layer=layer), width))
    model = load(tmp_path / "run", device="cpu")
    out = model.export(tmp_path / "out")
    image = image_file(tmp_path / "image.png", color=True)
    names: dict[str, Any] = {}
    for code in snippets(str(out), str(image)):
        exec(compile(code, "README.md", "exec"), names)
    expected = model.embed_images(image, features="visual_backbone", normalize=False)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(names["backbone"], expected, rtol=1e-5, atol=1e-5)
