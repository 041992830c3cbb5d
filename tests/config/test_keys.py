from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic.config.keys import OLDER_KEYS, OlderKey
from vilmedic.config.load import load
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CYCLE = (
    "includes: [base.yml]\ntrainor:\n  lr_decay: OneCycleLR\n  lr_decay_params: {max_lr: 1e-2}\n"
)


def test_a_learning_rate_overridden_by_the_schedule_is_dropped_from_lower_layers(
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
def test_a_learning_rate_without_effect_is_an_error(
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


def test_momentum_cycled_by_the_schedule_is_an_error(project: Project) -> None:
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
def test_keys_without_effect_in_lower_layers_are_dropped(
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


def test_a_file_with_a_key_without_effect_is_refused(project: Project) -> None:
    project.write(
        "c.yml", "includes: [base.yml]\ntrainor: {early_stop: null, early_stop_start: 2}\n"
    )
    assert project.problem(path="c.yml") == (
        "trainor.early_stop_start (c.yml:2): given 2, which has no effect unless "
        "trainor.early_stop is set, and it is null (c.yml:2)."
    )
    # the final value after all layers counts
    config = project.load("trainor.early_stop=4", path="c.yml")
    assert config.trainor.early_stop_start == 2
    project.write("d.yml", "includes: [base.yml]\ntrainor: {early_stop: 3, early_stop_start: 2}\n")
    assert project.load("~trainor.early_stop", path="d.yml").trainor.early_stop_start == 0


def test_epochs_overridden_by_steps_are_reported(project: Project) -> None:
    words = ["trainor.lr_decay=OneCycleLR", "trainor.lr_decay_params={epochs: 3, total_steps: 50}"]
    assert project.problem(*words).startswith(
        "trainor.lr_decay_params.epochs (command line): given"
    )


def test_schedule_options_need_a_schedule(project: Project) -> None:
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
def test_empty_sections_are_accepted(project: Project, empty: str) -> None:
    words = ["ensemblor.generate_images=true", f"ensemblor.metrics={empty}"]
    assert not project.load(*words).ensemblor.metrics
    assert project.load("ensemblor.prompt=null").ensemblor.prompt is None


def test_a_file_may_have_keys_for_either_command(project: Project) -> None:
    text = "includes: [base.yml]\nensemblor: {num_images: 8, metrics: {retrieval: }}\n"
    project.write("c.yml", text)
    assert project.load(path="c.yml").ensemblor.num_images == 8
    assert project.load("ensemblor.generate_images=true", path="c.yml").ensemblor.num_images == 8


def test_keys_used_by_interpolations_are_accepted(project: Project) -> None:
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
def test_one_override_changes_the_learning_rate_in_every_shipped_config(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    section = load(path, ["trainor.optim_params.lr=1e-7"]).trainor
    assert section.optim_params["lr"] == 1e-7
    assert "max_lr" not in section.lr_decay_params


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_a_fully_resolved_configuration_is_read_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(path)
    (tmp_path / "again.yml").write_text(config.to_yaml())
    assert load(tmp_path / "again.yml").data == config.data


def test_explicit_transforms_replace_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(
        "config/SELFSUP/simclr-mimic.yml", ["dataset.transforms=[RandomRotation: {degrees: 5}]"]
    )
    assert "preset" not in config.dataset
    with pytest.raises(
        ConfigError, match=r"dataset\.preset \(command line\): given 'convirt', which"
    ):
        load("config/phantom/simclr.yml", ["dataset.preset=convirt"])


MIGRATING = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
CROP = "transforms.Compose([transforms.Resize(256), transforms.RandomCrop(224), {flip}{end}])(x)"
END = "transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
FLIP = "transforms.RandomHorizontalFlip(), "


def problems(path: str, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(ROOT / path, words)
    return caught.value.problems


@pytest.mark.parametrize(
    ("word", "note"),
    [
        ("dataset.image.load_memory=False", "dataset.image.cache=<folder> keeps the decoded ones"),
        ("dataset.image.load_memory=True", "dataset.image.cache=<folder> keeps the decoded ones"),
        ("model.encoder.add_pooling_layer=True", "from model.encoder.pooling, which is pooler by"),
        ("model.encoder.gradient_checkpointing=false", "it is off unless trainor.activation_check"),
        ("model.encoder.position_embedding_type=absolute", "positions are absolute in this model"),
        ("trainor.use_amp=false", "trainor.precision is fp32 by default"),
        ("ensemblor.proto=Ensemblor", "there is one class for this"),
        ("dataset.seq.source=src", "reports are read, never written"),
    ],
)
def test_older_keys_without_effect_are_dropped_with_a_note(word: str, note: str) -> None:
    config = load(ROOT / "config/phantom/convirt.yml", [word])
    key = word.partition("=")[0]
    [told] = [one for one in config.notes if one.startswith(f"{key} (command line) is left out: ")]
    assert note in told
    assert key not in config.origins
    assert config.data == load(ROOT / "config/phantom/convirt.yml").data


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "model.encoder.gradient_checkpointing=true",
            "write trainor.activation_checkpointing=true.",
        ),
        (
            "model.encoder.position_embedding_type=relative_key",
            "positions are absolute in this model, and no others are offered. Allowed: absolute, "
            "or leave it out.",
        ),
        (
            "trainor.use_amp=true",
            "write trainor.precision=fp16, or bf16, which needs no loss scale.",
        ),
        ("trainor.lr_min=1e-6", "write trainor.lr_decay_params.min_lr."),
        ("dataset.seq.max_len=30", "write dataset.seq.tokenizer_max_len."),
        ("dataset.seq.vocab_file=x", "write dataset.seq.tokenizer=<the path of the word list>."),
        ("validator.beam_width=8", "leave it out: it is for systems that write reports, and there"),
        ("dataset.image.hf_dataset=x", "data sets of the hub are not read; data/make_folder.py"),
    ],
)
def test_other_older_keys_name_their_replacement(word: str, expected: str) -> None:
    [problem] = problems("config/phantom/convirt.yml", word)
    assert problem.startswith(f"{word.partition('=')[0]} (command line): given ")
    assert f"; {expected}" in problem
    assert "Did you mean" not in problem


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (CROP.format(flip="", end=END), "resize: 256; crop: 224."),
        (CROP.format(flip=FLIP, end=END), "resize: 256; crop: 224; preset: simclr_xray."),
        (
            f"lambda x : torch.cat([{CROP.format(flip=FLIP, end=END)}, "
            f"{CROP.format(flip=FLIP, end=END)}])",
            "resize: 256; crop: 224; preset: simclr_xray; views: 2.",
        ),
        (
            "transforms.Compose([transforms.Resize(256), transforms.CenterCrop(256), "
            "transforms.ToTensor()])",
            "resize: 256; crop: 256; preset: center_crop; mean: [0]; std: [1].",
        ),
        (
            "transforms.Compose([transforms.Resize((224, 224)), transforms.ColorJitter(0.4), "
            "transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))])",
            "resize: 224; crop: 224; transforms: a list of ColorJitter, with the arguments by "
            "name; mean: [0.5]; std: [0.25].",
        ),
    ],
)
def test_a_custom_transform_is_translated_to_keys(
    project: Project, code: str, expected: str
) -> None:
    text = f"dataset:\n  proto: ImageDataset\n  root: x\n  custom_transform_train: >\n    {code}\n"
    project.write("c.yml", text + "model: {proto: VAE}\n")
    problem = project.problem(path="c.yml")
    assert problem.startswith("dataset.custom_transform_train (c.yml:4): given '")
    assert (
        "it is Python code, which a configuration never executes. Write under dataset:" in problem
    )
    assert problem.endswith(f" {expected}")
    assert "\n" not in problem


@pytest.mark.parametrize("code", ["lambda x: (", "5", "x.y", "f(1)", "{a: 1}", "(" * 5000])
def test_any_other_custom_transform_names_the_keys(project: Project, code: str) -> None:
    project.write("c.yml", "dataset: {proto: ImageDataset, root: x}\nmodel: {proto: VAE}\n")
    problem = project.problem(f"dataset.custom_transform_train={code}", path="c.yml")
    assert "Write dataset.resize, crop and preset, or a list of torchvision" in problem
    assert len(problem) < 400


@pytest.mark.parametrize("name", ["custom_transform_val", "custom_transform_validate"])
def test_custom_evaluation_transforms_are_refused(name: str) -> None:
    [problem] = problems("config/phantom/convirt.yml", f"dataset.image.{name}=x")
    assert "Leave it out: evaluation resizes to dataset.image.resize and cuts the middle" in problem
    words = f"dataset.{name}=[transforms.Compose([])(x), transforms.Compose([])(x)]"
    [problem] = problems("config/phantom/simclr.yml", words)
    assert "Leave it out: with two views, evaluation augments as training does" in problem


def test_settings_of_hub_models_may_include_older_keys(project: Project) -> None:
    text = f"plugins: [{project.package}.parts]\nincludes: [base.yml]\n"
    encoder = "model: {encoder: {proto: owner/model, add_pooling_layer: true, anything: 1}}\n"
    project.write("c.yml", text + encoder)
    config = project.load(path="c.yml")
    assert config.model["encoder"] == {"proto": "owner/model", "hidden_size": 64, "anything": 1}


def test_a_frozen_classifier_with_adapters_is_found_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name, lora = "config/downstream/phantom.yml", "model.cnn.lora.rank=2"
    [problem] = problems(name, "model.freeze=all", lora)
    assert problem.startswith("model.freeze (command line): given 'all', which has no effect")
    assert "unless model.cnn.lora is null" in problem
    assert load(name, ["model.freeze=none", lora]).notes == ()
    assert load(name, ["model.freeze=all", "model.cnn.lora=null"]).notes == ()
    frozen = tmp_path / "frozen.yml"
    frozen.write_text(f"includes: [{ROOT / name}]\nmodel: {{freeze: layer2}}\n")
    config = load(str(frozen), [lora])
    assert "freeze" not in config.model
    assert "model.freeze" in config.notes[0]


@pytest.mark.parametrize("older", OLDER_KEYS, ids=lambda one: f"{one.section}.{one.name}")
def test_the_page_on_migrating_lists_every_key(older: OlderKey) -> None:
    assert re.search(rf"[.`]{older.name}[`:]", MIGRATING)


def test_the_yaml_of_the_page_passes_the_check(project: Project) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", MIGRATING, re.DOTALL)
    assert blocks
    for block in blocks:
        project.write("c.yml", block)
        load("c.yml", training=True)
