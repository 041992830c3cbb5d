from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vilmedic.config.load import Config, load
from vilmedic.config.trained import Trained, as_trained
from vilmedic.errors import CheckpointError, ConfigError

CONVIRT = "config/phantom/convirt.yml"
MAX = "model.encoder.pooling=max"


def follow(
    training: Config | list[Config],
    *words: str,
    path: str = CONVIRT,
    allow: bool = False,
    run_dir: Path = Path("ckpt/phantom-convirt"),
) -> Trained:
    """Evaluate with these overrides a run that was trained with `trained`."""
    trainings = training if isinstance(training, list) else [training]
    saved = {run_dir / f"{n}.pth": json.loads(json.dumps(c.data)) for n, c in enumerate(trainings)}
    return as_trained(load(path, words), saved, allow=allow)


def encoder(found: Trained) -> dict[str, Any]:
    return found.config.model["encoder"]


def test_the_same_configuration_is_unchanged() -> None:
    found = follow(load(CONVIRT))
    assert (found.taken, found.changed) == ([], {})
    assert found.config.data == load(CONVIRT).data


def test_keys_given_only_in_training_come_from_the_checkpoint() -> None:
    trained = load(CONVIRT, [MAX, "model.cnn.dropout_out=0.25", "dataset.image.crop=32"])
    found = follow(trained)
    assert encoder(found)["pooling"] == "max"
    assert found.config.model["cnn"]["dropout_out"] == 0.25
    assert found.config.dataset["image"]["crop"] == 32
    assert found.config.data["model"] == trained.data["model"]
    assert found.taken == [
        "model.encoder.pooling: 'max' (the configuration says 'mean')",
        "model.cnn.dropout_out: 0.25 (the configuration says 0.0)",
        "dataset.image.crop: 32 (the configuration says 64)",
    ]
    assert found.config.origins["model.encoder.pooling"] == "ckpt/phantom-convirt/0.pth"


def test_keys_absent_in_training_are_removed() -> None:
    trained = load(CONVIRT, ["~model.encoder.pooling", "~model.encoder.hidden_size"])
    found = follow(trained)
    assert encoder(found).keys() == trained.model["encoder"].keys()
    assert "model.encoder.pooling: 'pooler' (the configuration says 'mean')" in found.taken
    assert "model.encoder.hidden_size: 768 (the configuration says 128)" in found.taken


@pytest.mark.parametrize("word", ["model.encoder.pooling=mean", "~model.encoder.pooling"])
def test_contradicting_overrides_are_refused_unless_allowed(word: str) -> None:
    trained = load(CONVIRT, [MAX, "dataset.image.resize=32"])
    with pytest.raises(ConfigError) as caught:
        follow(trained, word, "dataset.image.resize=128")
    (first, second) = caught.value.problems
    value = word.partition("=")[2] or "pooler"
    assert first.startswith(f"model.encoder.pooling (command line): given '{value}', but ")
    assert "0.pth was trained with 'max'" in first
    assert "ensemblor.changed=allow" in first
    assert second.startswith("dataset.image.resize (command line): given 128, but ")
    assert "was trained with 32" in second

    found = follow(trained, "dataset.image.resize=128", allow=True)
    assert found.config.dataset["image"]["resize"] == 128
    assert encoder(found)["pooling"] == "max", "keys that were not given stay as trained"
    assert found.changed == {"dataset.image.resize": {"checkpoint": 32, "used": 128}}


def test_repeating_trained_values_is_no_change() -> None:
    words = [MAX, "dataset.image.crop=32"]
    assert follow(load(CONVIRT, words), *words).taken == []


def test_overrides_through_interpolations_count_as_overrides(tmp_path: Path) -> None:
    path = "config/phantom/vae.yml"
    with pytest.raises(ConfigError) as caught:
        follow(load(path), "model.image_size=32", path=path)
    assert [p.partition(" ")[0] for p in caught.value.problems] == [
        "model.image_size",
        "dataset.resize",
        "dataset.crop",
    ]
    found = follow(load(path), "model.image_size=32", path=path, allow=True)
    assert (found.config.dataset["crop"], found.config.model["image_size"]) == (32, 32)


def test_paths_data_and_protocols_may_change(tmp_path: Path) -> None:
    words = [
        "dataset.image.root=elsewhere",
        "dataset.image.image_path=pictures",
        "dataset.seq.file=report.tok",
        "dataset.proto=ImSeq",
        "dataset.image.cache=x",
        "dataset.image.on_error=skip",
        "dataset.image.transforms=null",
        "dataset.seq.sample_sentence=True",
        "model.cnn.pretrained=True",
        "model.encoder.pretrained=ckpt/other",
        "model.forward_batch_size=8",
        "trainor.batch_size=4",
        "validator.splits=[test]",
        "trainor.early_stop_metric=test_loss",
        "ensemblor.batch_size=4",
        "ckpt_dir=runs",
    ]
    found = follow(load(CONVIRT), *words)
    assert found.taken == []
    assert found.config.data == load(CONVIRT, words).data


def test_another_data_set_is_compared_by_its_parts() -> None:
    training = ["config/phantom/simclr.yml", "config/SELFSUP/simclr-mimic.yml"]
    evaluation = ["config/phantom/simclr-eval.yml", "config/SELFSUP/simclr-mimic-eval.yml"]
    for trained, path in zip(training, evaluation, strict=True):
        found = follow(load(trained), path=path)
        assert found.taken == []
        assert found.config.data == load(path).data

    words = ["dataset.resize=40", "dataset.crop=32", "dataset.mean=[0.5]", "dataset.std=[0.2]"]
    small = load(training[0], words)
    found = follow(small, path=evaluation[0])
    image = found.config.dataset["image"]
    assert (image["resize"], image["crop"], image["mean"]) == (40, 32, [0.5])
    assert len(found.taken) == 4
    with pytest.raises(ConfigError, match=r"dataset\.image\.crop.*given 64, but .* with 32"):
        follow(small, "dataset.image.crop=64", path=evaluation[0])
    # an evaluation draws several views too
    views = follow(load(training[0], ["dataset.transforms=null"]), path=training[0])
    assert [line.partition(":")[0] for line in views.taken] == ["dataset.transforms"]


def test_another_trained_class_brings_all_its_keys() -> None:
    trained = load("config/phantom/simclr.yml")
    found = follow(trained)
    assert found.config.model == trained.model
    assert "model.proto: 'SimCLR' (the configuration says 'ConVIRT')" in found.taken
    loss = "model.loss.proto=NTXentLoss"
    assert follow(trained, loss, path="config/phantom/simclr.yml").taken == []
    with pytest.raises(ConfigError, match=r"model\.proto \(command line\): given 'ConVIRT'"):
        follow(trained, "model.proto=ConVIRT")


def test_paths_come_from_training_unless_missing(tmp_path: Path) -> None:
    path = "config/phantom/dalle.yml"
    (tmp_path / "vae.pth").touch()
    trained = load(path, [f"model.vae.ckpt={tmp_path}/vae.pth"])
    found = follow(trained, path=path)
    assert found.config.model["vae"]["ckpt"] == f"{tmp_path}/vae.pth"
    (other,) = [tmp_path / "moved.pth"]
    other.touch()
    given = f"model.vae.ckpt={other}"
    assert follow(trained, given, path=path).config.model["vae"]["ckpt"] == str(other)
    own = tmp_path / "own.yml"
    own.write_text(f"includes: [{Path(path).absolute()}]\nmodel:\n  vae:\n    ckpt: {other}\n")
    assert follow(trained, path=str(own)).config.model["vae"]["ckpt"] == f"{tmp_path}/vae.pth"
    (tmp_path / "vae.pth").unlink()
    assert follow(trained, path=str(own)).config.model["vae"]["ckpt"] == str(other)


def test_a_missing_vae_is_taken_from_the_checkpoint(tmp_path: Path) -> None:
    path = "config/phantom/dalle.yml"
    gone = tmp_path / "gone"
    own = tmp_path / "own.yml"
    own.write_text(f"includes: [{Path(path).absolute()}]\nmodel:\n  vae:\n    ckpt: {gone}\n")
    found = follow(load(str(own)), path=str(own))
    assert found.config.model["vae"]["ckpt"] == "ckpt/phantom-convirt/0.pth"
    assert found.taken == [
        f"model.vae.ckpt: 'ckpt/phantom-convirt/0.pth' (there is no '{gone}' any more)"
    ]
    said = follow(load(str(own)), f"model.vae.ckpt={gone}", path=path)
    assert said.config.model["vae"]["ckpt"] == str(gone)


def write_tokenizer(folder: Path, words: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(words)
    return folder


def test_the_vocabulary_of_training_is_used(tmp_path: Path) -> None:
    run_dir = tmp_path / "trained"
    own = write_tokenizer(run_dir / "tokenizer", "a")
    found = follow(load(CONVIRT), run_dir=run_dir)
    assert found.config.dataset["seq"]["tokenizer"] == str(own)

    copied = write_tokenizer(tmp_path / "copied", "a")
    found = follow(load(CONVIRT), f"dataset.seq.tokenizer={copied}", run_dir=run_dir)
    assert found.config.dataset["seq"]["tokenizer"] == str(copied)
    other = write_tokenizer(tmp_path / "other", "b")
    with pytest.raises(ConfigError, match=r"dataset\.seq\.tokenizer.*trained with null"):
        follow(load(CONVIRT), f"dataset.seq.tokenizer={other}", run_dir=run_dir)
    trained = load(CONVIRT, [f"dataset.seq.tokenizer={copied}"])
    with pytest.raises(ConfigError, match=r"dataset\.seq\.tokenizer.*other.*trained with"):
        follow(trained, f"dataset.seq.tokenizer={other}")
    moved = write_tokenizer(tmp_path / "moved", "a")
    assert follow(trained, f"dataset.seq.tokenizer={moved}").taken == []
    assert follow(trained).config.dataset["seq"]["tokenizer"] == str(copied)


def write_encoder(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **settings}))
    return folder


def test_another_encoder_folder_must_hold_the_same_model(tmp_path: Path) -> None:
    own = write_encoder(tmp_path / "own", hidden_size=128, dtype="float16", use_cache=True)
    copied = write_encoder(tmp_path / "copied", hidden_size=128, hidden_act="gelu")
    other = write_encoder(tmp_path / "other", hidden_size=128, hidden_act="relu")
    (kind := tmp_path / "kind").mkdir()
    (kind / "config.json").write_text(json.dumps({"model_type": "roberta", "hidden_size": 128}))

    def asked(folder: Path, *words: str) -> list[str]:
        whole = f"model.encoder={{proto: {folder}, pooling: mean}}"
        return [whole, "dataset.seq.tokenizer=words", *words]

    trained = load(CONVIRT, asked(own))
    assert encoder(follow(trained, *asked(copied)))["proto"] == str(copied)
    for folder in (other, kind):
        with pytest.raises(ConfigError, match=rf"proto.*given '{folder}'.*trained with '{own}'"):
            follow(trained, *asked(folder))
    own.rename(tmp_path / "gone")  # its content is now unknown
    assert encoder(follow(trained, *asked(kind)))["proto"] == str(kind)


def test_fields_come_from_the_published_encoder_not_class_defaults(tmp_path: Path) -> None:
    own = write_encoder(tmp_path / "own", hidden_size=32, num_hidden_layers=1)
    trained = load(CONVIRT, [f"model.encoder={{proto: {own}}}", "dataset.seq.tokenizer=words"])
    assert [line for line in follow(trained).taken if "model.encoder." in line] == [
        "model.encoder.hidden_size: 32 (the configuration says 128)",
        "model.encoder.num_hidden_layers: 1 (the configuration says 2)",
        "model.encoder.num_attention_heads: 12 (the configuration says 4)",
        "model.encoder.intermediate_size: 3072 (the configuration says 256)",
        f"model.encoder.proto: '{own}' (the configuration says null)",
        "model.encoder.pooling: 'pooler' (the configuration says 'mean')",
    ]
    repeated = [f"model.encoder.proto={own}", "model.encoder.hidden_size=32"]
    assert "hidden_size" in encoder(follow(trained, *repeated))


def test_checkpoints_of_different_models_cannot_be_an_ensemble() -> None:
    both = [load(CONVIRT), load(CONVIRT, [MAX])]
    with pytest.raises(CheckpointError, match=r"1\.pth and .*0\.pth.*model\.encoder\.pooling is"):
        follow(both)
    assert follow([both[1], both[1]]).config.model == both[1].model
    crops = [load(CONVIRT), load(CONVIRT, ["dataset.image.crop=32"])]
    found = follow(crops, "dataset.image.crop=48", allow=True)
    assert found.config.dataset["image"]["crop"] == 48


def test_pixel_settings_taken_from_the_backbone_are_kept() -> None:
    words = ["~dataset.image.resize", "~dataset.image.crop", "model.cnn.backbone=hf:owner/model"]
    pixels = ["dataset.image.resize=48", "dataset.image.crop=40"]
    trained = load(CONVIRT, [words[-1], *pixels])
    image = follow(trained, *words).config.dataset["image"]
    assert (image["resize"], image["crop"]) == (48, 40)
    with pytest.raises(ConfigError, match=r"dataset.image.crop \(command line\): given 224"):
        follow(load(CONVIRT, pixels), *words[:-1])
