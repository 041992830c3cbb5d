from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.config.conftest import PACKAGE, Project
from vilmedic.config import build, build_calls
from vilmedic.config.check import Checker
from vilmedic.config.load import load
from vilmedic.config.sections import TrainorSection
from vilmedic.errors import ConfigError
from vilmedic.registry import BLOCKS, DATASETS, METRICS, MODELS


def test_sections_are_typed_and_nodes_stay_mappings(project: Project) -> None:
    config = project.load("trainor.batch_size=4", "trainor.clip_grad_norm=1")
    assert isinstance(config.trainor, TrainorSection)
    assert config.trainor.batch_size == 4
    assert isinstance(config.trainor.clip_grad_norm, float)
    assert config.trainor.optim_params == {"lr": 5e-5, "decoupled_weight_decay": True}
    assert config.validator.splits == ["validate"]
    assert config.ensemblor.metrics == {"retrieval": {}}
    assert config.dataset == {"proto": "Lines", "root": "data"}
    assert config.model["net"]["backbone"] == "small"
    assert config.overrides == ("trainor.batch_size=4", "trainor.clip_grad_norm=1")


def test_the_run_is_named_after_the_file(project: Project) -> None:
    assert project.load().name == "base"
    config = project.load("name=other", "ckpt_dir=runs")
    assert config.run_dir == Path("runs/other")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("name=00123", "00123"),
        ("name=no", "no"),
        ("name=1e3", "1e3"),
        ("name=true", "true"),
        ('name="007"', "007"),
        ("name=run #3", "run #3"),
        ("name=@x", "@x"),
        ("name=[a]", "[a]"),
        ("name=#x", "#x"),
        ("name=# a report", "# a report"),
    ],
)
def test_text_values_keep_the_typed_text(project: Project, word: str, name: str) -> None:
    assert project.load(word).name == name


def test_text_values_in_a_file_keep_the_typed_text(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nname: 1e3\nckpt_dir: 08.50\n")
    config = project.load(path="c.yml")
    assert (config.name, config.run.ckpt_dir) == ("1e3", "08.50")


def test_command_line_overrides_file_overrides_includes(project: Project) -> None:
    project.write("parts/low.yml", "trainor: {epochs: 1, keep: 1, seed: 1, batch_size: 1}\n")
    project.write(
        "parts/mid.yml", "includes: [low.yml, ../base.yml]\ntrainor: {keep: 2, seed: 2}\n"
    )
    project.write("top.yml", "includes: parts/mid.yml\ntrainor:\n  seed: 3\n")
    config = project.load("trainor.batch_size=4", path="top.yml")
    section = config.trainor
    assert (section.epochs, section.keep, section.seed, section.batch_size) == (1, 2, 3, 4)
    assert config.origins["trainor.epochs"] == "parts/low.yml:1"
    assert config.origins["trainor.keep"] == "parts/mid.yml:2"
    assert config.origins["trainor.seed"] == "top.yml:3"
    assert config.origins["trainor.batch_size"] == "command line"
    assert config.origins["model.net.backbone"] == "base.yml:9"


def test_an_include_cycle_is_shown_as_a_chain(project: Project) -> None:
    project.write("a.yml", "includes: [b.yml]\n")
    project.write("b.yml", "includes:\n  - a.yml\n")
    problem = project.problem(path="a.yml")
    assert problem == ("includes (b.yml:2): the files include each other: a.yml -> b.yml -> a.yml.")


def test_a_file_may_be_included_twice(project: Project) -> None:
    project.write("a.yml", "includes: [base.yml]\n")
    project.write("b.yml", "includes: [base.yml]\n")
    project.write("c.yml", "includes: [a.yml, b.yml]\n")
    assert project.load(path="c.yml").name == "c"


def test_includes_are_searched_beside_the_file_then_in_the_working_directory(
    project: Project,
) -> None:
    project.write("parts/low.yml", "includes: [../base.yml]\ntrainor: {epochs: 1}\n")
    project.write("parts/top.yml", "includes:\n  - parts/low.yml\n")
    config = project.load(path="parts/top.yml")
    assert config.trainor.epochs == 1
    assert config.notes == (
        "includes (parts/top.yml:2): 'parts/low.yml' is not beside the file; it is taken from the "
        "working directory.",
    )
    project.write("parts/parts/low.yml", "includes: [../../base.yml]\ntrainor: {epochs: 2}\n")
    config = project.load(path="parts/top.yml")
    assert (config.trainor.epochs, config.notes) == (2, ())


def test_a_missing_include_names_the_nearest(project: Project) -> None:
    project.write("parts/low.yml", "trainor: {epochs: 1}\n")
    project.write("parts/top.yml", "includes:\n  - parts/lwo.yml\n")
    assert project.problem(path="parts/top.yml") == (
        "includes (parts/top.yml:2): there is no file 'parts/lwo.yml'. Did you mean "
        "'parts/low.yml'?"
    )


def test_an_include_cycle_through_the_working_directory_is_found(project: Project) -> None:
    project.write("parts/a.yml", "includes: [parts/b.yml]\n")
    project.write("parts/b.yml", "includes: [parts/a.yml]\n")
    assert "the files include each other: parts/a.yml -> parts/b.yml" in project.problem(
        path="parts/a.yml"
    )


def test_a_missing_file_names_the_nearest(project: Project) -> None:
    assert project.problem(path="bas.yml") == (
        "there is no file 'bas.yml'. Did you mean 'base.yml'?"
    )
    project.write("a.yml", "# text\nincludes: [bose.yml]\n")
    assert project.problem(path="a.yml") == (
        "includes (a.yml:2): there is no file 'bose.yml'. Did you mean 'base.yml'?"
    )
    assert "'.' is a folder" in project.problem(path=".")
    assert "no folder 'confg'" in project.problem(path="confg/a.yml")
    project.write("c/base.yml", "trainor: {epochs: 1}\n")
    assert project.problem(path="c/bsae.yml").endswith("Did you mean 'c/base.yml'?")
    assert project.problem(path="c/unlike.yml").endswith("Allowed: c/base.yml.")
    project.write("b.yml", "includes: {a: 1}\n")
    assert "includes (b.yml:1): given" in project.problem(path="b.yml")


def test_a_missing_file_without_its_folder_names_the_path(project: Project) -> None:
    for name in ("config/phantom/convirt.yml", "config/SELFSUP/gloria-mimic.yml"):
        project.write(name, "trainor: {epochs: 1}\n")
    meant = "Did you mean 'config/phantom/convirt.yml'?"
    for given in (
        "convirt.yml",
        "phantom/convirt.yml",
        "config/convirt.yml",
        "confg/phantom/convirt.yml",
        "config/phantm/convirt.yml",
        "config/phantom/convrit.yml",
    ):
        assert project.problem(path=given).endswith(meant), given
    assert "Did you mean" not in project.problem(path="unlike.yml")
    project.write("a.yml", "includes: [sub/lwo.yml]\n")
    project.write("sub/low.yml", "trainor: {epochs: 1}\n")
    assert project.problem(path="a.yml").endswith("Did you mean 'sub/low.yml'?")


def test_a_key_under_null_or_a_value_becomes_a_mapping(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nvalidator:\nensemblor: ${validator}\n")
    assert project.load("validator.batch_size=2", path="c.yml").validator.batch_size == 2
    project.write("d.yml", "includes: [base.yml]\nmodel: 3\n")
    problems = project.problems("model.proto=Alone", path="d.yml")
    assert problems[0].startswith("model.net: missing under 'model' (command line)")


def test_lists_and_mappings_replace_each_other(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nensemblor: {metrics: [retrieval]}\n")
    config = project.load("ensemblor.metrics={counting: {of: x}}", path="c.yml")
    assert config.ensemblor.metrics == {
        "counting": {
            "of": "x",
        }
    }
    config = project.load("ensemblor.metrics.counting.of=x", "ensemblor.metrics=[retrieval]")
    assert config.ensemblor.metrics == ["retrieval"]


def test_metrics_of_layers_are_merged_by_name(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nensemblor: {metrics: {counting: {of: x}}}\n")
    config = project.load(
        "ensemblor.metrics.counting.often=3", "ensemblor.metrics.retrieval=", path="c.yml"
    )
    assert config.ensemblor.metrics == {"counting": {"of": "x", "often": 3}, "retrieval": {}}


SECTIONS = """includes: [base.yml]
trainor: {loggers: [tensorboard, {wandb: {project: a, group: b}}]}
validator:
  metrics: {counting: {of: x, often: 2}, retrieval: }
  post_processing: {save_representation: , plot_reconstruction: {num_samples: 2}}
ensemblor:
  metrics: {counting: {of: x, often: 2}, retrieval: }
  post_processing: [save_representation, plot_reconstruction: {num_samples: 2}]
dataset:
  augment: [{ColorJitter: {brightness: 0.1, contrast: 0.2}}, RandomAutocontrast]
"""


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("ensemblor.metrics={counting: {of: y}}", {"counting": {"of": "y"}}),
        ("ensemblor.metrics=[counting: {of: y}]", [{"counting": {"of": "y"}}]),
        ("ensemblor.metrics.counting={of: y}", {"counting": {"of": "y"}, "retrieval": {}}),
        ("ensemblor.metrics.counting.of=y", {"counting": {"of": "y", "often": 2}, "retrieval": {}}),
        ("validator.metrics={retrieval: }", {"retrieval": {}}),
        ("validator.post_processing={save_representation: }", {"save_representation": {}}),
        ("ensemblor.post_processing={plot_reconstruction: }", {"plot_reconstruction": {}}),
        ("trainor.loggers={wandb: {project: c}}", [{"wandb": {"project": "c"}}]),
        (
            "trainor.loggers.1.wandb.project=c",
            ["tensorboard", {"wandb": {"project": "c", "group": "b"}}],
        ),
        ("dataset.augment={RandomAutocontrast: }", [{"RandomAutocontrast": {}}]),
        ("dataset.augment.1=Grayscale", [{"ColorJitter": {"brightness": 0.1, "contrast": 0.2}}]),
        ("trainor.optim_params={lr: 1}", {"lr": 1.0}),
        ("trainor.optim_params={lr: 2}", {"lr": 2.0}),
        ("trainor.optim_params.lr=1", {"lr": 1.0, "decoupled_weight_decay": True}),
        ("model.loss={proto: Near}", {"proto": "Near"}),
    ],
)
def test_a_whole_section_replaces_and_a_nested_key_merges(
    project: Project, word: str, expected: object
) -> None:
    project.write("c.yml", SECTIONS)
    config = project.load(word, path="c.yml")
    parts = word.partition("=")[0].split(".")
    found = config.data[parts[0]][parts[1]]
    if word.startswith("dataset.augment.1"):
        assert found == [*expected, "Grayscale"]  # type: ignore[misc]
    else:
        assert found == expected


@pytest.mark.parametrize("empty", ["null", "{}", "[]"])
@pytest.mark.parametrize(
    "key",
    [
        "ensemblor.metrics",
        "ensemblor.post_processing",
        "validator.metrics",
        "validator.post_processing",
        "trainor.loggers",
        "dataset.augment",
    ],
)
def test_null_and_empty_brackets_empty_a_section(project: Project, key: str, empty: str) -> None:
    project.write("c.yml", SECTIONS)
    section, name = key.split(".")
    assert not project.load(f"{key}={empty}", path="c.yml").data[section][name]


def test_null_in_a_file_empties_a_section(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nensemblor: {metrics: null, post_processing: }\n")
    section = project.load(path="c.yml").ensemblor
    assert (section.metrics, section.post_processing) == ({}, {})
    project.write("d.yml", "includes: [base.yml]\ntrainor: {optim_params: null}\n")
    assert project.load("trainor.lr_decay_params=null", path="d.yml").trainor.lr_decay_params == {}


def test_entries_dropped_by_a_whole_section_are_reported(project: Project) -> None:
    project.write("c.yml", SECTIONS)
    config = project.load("validator.metrics={counting: {of: y}}", path="c.yml")
    assert config.notes == (
        "validator.metrics is given whole (command line), which leaves out: "
        "validator.metrics.retrieval (c.yml:4). A key inside, such as "
        "validator.metrics.retrieval=..., changes nothing else.",
    )
    assert project.load("validator.metrics.counting={of: y, often: 3}", path="c.yml").notes == ()


def test_a_whole_section_replaces_an_interpolation(project: Project) -> None:
    text = "includes: [base.yml]\nvalidator: {metrics: {retrieval: }}\nensemblor:\n"
    project.write("c.yml", text + "  metrics: ${validator.metrics}\n")
    config = project.load("ensemblor.metrics={counting: {of: x}}", path="c.yml")
    assert config.ensemblor.metrics == {"counting": {"of": "x"}}
    config = project.load("ensemblor.metrics.counting.of=x", path="c.yml")
    assert set(config.ensemblor.metrics) == {"retrieval", "counting"}


def test_a_nested_key_adds_to_the_default_section(project: Project) -> None:
    assert project.load("ensemblor.metrics.counting.of=x").ensemblor.metrics == {
        "retrieval": {},
        "counting": {"of": "x"},
    }
    assert project.load("~ensemblor.metrics.retrieval").ensemblor.metrics == {}
    assert project.load("trainor.loggers.0=wandb").trainor.loggers == ["wandb"]
    assert project.load().origins.get("ensemblor.metrics") is None


def test_a_key_can_be_removed(project: Project) -> None:
    assert project.load("~trainor.lr_decay", "~trainor.lr_decay_params").trainor.lr_decay is None
    assert "model.net.backbone: missing" in project.problem("~model.net.backbone")


def test_interpolations_reach_values_and_defaults(project: Project) -> None:
    config = project.load(
        "dataset.root=${ckpt_dir}/${name}",
        "validator.batch_size=${trainor.batch_size}",
        "name=${model.proto}-${trainor.epochs}",
    )
    assert config.dataset["root"] == "ckpt/Pair-99"
    assert config.validator.batch_size == 32
    assert project.load("name=${trainor.keep}").name == "3"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("name=${modell.proto}", "name (command line): given '${modell.proto}'; interpolation key"),
        ("name=${model.prot}", "Did you mean 'model.proto'?"),
        ("name=${name}", "name (command line): cannot be resolved"),
        ("name=${a", "name (command line): given '${a', which is no valid interpolation."),
        ("name=???", "name (command line): has to be given a value (it is ???)."),
        ("name=${nothing:1}", "Unsupported interpolation type nothing"),
        (
            "model.net=${model}",
            "(command line): cannot be resolved: Interpolation to parent",
        ),
    ],
)
def test_a_bad_interpolation_is_reported_with_its_origin(
    project: Project, word: str, expected: str
) -> None:
    assert any(expected in problem for problem in project.problems(word))


def test_interpolation_cycles_are_found(project: Project) -> None:
    project.write("c.yml", "a: {x: '${b}', z: '${b}'}\nb: {y: '${a}', w: '${a}'}\n")
    problems = project.problems(path="c.yml")
    assert any("(c.yml:1)" in text and "contains itself" in text for text in problems)


def test_an_overridden_bad_interpolation_is_ignored(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\nname: ${a\n")
    assert "c.yml:2" in project.problem(path="c.yml")
    assert project.load("name=x", path="c.yml").name == "x"


def test_the_resolved_configuration_is_read_back_the_same(project: Project) -> None:
    config = project.load("name=007", "dataset.root=${name}/x", "trainor.optim_params.eps=1e-8")
    project.write("again.yml", config.to_yaml())
    again = load("again.yml")
    assert again.data == config.data
    assert again.name == "007"
    assert again.data["dataset"]["root"] == "007/x"


def test_plugins_that_cannot_be_imported_are_reported(project: Project) -> None:
    problems = project.problems(f"plugins=[{project.package}.parts,no_such_module]")
    assert problems == [
        "plugins (command line): cannot import 'no_such_module': "
        "ModuleNotFoundError: No module named 'no_such_module'"
    ]


def test_all_problems_are_reported_together(project: Project) -> None:
    problems = project.problems(
        "foo", "trainor.batchsize=3", "~nothing", "model.net.freeze=3", "name=${x}"
    )
    assert len(problems) == 5


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


def test_values_are_converted_to_the_annotated_types(project: Project) -> None:
    words = ["model.sides=[1,2]", "model.where=a/b", "model.parts=[{tau: 1}, {tau: 2}]"]
    model = build(MODELS, project.load(*words).model, spec=None)
    assert model.given["sides"] == (1, 2)
    assert model.given["where"] == Path("a/b")
    assert [part.given["tau"] for part in model.given["parts"]] == [1.0, 2.0]


def test_proto_selects_another_class(project: Project) -> None:
    config = project.load("model.net.proto=WideNet", "model.net.factor=5", "model.net.width=3")
    net = build(MODELS, config.model, spec=None).given["net"]
    assert type(net).__name__ == "WideNet"
    assert (net.factor, net.given["width"]) == (5, 3)


def test_runtime_arguments_are_passed_only_if_declared(project: Project) -> None:
    dataset = build(DATASETS, project.load().dataset, split="train", run_dir=3)
    assert dataset.given == {"root": Path("data"), "split": "train", "seed": 0, "augment": None}


def test_a_misspelt_runtime_name_is_an_error(project: Project) -> None:
    dataset = project.load().dataset
    allowed = "build gives split, training, seed, run_dir to a dataset, not splits"
    with pytest.raises(TypeError, match=allowed):
        build(DATASETS, dataset, split="train", splits=3)
    with pytest.raises(TypeError, match="build gives nothing to a metric, not spec"):
        build_calls(METRICS, {"counting": {"of": "a"}}, spec=None)


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        (
            "@MODELS.register('Typo')\nclass Typo:\n"
            "    def __init__(self, *, net: Net, spce: Runtime[object] = None): ...",
            ("model.proto=Typo",),
            r"model .*Typo has the argument 'spce: Runtime\[...\]', which the framework does not "
            r"give to what it builds of a model. Allowed: spec, filled, read_encoder. Did you mean "
            r"'spec'\?$",
        ),
        (
            "@LOSSES.register('Typo')\nclass Typo(Near):\n"
            "    def __init__(self, *, split: Runtime[str]): ...",
            ("model.loss.proto=Typo",),
            r"model.loss .*'split: Runtime\[...\]'.*a model. Allowed: spec, filled, read_encoder.$",
        ),
        (
            "@METRICS.register('typo')\nclass Typo:\n"
            "    def __init__(self, *, spec: Runtime[object]): ...",
            ("ensemblor.metrics={typo: }",),
            r"ensemblor.metrics.typo .*'spec: Runtime\[...\]'.*a metric. Allowed: none.$",
        ),
    ],
)
def test_unknown_runtime_arguments_of_a_class_are_refused(
    project: Project, code: str, words: tuple[str, ...], expected: str
) -> None:
    project.write(f"{project.package}/parts.py", f"{PACKAGE}\n\n{code}\n")
    found = [one for one in project.problems(*words) if "Runtime" in one]
    assert len(found) == 1
    assert re.match(expected, found[0]), found[0]


def test_nested_classes_get_the_same_runtime_arguments(project: Project) -> None:
    code = (
        "@LOSSES.register('Asks')\nclass Asks(Near):\n"
        "    def __init__(self, *, spec: Runtime[object]):\n        self.spec = spec\n"
    )
    project.write(f"{project.package}/parts.py", f"{PACKAGE}\n\n{code}")
    config = project.load("model.loss.proto=Asks")
    assert build(MODELS, config.model, spec=3).given["loss"].spec == 3


def test_a_configuration_is_checked_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    section = Checker.section

    def counted(self: Checker, read: Any, given: Any, path: Any, **options: Any) -> Any:
        if not self.trying:
            checked.append(".".join(map(str, path)))
        return section(self, read, given, path, **options)

    monkeypatch.setattr(Checker, "section", counted)
    words = ["validator.metrics={counting: {of: a}}", "model.parts=[{tau: 1}, {tau: 2}]"]
    config = project.load(*words)
    for _ in range(2):
        build(DATASETS, config.dataset, split="train")
        build(MODELS, config.model, spec=None)
        build_calls(METRICS, config.calls("validator", "metrics"))
    assert {"dataset", "model", "model.net", "model.parts.1"} < set(checked)
    assert "validator.metrics.counting" in checked
    assert sorted(checked) == sorted(set(checked))


def test_a_changed_node_is_checked_again(project: Project) -> None:
    node = project.load().model
    node["sides"] = "x"
    assert "model.sides" in refused(MODELS, node, spec=None)


def test_errors_in_metric_constructors_name_their_place(project: Project) -> None:
    project.write("calls.yml", "includes: [base.yml]\nvalidator:\n  metrics:\n    picky:\n")
    config = project.load(path="calls.yml")
    with pytest.raises(ConfigError) as caught:
        build_calls(METRICS, config.calls("validator", "metrics"))
    assert str(caught.value) == (
        "validator.metrics.picky (calls.yml:4): Picky refuses it: there is no table"
    )


def test_a_plain_mapping_is_checked_as_well(project: Project) -> None:
    project.load()
    assert refused(BLOCKS, {"proto": "Net", "backbon": "x"}) == (
        "block.backbon: unknown key, given 'x'. Did you mean 'block.backbone'? Allowed under "
        "'block': backbone, permute, freeze, dropout, width, proto.\n"
        "block.backbone: missing under 'block'; allowed: text."
    )
    assert "there is no block named 'Nope'" in refused(BLOCKS, {"proto": "Nope"})


def test_errors_in_constructors_name_the_section(project: Project) -> None:
    config = project.load("model.loss.tau=-1")
    assert refused(MODELS, config.model, spec=None) == (
        "model.loss (base.yml:13): Near refuses it: tau has to be above 0"
    )


def test_argument_errors_name_the_key(project: Project) -> None:
    config = project.load("model.proto=Wary", "~model.encoder", "~model.loss")
    assert refused(MODELS, config.model) == (
        "model.net.backbone (base.yml:9): given 'small', which is too small\n"
        "model (base.yml:5): cannot be made"
    )


def test_metrics_are_built_in_order(project: Project) -> None:
    project.load()
    calls = [{"counting": {"of": "a"}}, {"counting": {"of": "b", "often": 2}}]
    made = build_calls(METRICS, calls, "ensemblor.metrics")
    assert [name for name, _ in made] == ["counting", "counting"]
    assert [one.given["of"] for _, one in made] == ["a", "b"]
    with pytest.raises(ConfigError, match=r"ensemblor\.metrics\.counting\.of: missing"):
        build_calls(METRICS, {"counting": None}, "ensemblor.metrics")
