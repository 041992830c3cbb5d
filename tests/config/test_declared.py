from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.config.conftest import Project
from vilmedic import cli
from vilmedic.config.declared import constant, declared_numbers, distinct, known_better, read_scores
from vilmedic.config.load import load
from vilmedic.errors import ConfigError
from vilmedic.registry import METRICS

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
            "batch. Allowed: integer >= 2.",
        ),
        (
            "config/phantom/convirt.yml",
            ["trainor.batch_size=1"],
            "trainor.batch_size (command line): given 1, but ConVIRT compares the samples of a "
            "batch. Allowed: integer >= 2.",
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
        (
            "config/phantom/simclr.yml",
            ["dataset.image_choice=random"],
            "dataset.image_choice (command line): given 'random', which draws among the first "
            "images of a sample, as many as dataset.multi_image says: 1. Set that higher.",
        ),
    ],
)
def test_training_requires_the_views_batch_and_data_of_the_model(
    path: str, words: list[str], expected: str
) -> None:
    assert problems(path, *words) == [expected]
    assert problems(path) == []


def test_evaluation_accepts_one_view_and_batch_size_1() -> None:
    path = "config/phantom/simclr-eval.yml"
    assert problems(path, "validator.batch_size=1", training=False) == []
    [problem] = problems(path)
    assert problem.startswith("dataset.image.views (default): given 1, but SimCLR works with 2")


@pytest.mark.parametrize("training", [True, False])
def test_pixels_and_reports_are_required_in_training_and_evaluation(training: bool) -> None:
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


def test_plugin_data_sets_may_have_other_parts(project: Project) -> None:
    text = (
        f"plugins: [{project.package}.parts]\ndataset: {{proto: Lines, root: x}}\nmodel:\n"
        "  proto: SimCLR\n  cnn: {backbone: resnet18}\n  loss: {tau: 0.5}\n"
        "  projection: {visual_embedding_dim: 512, projection_dim: 8}\n"
    )
    project.write("c.yml", text)
    assert problems("c.yml") == []


def test_class_attributes_are_inherited() -> None:
    assert constant("vilmedic.models.simclr.SimCLR", "cross_sample") is True
    assert constant("vilmedic.models.vae.VAE", "cross_sample") is False
    assert constant("vilmedic.models.vae.VAE", "nothing") is None


PHANTOM = "config/phantom/convirt.yml"
PLUGIN = '''
from vilmedic.metrics.contract import Metric
from vilmedic.metrics.knn import NearestNeighbours
from vilmedic.registry import METRICS

@METRICS.register("{name}")
class Frechet(Metric):
    {body}
    def __call__(self, evaluation):
        return {{"distance": 1.0}}

@METRICS.register("{name}_knn")
class Derived(NearestNeighbours):
    """The same numbers as its base class."""
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for modules that register metrics; they are unregistered afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    table, registered = dict(METRICS._table), dict(METRICS._registered)
    yield str(tmp_path)
    METRICS._table, METRICS._registered = table, registered


def write_plugin(folder: str, name: str, body: str) -> str:
    module = f"{name}_plugin"
    (Path(folder) / f"{module}.py").write_text(PLUGIN.format(name=name, body=body))
    return module


def check(*words: str) -> int:
    return cli.train([PHANTOM, "--check", *words])


def test_every_metric_declares_its_numbers() -> None:
    for name in METRICS.names():
        declared = declared_numbers(name)
        assert declared, name
        assert declared == METRICS.get(name).numbers


@pytest.mark.parametrize(
    ("score", "better"),
    [
        ("validation_loss", "lower"),
        ("ema_test_loss", "lower"),
        ("validation_knn_auroc", "higher"),
        ("validation_knn_2_accuracy", "higher"),
        ("validation_retrieval_text_to_image_median_rank", "lower"),
        ("validation_representation_visual_backbone_uniformity", "lower"),
        ("validation_representation_visual_backbone_effective_rank", "higher"),
        ("validation_reconstruction_hard_loss", "lower"),
        ("validation_reconstruction_codebook_perplexity", "higher"),
        ("validation_pointing_game_words", None),
        ("validation_fid", None),
    ],
)
def test_direction_of_a_score_name(score: str, better: str | None) -> None:
    assert known_better(score) == better


def test_similar_score_names_are_distinguished() -> None:
    assert distinct([("a", 1), ("b", 2), ("a", 3)]) == [("a", 1), ("b", 2), ("a_2", 3)]
    scores = read_scores(["validate", "test"], ["knn", "knn"], ema=True)
    assert scores.better("ema_test_knn_2_auroc") == "higher"
    with pytest.raises(ConfigError, match="does not give it"):
        scores.better("validation_knn_3_auroc")


def test_a_misspelt_score_is_refused_before_torch_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("trainor.early_stop_metric=validation_zero_shot_aurc") == 2
    told = capsys.readouterr().err
    assert "trainor.early_stop_metric (command line): given 'validation_zero_shot_aurc'" in told
    assert "Did you mean 'validation_zero_shot_auroc'?" in told
    assert check("trainor.early_stop_metric=ema_validation_loss") == 2
    assert "Did you mean 'validation_loss'?" in capsys.readouterr().err
    assert check("trainor.early_stop_metric=ema_validation_loss", "trainor.ema=0.9") == 0
    assert check("validator.splits=[test]") == 2
    assert "Did you mean 'test_zero_shot_auroc'" not in capsys.readouterr().out
    words = ["validator.splits=[test]", "trainor.early_stop_metric=test_zero_shot_auroc"]
    assert check(*words) == 0


def test_counts_are_refused_as_early_stop_metric(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["validator.metrics.pointing_game.root=x"]
    assert check(*words, "trainor.early_stop_metric=validation_pointing_game_words") == 2
    assert "neither a higher nor a lower value" in capsys.readouterr().err
    assert check(*words, "trainor.early_stop_metric=validation_pointing_game_side") == 0


def test_plugin_metrics_declare_their_scores(
    plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_plugin(plugin, "frechet", 'numbers = {"distance": "lower"}')
    words = [f"plugins=[{module}]", "validator.metrics={frechet: null, frechet_knn: null}"]
    assert check(*words, "trainor.early_stop_metric=validation_frechet_distance") == 0
    assert check(*words, "trainor.early_stop_metric=validation_frechet_knn_accuracy") == 0
    assert check(*words, "trainor.early_stop_metric=validation_frechet_distanc") == 2
    assert "Did you mean 'validation_frechet_distance'?" in capsys.readouterr().err
    assert known_better("validation_frechet_distance") == "lower"
    sys.modules.pop(module)


def test_computed_declarations_accept_any_number_of_the_metric(plugin: str) -> None:
    module = write_plugin(plugin, "made", 'numbers = dict(distance="lower")')
    words = [f"plugins=[{module}]", "validator.metrics={made: null}"]
    assert declared_numbers("made") is None
    assert check(*words, "trainor.early_stop_metric=validation_made_distance") == 0
    assert check(*words, "trainor.early_stop_metric=validation_mad_distance") == 2
    sys.modules.pop(module)


def test_without_a_split_there_is_no_score() -> None:
    with pytest.raises(ConfigError, match=r"Allowed: none, as validator\.splits is empty"):
        read_scores([], [], ema=False).better("validation_loss")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.targets=same_text"], ""),
        (["model.targets={proto: soft, temperature: 0.2}"], ""),
        (["model.targets=identity", "model.loss.proto=VICRegLoss"], ""),
        (["model.targets=soft", "model.loss.proto=SigLIPLoss"], ""),
        (["model.targets=soft", "model.loss.proto=VICRegLoss"], "VICRegLoss has no negatives"),
        (["model.targets=same_text", "model.loss.proto=BarlowTwinsLoss"], "has no negatives"),
        (["model.targets=same_text", "model.loss.proto=NTXentLoss"], "NTXentLoss does not take"),
        (["model.targets=soft", "dataset.proto=ImSeq"], "ImSeq gives none"),
        (["model.targets={proto: soft, by: reports, encoder: bert}", "dataset.proto=ImSeq"], ""),
        (["model.targets={proto: soft, by: reports}"], "targets.encoder .*: not given"),
        (["model.targets={proto: soft, encoder: bert}"], "no effect unless model.targets.by"),
        (["model.targets={proto: same_text, by: reports}"], "unless model.targets.proto"),
    ],
)
def test_targets_must_match_loss_and_data(words: list[str], expected: str) -> None:
    config = ROOT / "config/phantom/convirt.yml"
    if not expected:
        load(config, words, training=True)
        return
    with pytest.raises(ConfigError, match=expected):
        load(config, words, training=True)


GROUPS = "trainor.optim_groups"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{cnnn: {lr: 1}}"], ".cnnn (command line): the model has no part 'cnnn'. Allowed: enc"),
        (["{cnn: {lr: 0}}"], ".cnn.lr (command line): given 0.0; allowed: > 0 and <= 1000."),
        (["{cnn: {lr: 5000}}"], ".cnn.lr (command line): given 5000; allowed: number from 0 to"),
        (["{cnn: {weight_decay: -1}}"], ".cnn.weight_decay (command line): given -1; allowed: nu"),
        (["{cnn: {layer_decay: 1.5}}"], ".cnn.layer_decay (command line): given 1.5; allowed: > "),
        (["{cnn: {lr: null}}"], ".cnn.lr (command line): given null; allowed: number from 0 to "),
        (["{cnn: {lrr: 1}}"], ".cnn.lrr (command line): unknown key. Allowed: lr, weight_decay, "),
        (["{cnn: 3}"], ".cnn (command line): given 3; allowed: mapping to number from 0 to 1000."),
        (
            ["{cnn: {weight_decay: 0.1}}", "trainor.optimizer=Rprop"],
            ".cnn.weight_decay (command line): has no effect, as Rprop has no such option.",
        ),
    ],
)
def test_each_wrong_group_value_is_reported_once(words: list[str], expected: str) -> None:
    value, *more = words
    found = problems("config/phantom/convirt.yml", f"{GROUPS}={value}", *more)
    assert len(found) == 1, found
    assert found[0].startswith(f"{GROUPS}{expected}")


def test_dots_in_the_name_of_a_group_are_explained() -> None:
    found = problems("config/phantom/convirt.yml", f"{GROUPS}.cnn.network.layer4.lr=1e-4")
    assert found[-1].endswith(f"{GROUPS}={{cnn.network.layer4: {{lr: 0.0001}}}}")


def test_groups_with_model_learning_rates_are_refused() -> None:
    path, word = "config/downstream/phantom.yml", f"{GROUPS}={{cnn: {{lr: 1e-4}}}}"
    assert problems(path, word) == [
        f"{GROUPS} (command line): given beside model.encoder_lr, model.head_lr, by which the "
        "model gives rates to its parts itself. Leave one of the two out: ~model.encoder_lr "
        "~model.head_lr"
    ]
    assert not problems(path, word, "~model.encoder_lr", "model.head_lr=null")
    decay = problems(path, word, "~model.encoder_lr", "~model.head_lr", "model.layer_decay=0.5")
    assert decay[0].endswith("Leave one of the two out: ~model.layer_decay")


@pytest.mark.parametrize(
    ("words", "length"),
    [(["trainor.steps=100"], 100), (["trainor.lr_decay_params.total_steps=80"], 80)],
)
def test_a_warm_up_as_long_as_the_run_is_refused(words: list[str], length: int) -> None:
    words = ["trainor.lr_decay=WarmupCosineLR", *words]
    path, key = "config/phantom/convirt.yml", "trainor.lr_decay_params.warmup"
    assert problems(path, *words, f"{key}={length}") == [
        f"{key} (command line): given {length}, but the schedule has {length} steps. Give fewer, "
        "or a share of the run such as 0.1."
    ]
    assert not problems(path, *words, f"{key}={length - 1}")
    assert not problems(path, *words, f"{key}=0.9")
