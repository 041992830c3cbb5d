from __future__ import annotations

from tests.config.conftest import Project


def test_a_new_class_drops_what_it_does_not_know(project: Project) -> None:
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


def test_the_same_layer_may_bring_the_keys_of_the_new_class(project: Project) -> None:
    config = project.load("model.proto=Alone", "model.loss.margin=2", "model.views=3")
    assert config.model["loss"] == {"margin": 2.0}
    assert config.model["views"] == 3


def test_unknown_keys_of_the_same_layer_stay_errors(project: Project) -> None:
    problem = project.problem("model.proto=Alone", "model.encoder.proto=x")
    assert problem.startswith("model.encoder (command line): unknown key")


def test_a_new_class_deeper_down_drops_as_well(project: Project) -> None:
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
    assert config.notes == (
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


def test_replacing_the_default_optimizer_drops_as_well(project: Project) -> None:
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
