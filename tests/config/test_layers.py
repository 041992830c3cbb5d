from __future__ import annotations

from typing import Any

import pytest

from tests.config.conftest import Project
from vilmedic.config.layers import apply_overrides
from vilmedic.config.load import load
from vilmedic.config.tree import Mark, Tree
from vilmedic.config.yaml_source import parse_override
from vilmedic.errors import ConfigError


def test_a_new_class_drops_unknown_keys_of_lower_layers(project: Project) -> None:
    config = project.load("model.proto=Alone")
    assert config.model == {
        "proto": "Alone",
        "net": {"proto": "Net", "backbone": "small"},
        "loss": {},
    }
    assert config.notes == (
        "model.proto is now Alone (command line), which does not know: "
        "model.encoder (base.yml:10), model.loss.proto (base.yml:14), "
        "model.loss.tau (base.yml:15); left out.",
    )


def test_values_kept_by_a_new_class_are_noted() -> None:
    given = "config/phantom/convirt.yml"  # its tau is 0.1, the default of the loss is 0.07
    config = load(given, ["model.loss.proto=InfoNCELoss"])
    assert config.data["model"]["loss"] == {"tau": 0.1, "proto": "InfoNCELoss"}
    assert "(command line), which keeps: model.loss.tau=0.1 (config/" in config.notes[-1]
    assert not any(
        "keeps" in note
        for changed in (["model.loss.tau=0.2"], ["model.loss.tau=0.07"], ["~model.loss.tau"])
        for note in load(given, ["model.loss.proto=InfoNCELoss", *changed]).notes
    )


def test_the_same_layer_may_bring_the_keys_of_the_new_class(project: Project) -> None:
    config = project.load("model.proto=Alone", "model.loss.margin=2", "model.views=3")
    assert config.model["loss"] == {"margin": 2.0}
    assert config.model["views"] == 3


def test_unknown_keys_of_the_same_layer_stay_errors(project: Project) -> None:
    problem = project.problem("model.proto=Alone", "model.encoder.proto=x")
    assert problem.startswith("model.encoder (command line): unknown key")


def test_a_new_nested_class_drops_unknown_keys(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nmodel: {net: {proto: WideNet, factor: 2}}\n")
    config = project.load("model.net.proto=Net", path="c.yml")
    assert config.model["net"] == {"proto": "Net", "backbone": "small"}
    assert "model.net.factor (c.yml:2)" in config.notes[0]


def test_naming_the_same_class_again_drops_nothing(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nmodel: {net: {facto: 2}}\n")
    assert "model.net.facto (c.yml:2)" in project.problem("model.net.proto=Net", path="c.yml")


def test_files_drop_the_keys_of_what_they_include(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\ntrainor: {optimizer: SGD}\n")
    config = project.load(path="c.yml")
    assert config.trainor.optim_params == {"lr": 5e-5}
    assert config.notes == ()  # changes within files are intended
    assert config.file_notes == (
        "trainor.optimizer is now SGD (c.yml:2), which does not know: "
        "trainor.optim_params.decoupled_weight_decay (base.yml:18); left out.",
    )


def test_a_new_schedule_drops_the_options_of_the_old_one(project: Project) -> None:
    config = project.load("trainor.lr_decay=ExponentialLR", "trainor.lr_decay_params.gamma=0.9")
    assert config.trainor.lr_decay_params == {"gamma": 0.9}
    assert project.load("trainor.lr_decay=null").trainor.lr_decay_params == {}


def test_options_of_the_same_layer_stay_errors(project: Project) -> None:
    problems = project.problems("trainor.lr_decay=StepLR", "trainor.lr_decay_params.factor=1")
    assert problems[0].startswith("trainor.lr_decay_params.factor (command line): unknown key")


def test_replacing_the_default_optimizer_drops_its_options(project: Project) -> None:
    text = "includes: [base.yml]\ntrainor: {optim_params: {amsgrad: true}}\n"
    project.write("c.yml", text)
    config = project.load("~trainor.optimizer", "trainor.optimizer=SGD", path="c.yml")
    assert "amsgrad" not in config.trainor.optim_params


def test_switching_to_a_random_encoder_drops_foreign_settings(project: Project) -> None:
    project.write("local/config.json", '{"model_type": "gpt2"}')
    project.write(
        "c.yml",
        f"plugins: [{project.package}.parts]\ndataset: {{proto: Lines, root: x}}\n"
        "model: {proto: Pair, net: {backbone: x}, encoder: {proto: local, n_head: 2}}\n",
    )
    project.load(path="c.yml")
    config = project.load("model.encoder.proto=null", path="c.yml")
    assert config.model["encoder"] == {"proto": None}


def test_removing_a_schedule_drops_its_options(project: Project) -> None:
    config = project.load("~trainor.lr_decay")
    assert (config.trainor.lr_decay, config.trainor.lr_decay_params) == (None, {})
    assert config.notes == (
        "trainor.lr_decay is removed (command line), which does not know: "
        "trainor.lr_decay_params.factor (base.yml:20), trainor.lr_decay_params.patience "
        "(base.yml:20); left out.",
    )
    again = project.load(
        "~trainor.lr_decay", "trainor.lr_decay=StepLR", "trainor.lr_decay_params.step_size=2"
    )
    assert again.trainor.lr_decay_params == {"step_size": 2}


def layer(*words: str, lower: dict[str, Any] | None = None) -> tuple[Tree, Tree, list[str]]:
    below = Tree(lower or {}, {})
    made, problems = apply_overrides([parse_override(word) for word in words], below)
    return made, below, problems


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b=5e-5", {"a": {"b": 5e-5}}),
        ("a=", {"a": None}),
        ("a=b=c", {"a": "b=c"}),
        ("a=[x, 1]", {"a": ["x", 1]}),
        ("a.b={c: 1}", {"a": {"b": {"c": 1}}}),
        ("a='00123'", {"a": "00123"}),
        ("a=run #3", {"a": "run #3"}),
    ],
)
def test_an_override_sets_a_value(word: str, expected: dict[str, Any]) -> None:
    assert layer(word)[0].data == expected


@pytest.mark.parametrize(
    ("word", "raw"),
    [("a=1e3", "1e3"), ("a=true", "true"), ("a=[b]", "[b]"), ("a='1'", None), ("a=", None)],
)
def test_the_typed_text_is_kept(word: str, raw: str | None) -> None:
    mark = layer(word)[0].marks[("a",)]
    assert mark.raw == raw
    assert mark.origin == "command line"


def test_invalid_yaml_is_kept_as_text_with_a_note() -> None:
    made, _, _ = layer("a=@best")
    assert made.data == {"a": "@best"}
    assert "not valid YAML" in made.marks[("a",)].note


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("foo", "'foo' (command line): has no '='"),
        ("~a=1", "takes no value"),
        ("=1", "is not a key"),
        ("a..b=1", "is not a key"),
        ("+a=1", "is not a key"),
        ("includes=[x.yml]", "is only allowed in a file"),
    ],
)
def test_invalid_overrides_are_refused(word: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_override(word)
    assert expected in str(caught.value)


def test_overrides_apply_in_order() -> None:
    made, below, problems = layer("a.b=1", "~a", "a.c=2", lower={"a": {"x": 1}})
    assert made.data == {"a": {"c": 2}}
    assert below.data == {}
    assert not problems


def test_later_overrides_win() -> None:
    assert layer("a={b: 1, c: 2}", "a.b=3", "a.d=4")[0].data == {"a": {"b": 3, "c": 2, "d": 4}}
    assert layer("a.b=1", "a=2")[0].data == {"a": 2}
    assert layer("a=2", "a.b=1")[0].data == {"a": {"b": 1}}


def test_removing_a_missing_key_names_the_nearest() -> None:
    below = Tree({"trainor": {"lr_decay": "X"}}, {("trainor", "lr_decay"): Mark("c.yml:1")})
    _, problems = apply_overrides([parse_override("~trainor.lr_deca")], below)
    assert problems == [
        "~trainor.lr_deca (command line): there is no such key to remove. "
        "Did you mean 'trainor.lr_decay'?"
    ]


def test_one_entry_of_a_list_can_be_set() -> None:
    lower = {"a": [{"b": 1, "c": 2}, "x"]}
    made, below, problems = layer("a.0.b=5", "a.1=y", lower=lower)
    assert made.data == {"a": [{"b": 5, "c": 2}, "y"]}
    assert below.data == {"a": [{"b": 1, "c": 2}, "x"]}
    assert not problems


def test_an_index_beyond_the_list_is_reported() -> None:
    _, _, problems = layer("a.2=5", lower={"a": [1, 2]})
    assert problems == ["a.2 (command line): '2' is no index of the list 'a'. Allowed: 0 to 1."]


@pytest.mark.parametrize(
    "text", ["#x", "# a report", "- No effusion.", "&x", "--- x", "!x", "run #3", "a: b", "[a] b"]
)
def test_text_keys_take_the_raw_text(text: str) -> None:
    made, _, _ = layer(f"a={text}")
    assert text in (made.data["a"], made.marks[("a",)].raw)


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_null_is_spelt_as_in_yaml(text: str) -> None:
    assert layer(f"a={text}")[0].data == {"a": None}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.b=1", "a={c: 2}"], {"c": 2}),
        (["a={c: 2}", "a.b=1"], {"c": 2, "b": 1}),
        (["a=null", "a.b=1"], {"b": 1}),
        (["a.b=1", "a={}"], {}),
    ],
)
def test_a_later_whole_section_replaces_earlier_overrides(
    words: list[str], expected: dict[str, Any]
) -> None:
    made, _, _ = layer(*words)
    assert made.data == {"a": expected}
    assert made.marks[("a",)].whole
