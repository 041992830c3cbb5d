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
    """An evaluation with these words of what was trained so."""
    trainings = training if isinstance(training, list) else [training]
    saved = {run_dir / f"{n}.pth": json.loads(json.dumps(c.data)) for n, c in enumerate(trainings)}
    return as_trained(load(path, words), saved, allow=allow)


def encoder(found: Trained) -> dict[str, Any]:
    return found.config.model["encoder"]


def test_the_same_configuration_stays_as_it_is() -> None:
    found = follow(load(CONVIRT))
    assert (found.taken, found.changed) == ([], {})
    assert found.config.data == load(CONVIRT).data


def test_a_key_that_was_given_in_training_alone_is_that_of_the_checkpoint() -> None:
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


def test_a_key_that_training_did_not_have_is_taken_out() -> None:
    trained = load(CONVIRT, ["~model.encoder.pooling", "~model.encoder.hidden_size"])
    found = follow(trained)
    assert encoder(found).keys() == trained.model["encoder"].keys()
    assert "model.encoder.pooling: 'pooler' (the configuration says 'mean')" in found.taken
    assert "model.encoder.hidden_size: 768 (the configuration says 128)" in found.taken


@pytest.mark.parametrize("word", ["model.encoder.pooling=mean", "~model.encoder.pooling"])
def test_the_command_line_is_refused_unless_a_switch_allows_it(word: str) -> None:
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
    assert encoder(found)["pooling"] == "max", "what was not given stays as trained"
    assert found.changed == {"dataset.image.resize": {"checkpoint": 32, "used": 128}}


def test_repeating_what_was_trained_is_no_change() -> None:
    words = [MAX, "dataset.image.crop=32"]
    assert follow(load(CONVIRT, words), *words).taken == []


def test_a_key_that_the_command_line_reaches_through_another_is_its_own(tmp_path: Path) -> None:
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


def test_places_data_and_protocols_are_free(tmp_path: Path) -> None:
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
    # several views are drawn in an evaluation too
    views = follow(load(training[0], ["dataset.transforms=null"]), path=training[0])
    assert [line.partition(":")[0] for line in views.taken] == ["dataset.transforms"]


def test_another_class_brings_all_its_keys() -> None:
    trained = load("config/phantom/simclr.yml")
    found = follow(trained)
    assert found.config.model == trained.model
    assert "model.proto: 'SimCLR' (the configuration says 'ConVIRT')" in found.taken
    loss = "model.loss.proto=NTXentLoss"
    assert follow(trained, loss, path="config/phantom/simclr.yml").taken == []
    with pytest.raises(ConfigError, match=r"model\.proto \(command line\): given 'ConVIRT'"):
        follow(trained, "model.proto=ConVIRT")


def test_places_are_those_of_the_training_unless_they_are_gone(tmp_path: Path) -> None:
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


def test_a_vae_that_is_gone_is_taken_from_the_checkpoint_itself(tmp_path: Path) -> None:
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


def test_a_vocabulary_is_that_of_the_training(tmp_path: Path) -> None:
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


def test_another_folder_may_hold_the_same_encoder_only(tmp_path: Path) -> None:
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
    own.rename(tmp_path / "gone")  # then it cannot be seen what was there
    assert encoder(follow(trained, *asked(kind)))["proto"] == str(kind)


def test_fields_that_a_published_encoder_states_are_not_those_of_the_class(tmp_path: Path) -> None:
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


def test_checkpoints_of_different_models_are_no_ensemble() -> None:
    both = [load(CONVIRT), load(CONVIRT, [MAX])]
    with pytest.raises(CheckpointError, match=r"1\.pth and .*0\.pth.*model\.encoder\.pooling is"):
        follow(both)
    assert follow([both[1], both[1]]).config.model == both[1].model
    crops = [load(CONVIRT), load(CONVIRT, ["dataset.image.crop=32"])]
    found = follow(crops, "dataset.image.crop=48", allow=True)
    assert found.config.dataset["image"]["crop"] == 48


def test_pixels_that_training_took_from_the_backbone_stay_when_the_keys_are_removed() -> None:
    words = ["~dataset.image.resize", "~dataset.image.crop", "model.cnn.backbone=hf:owner/model"]
    pixels = ["dataset.image.resize=48", "dataset.image.crop=40"]
    trained = load(CONVIRT, [words[-1], *pixels])
    image = follow(trained, *words).config.dataset["image"]
    assert (image["resize"], image["crop"]) == (48, 40)
    with pytest.raises(ConfigError, match=r"dataset.image.crop \(command line\): given 224"):
        follow(load(CONVIRT, pixels), *words[:-1])
