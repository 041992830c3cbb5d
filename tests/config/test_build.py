from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic.config.build import build, build_calls
from vilmedic.errors import ConfigError
from vilmedic.registry import BLOCKS, DATASETS, METRICS, MODELS


def refused(registry: object, node: dict[str, object], **runtime: object) -> str:
    with pytest.raises(ConfigError) as caught:
        build(registry, node, **runtime)  # type: ignore[arg-type]
    return str(caught.value)


def test_nodes_inside_a_node_are_built_first(project: Project) -> None:
    model = build(MODELS, project.load("model.encoder.hidden_size=32").model, spec="the spec")
    assert type(model).__name__ == "Pair"
    assert type(model.given["net"]).__name__ == "Net"
    assert model.given["net"].given["backbone"] == "small"
    assert model.given["loss"].given == {"tau": 0.5}
    assert model.given["encoder"].given == {
        "proto": None,
        "spec": "the spec",
        "settings": {"hidden_size": 32},
    }
    assert model.given["spec"] == "the spec"


def test_missing_keys_keep_the_defaults_of_the_code(project: Project) -> None:
    model = build(MODELS, project.load("~model.loss").model, spec=None)
    assert model.given["sides"] == 4
    assert model.given["loss"].given == {"tau": 0.1}


def test_values_become_what_the_signature_says(project: Project) -> None:
    words = ["model.sides=[1,2]", "model.where=a/b", "model.parts=[{tau: 1}, {tau: 2}]"]
    model = build(MODELS, project.load(*words).model, spec=None)
    assert model.given["sides"] == (1, 2)
    assert model.given["where"] == Path("a/b")
    assert [part.given["tau"] for part in model.given["parts"]] == [1.0, 2.0]


def test_proto_names_another_class_of_the_kind(project: Project) -> None:
    config = project.load("model.net.proto=WideNet", "model.net.factor=5", "model.net.width=3")
    net = build(MODELS, config.model, spec=None).given["net"]
    assert type(net).__name__ == "WideNet"
    assert (net.factor, net.given["width"]) == (5, 3)


def test_runtime_arguments_reach_only_who_asks_for_them(project: Project) -> None:
    dataset = build(DATASETS, project.load().dataset, split="train", other=3)
    assert dataset.given == {"root": Path("data"), "split": "train", "seed": 0, "augment": None}


def test_a_plain_mapping_is_checked_as_well(project: Project) -> None:
    project.load()
    assert refused(BLOCKS, {"proto": "Net", "backbon": "x"}) == (
        "block.backbon: unknown key, given 'x'; allowed under 'block': backbone, permute, "
        "freeze, dropout, width, proto. Did you mean 'block.backbone'?\n"
        "block.backbone: missing under 'block'; allowed: text."
    )
    assert "there is no block named 'Nope'" in refused(BLOCKS, {"proto": "Nope"})


def test_what_a_constructor_refuses_names_the_key(project: Project) -> None:
    config = project.load("model.loss.tau=-1")
    assert refused(MODELS, config.model, spec=None) == (
        "model.loss (base.yml:13): Near refuses it: tau has to be above 0"
    )


def test_named_calls_are_built_in_their_order(project: Project) -> None:
    project.load()
    calls = [{"counting": {"of": "a"}}, {"counting": {"of": "b", "often": 2}}]
    made = build_calls(METRICS, calls, "ensemblor.metrics")
    assert [name for name, _ in made] == ["counting", "counting"]
    assert [one.given["of"] for _, one in made] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"ensemblor\.metrics\.counting\.of: missing"):
        build_calls(METRICS, {"counting": None}, "ensemblor.metrics")
