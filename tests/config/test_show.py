from __future__ import annotations

import yaml

from tests.config.conftest import Project
from vilmedic.config.load import read
from vilmedic.config.show import first_sentence, help_text, print_config


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


def test_help_lists_every_key_of_the_resolved_schema(project: Project) -> None:
    text = help_text("usage", read("base.yml", ["model.net.width=5", "trainor.epochs=7"]))
    for expected in (
        "usage\n",
        "  model.net.width: an integer >= 1; default 8; now 5 (command line)",
        "  model.net.backbone: text; required; now small (base.yml:9)\n      what it is made of.",
        "  model.net.permute: one of batch_first, none; default batch_first",
        "  model.encoder.hidden_size: an integer from 1 to 65536; default 768; now 64 (base.yml:1",
        "  trainor.epochs: an integer >= 0; default 99; now 7 (command line)",
        "  trainor.optim_params.decoupled_weight_decay: true or false; default false; now true",
        "  trainor.lr_decay_params.threshold_mode: one of rel, abs; default rel",
        "  ensemblor.metrics.counting.of: text; required",
        "      Pair: Images beside reports.",
    ):
        assert expected in text
    assert "model.spec" not in text


def test_help_without_a_file_lists_the_names(project: Project) -> None:
    project.load()
    text = help_text("usage", None)
    assert "Needs proto, one of: Alone, " in text
    assert "  trainor.batch_size: an integer >= 1; default 32\n      samples" in text
    assert "; now " not in text


def test_long_docs_are_cut() -> None:
    assert first_sentence("One thing. Another.") == "One thing."
    assert len(first_sentence("word " * 100)) <= 200
