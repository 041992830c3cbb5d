"""Predictions of `--plan` against real steps, and planning with missing data or VAE."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertModel

from benchmarks.gpu_timing import flop
from benchmarks.plan import PHANTOM, measured
from tests.small_models import save_tiny_bert
from vilmedic import cli
from vilmedic.config.load import Config, load
from vilmedic.errors import ConfigError
from vilmedic.log import Progress
from vilmedic.models.vae import VAE as OwnVAE
from vilmedic.training import plan
from vilmedic.training.cards import CARDS, LAUNCH, MOVED, REACHED, USABLE
from vilmedic.training.fake_run import CPU, PARTS, FakeRun, FakeTraining, Operation
from vilmedic.training.optimization import make_optimizer
from vilmedic.training.plan import GIB, MadeUp, count_samples, make_plan, seconds_of
from vilmedic.training.step import TrainingStep

ROOT = Path(__file__).parents[2]
NOWHERE = "/no/such/folder"
VAE = f"""
dataset: {{proto: ImageDataset, root: {NOWHERE}, resize: 32, crop: 32, mean: [0], std: [1]}}
model:
  proto: VAE
  image_size: 32
  num_tokens: 64
  codebook_dim: 16
  num_layers: 2
  num_resnet_blocks: 1
  hidden_dim: 16
trainor: {{batch_size: 8, optimizer: AdamW}}
"""
SIMCLR = f"""
dataset: {{proto: ImageDataset, root: {NOWHERE}, resize: 160, crop: 128, views: 2}}
model:
  proto: SimCLR
  cnn: {{proto: CNN, backbone: resnet18, pretrained: false}}
  projection: {{visual_embedding_dim: 512, projection_dim: 32}}
trainor: {{batch_size: 16, optimizer: AdamW}}
"""

CLASSIFIER = f"""
dataset:
  proto: ImLabel
  image: {{root: {NOWHERE}, resize: 32, crop: 32}}
  label: {{root: {NOWHERE}}}
model: {{proto: Classifier, cnn: {{proto: CNN, backbone: resnet18, pretrained: false}}}}
"""


def config_of(folder: Path, text: str, *words: str) -> Config:
    path = folder / "config.yml"
    path.write_text(text)
    return load(path, words, training=True)


def fake_step(config: Config, folder: Path, batch: int | None = None) -> FakeRun:
    folder.mkdir()
    made_up = MadeUp(config, folder)
    training = FakeTraining(made_up.model, made_up.data.prepare, made_up.section, gpu=made_up.gpu)
    return training.step(made_up.group(batch or made_up.section.batch_size))


def step_of(made_up: MadeUp) -> TrainingStep:
    section, model = made_up.section, made_up.model.train()
    optimizer = make_optimizer(model, section)
    return TrainingStep(model, made_up.data.prepare, optimizer, section, CPU)


@pytest.mark.parametrize("name", PHANTOM)
def test_the_peak_is_within_15_percent_of_that_of_a_real_step(name: str, tmp_path: Path) -> None:
    words = ["trainor.device=cpu", "trainor.batch_size=12"]
    if name == "gloria":  # fewer blocks of the loss on a CPU
        words += ["trainor.batch_size=6"]
    config = load(ROOT / "config" / "phantom" / f"{name}.yml", words, training=True)
    predicted = fake_step(config, tmp_path / "fake").peak
    (tmp_path / "real").mkdir()
    gc.collect()  # so that no older tensors are freed during the measurement
    real = measured(MadeUp(config, tmp_path / "real"))["mib"] * 2**20
    assert predicted == pytest.approx(real, rel=0.15)


def test_counts_the_operations_of_a_real_step(tmp_path: Path) -> None:
    words = ("trainor.device=cpu", "trainor.batch_size=2")
    config = config_of(tmp_path, SIMCLR, *words)
    (tmp_path / "real").mkdir()
    made_up = MadeUp(config, tmp_path / "real")
    step, group = step_of(made_up), made_up.group(made_up.section.batch_size)
    assert fake_step(config, tmp_path / "fake").flop == flop(lambda: step(group))


def test_memory_parts_have_the_expected_sizes(tmp_path: Path) -> None:
    step = fake_step(config_of(tmp_path, VAE, "trainor.ema=0.9"), tmp_path / "fake")
    (tmp_path / "real").mkdir()
    model = MadeUp(config_of(tmp_path, VAE), tmp_path / "real").model
    state = sum(value.numel() * 4 for value in model.state_dict().values())
    weights = sum(value.numel() * 4 for value in model.parameters())
    tensors = len(model.state_dict())
    assert state <= step.held["weights"] <= state + 512 * tensors
    assert state <= step.held["averaged weights"] <= state + 512 * tensors
    # two moments, and a step count in its own block
    assert 2 * weights <= step.held["optimizer"] <= 2 * weights + 3 * 512 * tensors
    assert sum(step.held.values()) == step.peak
    assert set(step.held) == set(PARTS)


def test_the_frozen_target_encoder_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = save_tiny_bert(tmp_path / "bert")
    targets = f"{{proto: soft, by: reports, encoder: {bert}}}"
    words = ["trainor.device=cpu", "trainor.batch_size=6", f"dataset.seq.tokenizer={bert}"]
    words += ["dataset.seq.tokenizer_max_len=16", "model.cnn.backbone=shufflenet_v2_x0_5"]
    words += ["model.projection.visual_embedding_dim=1024"]
    path = ROOT / "config/phantom/convirt.yml"
    plain = load(path, words, training=True)
    soft = load(path, [*words, f"model.targets={targets}"], training=True)
    weights = sum(value.numel() for value in BertModel.from_pretrained(bert).parameters())
    without = fake_step(plain, tmp_path / "plain")
    found = fake_step(soft, tmp_path / "soft")
    assert found.held["weights"] - without.held["weights"] >= 4 * weights
    (tmp_path / "real").mkdir()
    made_up = MadeUp(soft, tmp_path / "real")
    step = step_of(made_up)
    real = flop(lambda: step(made_up.group(6)))
    assert real > without.flop
    assert found.flop == pytest.approx(real, rel=1e-3)
    monkeypatch.setattr(plan, "_peaks", lambda *_: {6: 1, 12: 2})  # it is slow
    counts = make_plan(soft, card="h100").parameters
    pooler = sum(p.numel() for p in BertModel.from_pretrained(bert).pooler.parameters())
    own = sum(p.numel() for p in made_up.model.parameters())
    assert counts == (own + weights - pooler, own)


@pytest.mark.parametrize(
    "less",
    ["model.forward_batch_size=4", "trainor.activation_checkpointing=true", "trainor.batch_size=4"],
)
def test_memory_saving_options_lower_the_plan(less: str, tmp_path: Path) -> None:
    plain = fake_step(config_of(tmp_path, SIMCLR), tmp_path / "plain")
    saving = fake_step(config_of(tmp_path, SIMCLR, less), tmp_path / "saving")
    assert saving.held["activations"] < 0.8 * plain.held["activations"]


def test_the_largest_batch_just_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vilmedic.training.plan.SIZES", (0.0001, 0.125))
    config = config_of(tmp_path, VAE)
    plan = make_plan(config, card="h100")
    assert plan.largest[0.0001] == 0  # type: ignore[index]
    batch = plan.largest[0.125]  # type: ignore[index]
    assert batch > 100
    peak = fake_step(config, tmp_path / "fake", batch).peak
    assert peak == pytest.approx(0.125 * GIB * USABLE, rel=0.03)


def test_the_largest_batch_fits_with_nonlinear_memory() -> None:
    """For example where parts of a batch are computed sequentially above some size."""

    def peak(batch: int) -> int:
        return max(8 * min(batch, 16), 64 + 2 * batch, 5 * batch)

    tried: list[int] = []

    def step(batch: int) -> FakeRun:
        tried.append(batch)
        return FakeRun({"activations": peak(batch)}, [Operation(0.0, torch.float32, 0.0)])

    peaks = plan._peaks(16, step(16), step, [110.0, 1000.0, 10_000.0])
    for room, largest in ((110.0, 13), (1000.0, 200), (10_000.0, 2000)):
        assert plan._largest(peaks, room) == pytest.approx(largest, rel=0.05)
    assert len(tried) < 10


def test_step_time_is_bounded_by_compute_memory_or_launches() -> None:
    card = CARDS["h100"]
    held = dict.fromkeys(PARTS, 0)

    def seconds(*operations: Operation, tf32: bool = True) -> float:
        return seconds_of(FakeRun(held, list(operations)), card, tf32=tf32)

    product = Operation(1e15, torch.float32, 1.0)
    assert seconds(product) == pytest.approx(1e15 / (card.tf32 * 1e12 * REACHED))
    assert seconds(product, tf32=False) == pytest.approx(1e15 / (card.fp32 * 1e12 * REACHED))
    half = Operation(1e15, torch.bfloat16, 1.0)
    assert seconds(half) == pytest.approx(1e15 / (card.half * 1e12 * REACHED))
    copy = Operation(0.0, torch.float32, 1e12)
    assert seconds(copy, half) == pytest.approx(
        1e12 / (card.bandwidth * 1e9 * MOVED) + seconds(half)
    )
    small = Operation(0.0, torch.float32, 4.0)
    assert seconds(*[small] * 1000) == pytest.approx(1000 * LAUNCH)


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.train(words)
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command_prints_the_plan_and_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text(VAE)
    status, out, _ = run_cli(
        capsys, "config.yml", "--plan", "--card", "a100", "--samples=800", "trainor.batch_size=4"
    )
    assert status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yml"]
    first, *lines = out.splitlines()
    assert first == "config.yml: predicted, not measured"
    (tmp_path / "made_up").mkdir()
    model = MadeUp(config_of(tmp_path, VAE), tmp_path / "made_up").model
    count = sum(parameter.numel() for parameter in model.parameters())
    shown = {line[:17].strip(): line[17:] for line in lines}
    assert shown["parameters"] == f"{count:,}, of which {count:,} are trained"
    assert "1 x 4 samples in fp32" in shown["a step"]
    assert "24 GB: 65,536 and more" in shown["largest batch"]
    assert "an epoch of 800 samples" in lines[-1]


def test_a_slow_plan_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps on larger and larger batches take up to a minute."""
    shown = []

    def slow(*_: object, **__: object) -> SimpleNamespace:
        shown.extend(bar.line() for bar in Progress._open)
        return SimpleNamespace(text=lambda: "the plan")

    monkeypatch.setattr(plan, "make_plan", slow)
    (tmp_path / "config.yml").write_text(VAE)
    status, out, _ = run_cli(capsys, str(tmp_path / "config.yml"), "--plan")
    assert (status, out) == (0, "the plan\n")
    assert shown == ["Planning  0:00 so far"]


def test_samples_are_counted_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "train.image.tok").write_text("a.png\nb.png\nc.png\n")
    assert count_samples(config_of(tmp_path, VAE.replace(NOWHERE, str(tmp_path)))) == 3
    assert count_samples(config_of(tmp_path, VAE)) is None


def test_a_fraction_of_the_samples_is_counted(tmp_path: Path) -> None:
    """The length of an epoch is that of the training subset."""
    (tmp_path / "train.image.tok").write_text("a.png\n" * 20)
    (tmp_path / "some.tok").write_text("a.png\nb.png\nc.png\n")
    text = CLASSIFIER.replace(NOWHERE, str(tmp_path))
    assert count_samples(config_of(tmp_path, text)) == 20
    assert count_samples(config_of(tmp_path, text, "dataset.fraction=0.25")) == 5
    assert count_samples(config_of(tmp_path, text, f"dataset.ids={tmp_path}/some.tok")) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "--card", "h10"], "--card: given 'h10', allowed: t4, "),
        (["--card", "h100"], "--card: belongs to --plan, which is not given."),
        (["--samples=5"], "--samples: belongs to --plan, which is not given."),
        (["--plan", "--samples", "0"], "--samples: given '0', allowed: integer >= 1."),
        (["--plan", "--card"], "--card: nothing is given. Use: --card h100"),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yml"
    path.write_text(VAE)
    status, _, err = run_cli(capsys, str(path), *words)
    assert (status, message in err) == (2, True), err


def test_a_missing_vae_is_assumed(tmp_path: Path) -> None:
    words = ["trainor.batch_size=4", f"model.vae.ckpt={NOWHERE}", "model.vae.num_layers=4"]
    config = load(ROOT / "config" / "phantom" / "dalle.yml", words, training=True)
    made_up = MadeUp(config, tmp_path)
    assert made_up.model.image_seq_len == 4**2
    assert made_up.assumed[-1] == (
        "a VAE of 512 codes that halves 64 pixels 4 times, as "
        f"model.vae.ckpt={NOWHERE} is not there"
    )


def test_labels_are_those_of_the_data_set_if_it_is_there(tmp_path: Path) -> None:
    text = CLASSIFIER.replace(NOWHERE, str(tmp_path))
    for name in ("made_up", "real", "run"):
        (tmp_path / name).mkdir()
    assumed = MadeUp(config_of(tmp_path, text), tmp_path / "made_up")
    assert len(assumed.model.labels) == 14
    assert assumed.assumed == [f"14 labels, as {tmp_path} has no file of them"]
    (tmp_path / "train.label.tok").write_text("Edema\nEdema,Mass\n")
    (tmp_path / "test.label.tok").write_text("Nodule\n")
    words = ["model.positive_weights={Edema: 2.0}", f"ckpt_dir={tmp_path / 'run'}"]
    known = MadeUp(config_of(tmp_path, text, *words), tmp_path / "real")
    assert known.model.labels == ("Edema", "Mass", "Nodule")
    assert known.data.spec.multi_label
    assert known.assumed == []


def test_several_images_per_sample_are_planned_at_their_maximum(tmp_path: Path) -> None:
    path = ROOT / "config" / "phantom" / "convirt.yml"
    words: list[Any] = ["trainor.batch_size=4"]
    one = fake_step(load(path, words, training=True), tmp_path / "one")
    words += ["dataset.image.multi_image=3"]
    several = fake_step(load(path, words, training=True), tmp_path / "several")
    assert several.flop > 2 * one.flop


@pytest.mark.parametrize("asks", ["numpy", "mask"])
def test_a_model_that_needs_values_cannot_be_planned(
    asks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a user's model in which a shape depends on values."""

    def errors(self: OwnVAE, target: Tensor, output: Tensor) -> Tensor:
        if asks == "mask":
            return output[output > 0]
        return output * float(output.detach().numpy().sum())

    monkeypatch.setattr(OwnVAE, "_errors", errors)
    with pytest.raises(ConfigError, match=r"^model.proto: VAE cannot be planned"):
        make_plan(config_of(tmp_path, VAE), card="h100")
