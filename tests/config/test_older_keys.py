from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic.config.load import load
from vilmedic.config.older_keys import OLDER_KEYS, OlderKey
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
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
def test_keys_without_effect_are_left_out_with_a_line(word: str, note: str) -> None:
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
def test_other_keys_say_what_to_write(word: str, expected: str) -> None:
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
def test_a_custom_transform_is_said_in_keys(project: Project, code: str, expected: str) -> None:
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
def test_transforms_of_an_evaluation_are_left_to_it(name: str) -> None:
    [problem] = problems("config/phantom/convirt.yml", f"dataset.image.{name}=x")
    assert "Leave it out: evaluation resizes to dataset.image.resize and cuts the middle" in problem
    words = f"dataset.{name}=[transforms.Compose([])(x), transforms.Compose([])(x)]"
    [problem] = problems("config/phantom/simclr.yml", words)
    assert "Leave it out: with two views, evaluation augments as training does" in problem


def test_settings_of_a_model_of_the_hub_may_hold_what_is_left_out(project: Project) -> None:
    text = f"plugins: [{project.package}.parts]\nincludes: [base.yml]\n"
    encoder = "model: {encoder: {proto: owner/model, add_pooling_layer: true, anything: 1}}\n"
    project.write("c.yml", text + encoder)
    config = project.load(path="c.yml")
    assert config.model["encoder"] == {"proto": "owner/model", "hidden_size": 64, "anything": 1}


@pytest.mark.parametrize("older", OLDER_KEYS, ids=lambda one: f"{one.section}.{one.name}")
def test_the_page_on_migrating_lists_every_key(older: OlderKey) -> None:
    assert re.search(rf"[.`]{older.name}[`:]", MIGRATING)


def test_the_yaml_of_the_page_passes_the_check(project: Project) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", MIGRATING, re.DOTALL)
    assert blocks
    for block in blocks:
        project.write("c.yml", block)
        load("c.yml", training=True)
