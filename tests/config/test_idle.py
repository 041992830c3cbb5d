from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic.config.load import load
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CYCLE = (
    "includes: [base.yml]\ntrainor:\n  lr_decay: OneCycleLR\n  lr_decay_params: {max_lr: 1e-2}\n"
)


def test_the_rate_of_a_weaker_layer_is_dropped_where_the_schedule_has_its_own(
    project: Project,
) -> None:
    project.write("c.yml", CYCLE)
    config = project.load(path="c.yml")
    assert config.trainor.optim_params == {"decoupled_weight_decay": True}
    assert config.notes[-1] == (
        "trainor.optim_params.lr (base.yml:18) is left out: it has no effect, as "
        "trainor.lr_decay_params.max_lr is 0.01 (c.yml:4): set that one, or leave it out and it is "
        "trainor.optim_params.lr."
    )
    assert "trainor.optim_params.lr" not in config.origins


@pytest.mark.parametrize(
    ("text", "words", "origin"),
    [
        (CYCLE, ["trainor.optim_params.lr=1e-6"], "command line"),
        (CYCLE + "  optim_params: {lr: 1e-6}\n", [], "c.yml:5"),
        ("includes: [base.yml]\n", ["trainor.lr_decay=OneCycleLR"], ""),
        (
            "includes: [base.yml]\n",
            [
                "trainor.lr_decay=OneCycleLR",
                "trainor.lr_decay_params.max_lr=1",
                "trainor.optim_params.lr=2",
            ],
            "command line",
        ),
        (CYCLE, ["trainor.optim_params.lr=0.01"], ""),
        (CYCLE, ["trainor.lr_decay_params.max_lr=${trainor.optim_params.lr}"], ""),
        (
            CYCLE,
            [
                "trainor.lr_decay_params.max_lr=${..optim_params.lr}",
                "trainor.optim_params.lr=1e-6",
            ],
            "",
        ),
        (CYCLE, ["~trainor.lr_decay_params.max_lr", "trainor.optim_params.lr=1e-6"], ""),
    ],
)
def test_a_rate_without_effect_is_an_error(
    project: Project, text: str, words: list[str], origin: str
) -> None:
    project.write("c.yml", text)
    if not origin:
        config = project.load(*words, path="c.yml")
        assert "lr" in config.trainor.optim_params
        return
    problem = project.problem(*words, path="c.yml")
    assert problem.startswith(f"trainor.optim_params.lr ({origin}): given ")
    assert "which has no effect, as trainor.lr_decay_params.max_lr is" in problem


def test_the_momentum_that_a_schedule_cycles_is_told(project: Project) -> None:
    project.write("c.yml", "includes: [base.yml]\ntrainor: {optimizer: SGD}\n")
    words = ["trainor.optim_params={lr: 1, momentum: 0.9}", "trainor.lr_decay=OneCycleLR"]
    problem = project.problem(*words, path="c.yml")
    assert problem.startswith("trainor.optim_params.momentum (command line): given 0.9, which has")
    assert "cycle_momentum=false" in problem
    still = project.load(*words, "trainor.lr_decay_params.cycle_momentum=false", path="c.yml")
    assert still.trainor.optim_params["momentum"] == 0.9
    project.write(
        "d.yml", "includes: [base.yml]\ntrainor: {optimizer: SGD, optim_params: {momentum: 0.9}}\n"
    )
    config = project.load("trainor.lr_decay=OneCycleLR", path="d.yml")
    assert "momentum" not in config.trainor.optim_params


IDLE = [
    ("trainor.decay_metric_start=3", "trainor.lr_decay=StepLR trainor.lr_decay_params.step_size=1"),
    ("trainor.decay_metric_start=3", "trainor.lr_decay=null"),
    ("trainor.early_stop_start=3", "trainor.early_stop=null"),
    ("trainor.eval_start=3", "trainor.epochs=3"),
    ("trainor.early_stop_start=3", "trainor.early_stop=2 trainor.epochs=3"),
    ("trainor.decay_metric_start=3", "trainor.epochs=2"),
    ("ensemblor.mode=all", "ensemblor.ckpt=last"),
    ("ensemblor.metrics=[retrieval: {local_aggregation: sum}]", ""),
    ("ensemblor.num_samples=3", "ensemblor.generate_images=true ensemblor.prompt=Large"),
    ("ensemblor.prime_image=x.png", "ensemblor.generate_images=true"),
]


@pytest.mark.parametrize(("idle", "because"), IDLE)
def test_keys_without_effect_are_refused_on_the_command_line(
    project: Project, idle: str, because: str
) -> None:
    key = idle.partition("=")[0]
    problem = project.problem(idle, *because.split())
    assert problem.startswith(key)
    assert "which has no effect" in problem or "which is beyond the last one" in problem
    assert "(command line): given" in problem


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        ("decay_metric_start: 3", "lr_decay: null", "trainor.lr_decay=null"),
        ("early_stop: 9, early_stop_start: 3", "early_stop: null", "trainor.early_stop=null"),
        ("early_stop: 9, early_stop_start: 3", "epochs: 2", "trainor.epochs=2"),
        ("eval_start: 3", "epochs: 3", "trainor.epochs=3"),
    ],
)
def test_keys_of_a_weaker_layer_are_dropped(
    project: Project, low: str, high: str, word: str
) -> None:
    key = low.split(", ")[-1].partition(":")[0]
    project.write("low.yml", f"includes: [base.yml]\ntrainor:\n  {{{low}}}\n")
    project.write("high.yml", f"includes: [low.yml]\ntrainor:\n  {{{high}}}\n")
    config = project.load(path="high.yml")
    assert any(note.startswith(f"trainor.{key} (low.yml:3) is left out") for note in config.notes)
    assert getattr(config.trainor, key) == 0
    assert f"trainor.{key}" not in config.origins
    assert project.load(word, path="low.yml").data == config.data | {"name": "low"}
    project.write(
        "same.yml", f"includes: [base.yml]\ntrainor:\n  {{{low.split(', ')[-1]}, {high}}}\n"
    )
    assert project.problem(path="same.yml").startswith(
        f"trainor.{key} (same.yml:3): given 3, which"
    )


def test_a_file_that_names_both_is_refused(project: Project) -> None:
    project.write(
        "c.yml", "includes: [base.yml]\ntrainor: {early_stop: null, early_stop_start: 2}\n"
    )
    assert project.problem(path="c.yml") == (
        "trainor.early_stop_start (c.yml:2): given 2, which has no effect unless "
        "trainor.early_stop is set, and it is null (c.yml:2)."
    )
    # what a stronger layer makes of it counts
    config = project.load("trainor.early_stop=4", path="c.yml")
    assert config.trainor.early_stop_start == 2
    project.write("d.yml", "includes: [base.yml]\ntrainor: {early_stop: 3, early_stop_start: 2}\n")
    assert project.load("~trainor.early_stop", path="d.yml").trainor.early_stop_start == 0


def test_a_length_that_another_one_overrules_is_told(project: Project) -> None:
    words = ["trainor.lr_decay=OneCycleLR", "trainor.lr_decay_params={epochs: 3, total_steps: 50}"]
    assert project.problem(*words).startswith(
        "trainor.lr_decay_params.epochs (command line): given"
    )


def test_options_of_a_schedule_need_one(project: Project) -> None:
    problem = project.problem("trainor.lr_decay=null", "trainor.lr_decay_params.factor=0.1")
    assert "no option is allowed while 'trainor.lr_decay' is null" in problem


@pytest.mark.parametrize(
    "word",
    [
        "num_images=3",
        "num_samples=3",
        "prompt=Large effusion.",
        "temperature=2",
        "filter_thres=0.5",
        "top_p=0.5",
        "cond_scale=2",
        "prime=0.5",
        "prime_image=x.png",
        "rerank.ckpt=x.pth",
    ],
)
def test_generation_keys_need_generate_images(project: Project, word: str) -> None:
    problem = project.problem(f"ensemblor.{word}")
    assert "has no effect unless ensemblor.generate_images is true, and it is false" in problem
    extra = ["ensemblor.prime=0.5"] if word.startswith("prime_image") else []
    project.load(f"ensemblor.{word}", "ensemblor.generate_images=true", *extra)


def test_evaluation_keys_need_an_evaluation(project: Project) -> None:
    problem = project.problem("ensemblor.generate_images=true", "ensemblor.baselines=[untrained]")
    assert problem.startswith("ensemblor.baselines (command line): given [untrained], which has no")


@pytest.mark.parametrize("empty", ["null", "{}", "[]"])
def test_asking_for_nothing_is_no_fault(project: Project, empty: str) -> None:
    words = ["ensemblor.generate_images=true", f"ensemblor.metrics={empty}"]
    assert not project.load(*words).ensemblor.metrics
    assert project.load("ensemblor.prompt=null").ensemblor.prompt is None


def test_a_file_may_hold_what_is_for_either_command(project: Project) -> None:
    text = "includes: [base.yml]\nensemblor: {num_images: 8, metrics: {retrieval: }}\n"
    project.write("c.yml", text)
    assert project.load(path="c.yml").ensemblor.num_images == 8
    assert project.load("ensemblor.generate_images=true", path="c.yml").ensemblor.num_images == 8


def test_a_key_that_others_refer_to_has_an_effect(project: Project) -> None:
    text = (
        "includes: [base.yml]\nensemblor: {metrics: {counting: {of: '${ensemblor.num_images}'}}}\n"
    )
    project.write("c.yml", text)
    config = project.load("ensemblor.num_images=7", path="c.yml")
    assert config.ensemblor.metrics == {"counting": {"of": "7"}}


SHIPPED = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("config/**/*.yml")
    if not path.name.startswith("prompts")
)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_another_learning_rate_is_one_word_in_every_shipped_configuration(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    section = load(path, ["trainor.optim_params.lr=1e-7"]).trainor
    assert section.optim_params["lr"] == 1e-7
    assert "max_lr" not in section.lr_decay_params


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_a_configuration_written_out_in_full_is_read_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path)
    (tmp_path / "again.yml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yml").data == config.data


def test_a_preset_gives_way_to_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(
        "config/SELFSUP/simclr-mimic.yml", ["dataset.transforms=[RandomRotation: {degrees: 5}]"]
    )
    assert "preset" not in config.dataset
    with pytest.raises(
        ConfigError, match=r"dataset\.preset \(command line\): given 'convirt', which"
    ):
        load("config/phantom/simclr.yml", ["dataset.preset=convirt"])
