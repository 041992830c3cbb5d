from __future__ import annotations

import json

import pytest

from tests.config.conftest import Project


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "trainor.batchsize=3",
            "trainor.batchsize (command line): unknown key, given 3. "
            "Did you mean 'trainor.batch_size'? Allowed under 'trainor': ",
        ),
        ("batch_size=3", "Allowed at the top level: name, ckpt_dir,"),
        ("batch_size=3", "Did you mean 'trainor.batch_size'?"),
        ("trainor.backbone=x", "Did you mean 'model.net.backbone'?"),
        ("backbon=x", "Did you mean 'model.net.backbone'?"),
        ("model.net.Backbone=x", "Did you mean 'model.net.backbone'?"),
        ("model.spec=3", "model.spec (command line): is given by the framework"),
        ("model.encoder.hidden_sise=3", "Did you mean 'model.encoder.hidden_size'?"),
        ("trainor.optim_params.lrr=3", "Did you mean 'trainor.optim_params.lr'?"),
        ("trainor.optim_params.params=3", "unknown key, given 3"),
        ("trainor.lr_decay_params.patiense=3", "Did you mean 'trainor.lr_decay_params.patience'?"),
    ],
)
def test_an_unknown_key_names_the_allowed_and_the_nearest(
    project: Project, word: str, expected: str
) -> None:
    assert expected in project.problem(word)


def test_the_origin_of_a_key_in_a_file_is_its_line(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\ntrainor:\n  epochs: 3\n  batchsize: 4\n")
    assert project.problem(path="c.yml").startswith("trainor.batchsize (c.yml:4): unknown key")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainor.epochs=abc", "given 'abc'; allowed: integer >= 0."),
        ("trainor.epochs=1e3", "given 1000.0; allowed: integer"),
        ("trainor.epochs=1e3", "Did you mean '1000'?"),
        ("trainor.epochs=5.0", "Did you mean '5'?"),
        ("trainor.epochs=2.5", "given 2.5; allowed: integer >= 0."),
        ("trainor.epochs=true", "given true; allowed: integer"),
        ("trainor.epochs=", "given null; allowed: integer"),
        ("trainor.epochs=[1", "not valid YAML"),
        ("trainor.batch_size=0", "given 0; allowed: integer >= 1."),
        ("trainor.clip_grad_norm=-1", "given -1; allowed: number > 0 and <= 1000000, or null."),
        ("trainor.optim_params.lr=x", "given 'x'; allowed: number > 0 and <= 1000."),
        (
            "trainor.optim_params.betas=[0.9]",
            "given [0.9]; allowed: list of 2 numbers >= 0 and < 1.",
        ),
        ("trainor.optim_params.betas=[0.9,x]", "trainor.optim_params.betas.1 (command line): giv"),
        (
            "trainor.precision=fp166",
            "given 'fp166'; allowed: one of fp32, bf16, fp16, auto. Did you mean",
        ),
        ("ensemblor.mode=best-0", "given 'best-0'; allowed: best-1, best-N or all."),
        ("ensemblor.splits=test", "given 'test'; allowed: list of text."),
        ("model.net.freeze=no", "given 'no'; allowed: true or false. Did you mean 'false'?"),
        ("model.net.freeze=1", "given 1; allowed: true or false."),
        ("model.net.permute=batchfirst", "Did you mean 'batch_first'?"),
        ("model.net=3", "given 3; allowed: mapping with backbone (needed), permute,"),
        ("model.sides=[1,2,3]", "allowed: list of 2 integers."),
        ("model.sides=x", "allowed: integer or list of 2 integers."),
        ("model=3", "given 3; allowed: mapping with a proto, one of Alone, "),
        ("trainor=[1]", "given [1]; allowed: mapping with optimizer, optim_params,"),
        ("ckpt_dir=", "given null; allowed: text."),
        ("model.encoder.hidden_size=big", "given 'big'; allowed: integer from 1 to 65536."),
    ],
)
def test_a_value_of_the_wrong_type_names_what_is_allowed(
    project: Project, word: str, expected: str
) -> None:
    problem = project.problem(word)
    assert expected in problem
    assert "(command line)" in problem


@pytest.mark.parametrize(
    "word",
    [
        "trainor.clip_grad_norm=1",
        "trainor.clip_grad_norm=null",
        "trainor.optim_params.betas=[0.9, 0.99]",
        "trainor.optim_params.foreach=true",
        "trainor.optim_params={}",
        "model.sides=[1, 2]",
        "model.sides=7",
        "model.pretrained=/some/file",
        "model.where=/some/folder",
        "model.parts=[{tau: 1}, {proto: Near}]",
        "model.encoder.pad_token_id=0",
        "model.encoder.num_labels=3",
        "model.encoder.dtype=float32",
        "model.net.proto=WideNet",
        "ensemblor.mode=best-12",
        "ensemblor.mode=all",
        "ensemblor.baselines=[untrained]",
        "dataset.augment=[{RandomRotation: {degrees: 20}}, RandomInvert, {Resize: {size: 8}}]",
        "dataset.augment=[{RandomApply: {p: 0.5, transforms: [{ColorJitter: {hue: 0.1}}]}}]",
    ],
)
def test_valid_values_pass(project: Project, word: str) -> None:
    project.load(word)


def test_keys_follow_a_class_chosen_on_the_command_line(project: Project) -> None:
    project.load("model.net.proto=WideNet", "model.net.factor=3", "model.net.freeze=true")
    assert "unknown key, given 3" in project.problem("model.net.factor=3")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.proto=Pairs", "model.proto (command line): there is no model named 'Pairs'."),
        ("model.proto=Pairs", "Did you mean 'Pair'?"),
        ("model.proto=", "model.proto (command line): missing: the name of a model is needed"),
        ("model.net.proto=Nett", "there is no block named 'Nett'."),
        ("trainor.optimizer=Radam", "there is no 'Radam' in torch.optim. Allowed: ASGD, Adadelta,"),
        ("trainor.optimizer=Radam", "Did you mean 'RAdam'?"),
        ("trainor.optimizer=Optimizer", "there is no 'Optimizer' in torch.optim."),
        ("trainor.lr_decay=LambdaLR", "takes a function or an object"),
        ("trainor.lr_decay=SequentialLR", "takes a function or an object"),
        ("trainor.lr_decay=Counter", "there is no 'Counter' in torch.optim.lr_scheduler."),
        ("ensemblor.metrics.count=", "there is no metric named 'count'."),
        ("dataset.augment=[Lambda]", "Lambda takes a function or an object"),
        ("dataset.augment=[Flip]", "there is no 'Flip' in torchvision.transforms.v2."),
        ("dataset.augment=[{Resize: {sise: 8}}]", "augment.0.Resize.sise (command line): unknown"),
        ("dataset.augment=[3]", "dataset.augment.0 (command line): given 3; allowed: a name, or"),
        ("ensemblor.metrics.counting=3", "given 3; allowed: mapping with of, often."),
    ],
)
def test_an_unknown_name_lists_the_names(project: Project, word: str, expected: str) -> None:
    assert any(expected in problem for problem in project.problems(word))


def test_missing_required_keys_are_reported_with_their_place(project: Project) -> None:
    assert project.problem("~model.net.backbone") == (
        "model.net.backbone: missing under 'model.net' (base.yml:7); allowed: text."
    )
    assert project.problem("~dataset").startswith(
        "dataset: missing at the top level; allowed: mapping with a proto, one of "
    )
    assert project.problem("ensemblor.metrics.counting.often=2").startswith(
        "ensemblor.metrics.counting.of: missing under 'ensemblor.metrics.counting'"
    )
    problem = project.problem("trainor.lr_decay=StepLR")
    assert problem.startswith("trainor.lr_decay_params.step_size: missing")


def test_a_part_without_required_keys_may_be_missing(project: Project) -> None:
    assert "loss" not in project.load("~model.loss").model


def test_options_without_a_name_are_refused(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\ntrainor: {lr_decay: , lr_decay_params: {a: 1}}\n")
    assert project.problem(path="c.yml") == (
        "trainor.lr_decay_params.a (c.yml:2): given 1; no option is allowed while "
        "'trainor.lr_decay' is null."
    )


def test_keys_set_by_the_framework_may_be_missing(project: Project) -> None:
    project.load("trainor.lr_decay=CosineAnnealingLR", "trainor.lr_decay_params.eta_min=0")


def test_settings_of_a_local_folder_are_checked_by_its_model_type(project: Project) -> None:
    project.write("local/config.json", json.dumps({"model_type": "gpt2"}))
    project.load("model.encoder={proto: local, n_head: 2}", "~model.encoder.hidden_size")
    assert "unknown key" in project.problem("model.encoder={proto: local, n_heads: 2}")


def test_the_settings_of_a_hub_name_are_not_checked(project: Project) -> None:
    project.load("model.encoder={proto: some/model, whatever: 2}")


def test_every_section_is_checked(project: Project) -> None:
    problems = project.problems("ensemblor.mod=all", "validator.split=[a]", "model.net.x=1")
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("trainor.optimizer=LBFGS", "computes the loss several times a step"),
        ("trainor.optimizer=SparseAdam", "takes sparse gradients only"),
        ("trainor.optimizer=Muon", "VAE has biases and other weights that are none"),
    ],
)
def test_unsupported_optimizers_are_refused(project: Project, word: str, reason: str) -> None:
    project.write("vae.yml", "dataset: {proto: ImageDataset, root: x}\nmodel: {proto: VAE}\n")
    problem = project.problem(word, path="vae.yml")
    assert problem.startswith("trainor.optimizer (command line): given ")
    assert reason in problem


def test_muon_is_allowed_for_plugin_models(project: Project) -> None:
    assert project.load("trainor.optimizer=Muon").trainor.optimizer == "Muon"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("name=/", "given '/'; allowed: the name of a folder inside ckpt_dir"),
        ("name=../..", "given '../..'; allowed: the name of a folder inside ckpt_dir"),
        ("name=..", "allowed: the name of a folder inside"),
        ("name=/tmp/run", "allowed: the name of a folder inside"),
        ("name=a//b", "allowed: the name of a folder inside"),
        ("name=a\\b", "allowed: the name of a folder inside"),
        ("name=a\nb", "given 'a\\nb'; allowed: no line breaks"),
        (f"name={'a' * 300}", "... (300 letters)'; allowed: at most 200 bytes."),
        (f"name={'é' * 150}", "allowed: at most 200 bytes."),
    ],
)
def test_run_names_outside_ckpt_dir_are_refused(project: Project, word: str, expected: str) -> None:
    problem = project.problem(word)
    assert problem.startswith("name (command line): given ")
    assert expected in problem


@pytest.mark.parametrize("name", ["00123", "no", "my run", "Lauf-ä_1.2", "group/run", "a..b"])
def test_other_run_names_are_accepted(project: Project, name: str) -> None:
    assert project.load(f"name={name}").name == name


def test_an_invalid_run_name_from_the_file_name_is_refused(project: Project) -> None:
    project.write("a\tb.yml", (project.root / "base.yml").read_text())
    problem = project.problem(path="a\tb.yml")
    assert problem.startswith("name: given 'a\\tb', that of the file; allowed: no line breaks")
    project.load("name=run", path="a\tb.yml")


def test_related_lists_need_the_same_length(project: Project) -> None:
    image = "dataset: {proto: ImageDataset, root: x}\nmodel: {proto: VAE}\n"
    project.write("vae.yml", image)
    problem = project.problem("dataset.std=[1]", path="vae.yml")
    assert problem == (
        "dataset.std (command line): given [1]; allowed: as many entries as dataset.mean has, 3."
    )
    assert "list of 1 or 3 numbers" in project.problem("dataset.mean=[0, 1]", path="vae.yml")
    project.load("dataset.mean=[0]", "dataset.std=[1]", path="vae.yml")
