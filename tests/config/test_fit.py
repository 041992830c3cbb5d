from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic.config.fit import constant
from vilmedic.config.load import load
from vilmedic.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def problems(path: str, *words: str, training: bool = True) -> list[str]:
    try:
        load(path, words, training=training)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("path", "words", "expected"),
    [
        (
            "config/phantom/simclr.yml",
            ["~dataset.views"],
            "dataset.views (default): given 1, but SimCLR works with 2 only. Set dataset.views=2.",
        ),
        (
            "config/phantom/simclr.yml",
            ["validator.batch_size=1"],
            "validator.batch_size (command line): given 1, but SimCLR compares the samples of a "
            "batch. Allowed: 2 or more.",
        ),
        (
            "config/phantom/convirt.yml",
            ["trainor.batch_size=1"],
            "trainor.batch_size (command line): given 1, but ConVIRT compares the samples of a "
            "batch. Allowed: 2 or more.",
        ),
        (
            "config/phantom/gloria.yml",
            ["dataset.image.views=2"],
            "dataset.image.views (command line): given 2, but GLoRIA works with 1 only. Set "
            "dataset.image.views=1.",
        ),
        (
            "config/phantom/simclr.yml",
            ["dataset={proto: LabelDataset, root: x}"],
            "dataset.proto (command line): given 'LabelDataset', but SimCLR needs images. Allowed: "
            "ImLabel, ImSeq, ImSeqLabel, ImSeqShards, ImageDataset.",
        ),
    ],
)
def test_training_asks_for_what_the_model_learns_from(
    path: str, words: list[str], expected: str
) -> None:
    assert problems(path, *words) == [expected]
    assert problems(path) == []


def test_an_evaluation_does_with_one_view_and_a_batch_of_one() -> None:
    path = "config/phantom/simclr-eval.yml"
    assert problems(path, "validator.batch_size=1", training=False) == []
    [problem] = problems(path)
    assert problem.startswith("dataset.image.views (default): given 1, but SimCLR works with 2")


@pytest.mark.parametrize("training", [True, False])
def test_pixels_and_reports_are_needed_either_way(training: bool) -> None:
    found = problems("config/phantom/vae.yml", "~dataset.mean", "~dataset.std", training=training)
    assert found == [
        "dataset.mean (default): given [0.485, 0.456, 0.406], but VAE works with [0] or [0, 0, 0] "
        "only. Set dataset.mean=[0].",
        "dataset.std (default): given [0.229, 0.224, 0.225], but VAE works with [1] or [1, 1, 1] "
        "only. Set dataset.std=[1].",
    ]
    words = ["dataset.image.mean=[0,0,0]", "dataset.image.std=[1,1,1]"]
    assert problems("config/phantom/dalle.yml", *words, training=training) == []
    [problem] = problems("config/phantom/dalle.yml", "dataset.image.std=[0.5]", training=training)
    assert problem.startswith("dataset.image.std (command line): given [0.5], but DALLE works with")
    assert problems("config/phantom/convirt.yml", "dataset.proto=ImLabel", training=training) == [
        "dataset.proto (command line): given 'ImLabel', but ConVIRT needs reports. Allowed: "
        "ImSeq, ImSeqLabel, ImSeqShards."
    ]


def test_a_data_set_of_a_plugin_may_have_parts_of_its_own(project: Project) -> None:
    text = (
        f"plugins: [{project.package}.parts]\ndataset: {{proto: Lines, root: x}}\nmodel:\n"
        "  proto: SimCLR\n  cnn: {backbone: resnet18}\n  loss: {tau: 0.5}\n"
        "  projection: {visual_embedding_dim: 512, projection_dim: 8}\n"
    )
    project.write("c.yml", text)
    assert problems("c.yml") == []


def test_attributes_are_read_through_base_classes() -> None:
    assert constant("vilmedic.models.simclr.SimCLR", "cross_sample") is True
    assert constant("vilmedic.models.vae.VAE", "cross_sample") is False
    assert constant("vilmedic.models.vae.VAE", "nothing") is None
