from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.config.conftest import Project
from vilmedic.cli import train
from vilmedic.config.load import read
from vilmedic.config.show import (
    first_sentence,
    help_on,
    help_page,
    keys_named,
    print_config,
)
from vilmedic.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = ["CLIP/dalle", "SELFSUP/gloria-mimic", "phantom/convirt", "phantom/simclr", "phantom/vae"]


def test_every_printed_value_has_its_origin(project: Project) -> None:
    config = project.load("trainor.epochs=3", "name=1e3")
    text = print_config(config)
    lines = {line.partition("#")[0].strip(): line.partition("# ")[2] for line in text.splitlines()}
    assert lines["name: '1e3'"] == "command line"
    assert lines["epochs: 3"] == "command line"
    assert lines["tau: 0.5"] == "base.yml:15"
    assert lines["grad_accu: 1"] == "default"
    assert lines["post_processing: {}"] == "default"
    assert lines["net:"] == ""
    assert yaml.safe_load(text)["trainor"]["epochs"] == 3


def test_a_hash_in_a_value_does_not_hide_the_origin(project: Project) -> None:
    text = print_config(project.load("name=run #3"))
    assert any(line.startswith("name: 'run #3' ") for line in text.splitlines())


@pytest.mark.parametrize("name", SHIPPED)
def test_help_is_a_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    draft = read(f"config/{name}.yml")
    for columns in (100, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert train([f"config/{name}.yml", "--help"]) == 0
        text = capsys.readouterr().out
        assert len(text.splitlines()) <= 40
        for page in (text, help_on(["trainor", "dataset", "model", "ensemblor.metrics"], draft)):
            assert max(map(len, page.splitlines())) <= columns


def test_a_section_lists_its_keys_and_current_values(project: Project) -> None:
    draft = read("base.yml", ["model.net.width=5", "trainor.epochs=7"])
    page = help_page("train.py", "Trains a model.", [], draft)
    assert "\n  model             the model (Pair)\n" in page
    assert "\n  trainor           how it is trained\n" in page
    text = help_on(["trainor", "model.net", "model.encoder"], draft)
    for expected in (
        "trainor: how it is trained\n",
        "  model.net.width: integer >= 1; default 8; now 5 (command line)",
        "  model.net.backbone: text; required; now small (base.yml:9)\n      the architecture.",
        "  model.net.permute: one of batch_first, none; default batch_first",
        "  model.encoder.hidden_size: integer from 1 to 65536; default 768; now 64 (base.yml:1",
        "  trainor.epochs: integer >= 0; default 99; now 7 (command line)",
        "  trainor.early_stop: integer >= 1, or null; default null",
        "\nmore: --help trainor.optimizer, --help trainor.optim_params, ",
    ):
        assert expected in text
    assert "model.spec" not in text
    assert "trainor.optim_params.lr" not in text  # listed by --help trainor.optim_params


def test_names_and_options_are_listed_only_under_their_topic(project: Project) -> None:
    draft = read("base.yml")
    assert "decoupled_weight_decay: true or false" in help_on(["trainor.optim_params"], draft)
    assert "\n      Names: ASGD, Adadelta" in help_on(["trainor.optimizer"], draft)
    assert "retrieval " in (metrics := help_on(["ensemblor.metrics"], draft))
    assert "--help ensemblor.metrics.classification lists its options" in metrics
    assert "counting.of: text; required" in help_on(["ensemblor.metrics.counting"], draft)
    losses = help_on(["model.proto"], draft)
    assert "Pair " in losses
    assert "Image-report pairs." in losses
    every = help_on(["batch-size"], draft)
    assert every.count(".batch_size: integer >= 1") == 3


def test_help_without_a_file(project: Project) -> None:
    project.load()
    page = help_page("train.py", "Trains.", [])
    assert re.search(r"\n  model +.*; its proto, one of \d+, decides on the keys\n", page)
    text = help_on(["trainor.batch_size"])
    assert text.startswith("  trainor.batch_size: integer >= 1; default 32\n      samples")
    with pytest.raises(ConfigError, match=r"--help trainor\.epoch: there is no such .*epochs'"):
        help_on(["trainor.epoch"])


def test_help_without_a_file_searches_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilmedic.config.show.width", lambda: 100)
    text = help_on(["model.loss"])
    assert "with model.proto=ConVIRT:\nmodel.loss: " in text
    assert "(ConVIRTLoss)\n" in text
    assert "with model.proto=GLoRIA:\nmodel.loss: " in text
    assert "  model.loss.temp1: number" in text
    assert "with model.proto=VAE" not in text
    same = help_on(["dataset.image.resize"])
    assert same.count("dataset.image.resize: ") == 1
    assert "dataset.proto=ImLabel or dataset.proto=ImSeq or " in same
    models = help_on(["model"])
    assert re.search(r"^  VAE +The first stage", models, re.MULTILINE)
    assert models.endswith("config.yml --help model")


def test_a_misspelt_topic_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--help modle: there is no such .* mean 'model'\?"):
        help_on(["modle"])


@pytest.mark.parametrize(
    ("topic", "near"),
    [
        ("model.los", "model.loss"),
        ("model.cnn.backbon", "model.cnn.backbone"),
        ("modl.loss", "model.loss"),
        ("dataset.sequ.root", "dataset.seq.root"),
    ],
)
def test_without_a_file_all_classes_give_the_nearest_key(topic: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        help_on([topic])
    expected = f"--help {topic}: there is no such section or key. Did you mean '{near}'?"
    assert str(caught.value) == expected


def test_without_a_near_key_a_file_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="Give a configuration file as well: its proto decides"):
        help_on(["model.zzzz"])


def test_keys_are_found_by_their_last_part(project: Project) -> None:
    draft = read("base.yml")
    assert keys_named("epochs", draft) == ["trainor.epochs"]
    assert keys_named("lr", draft) == ["trainor.optim_params.lr"]
    assert keys_named("epoch", draft, near=False) == []
    assert keys_named("epoch", draft) == ["trainor.epochs"]


def test_abbreviations_do_not_end_a_sentence() -> None:
    assert first_sentence("One thing. Another.") == "One thing."
    whole = "A loss (Oord et al. 2018), e.g. of pairs, i.e. of two, as Radford et al. Have it."
    assert first_sentence(f"{whole} More.") == whole
