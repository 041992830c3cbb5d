from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_models import tiny_cnn
from vilmedic.config.sections import TrainorSection
from vilmedic.datasets.aligned import DataSpec
from vilmedic.errors import ConfigError
from vilmedic.models.classifier import Classifier
from vilmedic.registry import MODELS
from vilmedic.training.optimization import Schedule, make_optimizer, restore_optimizer

LABELS = ("Edema", "Mass", "Nodule")


def tiny(*, multi_label: bool = True, seed: int = 0, spec: DataSpec | None = None, **keys: Any):
    torch.manual_seed(seed)
    spec = spec or DataSpec(labels=LABELS, multi_label=multi_label)
    return Classifier(spec=spec, cnn=tiny_cnn(), **keys)


def batch(size: int = 6, *, multi_label: bool = True) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 32, 32, generator=random)
    labels = torch.randint(0, 2, (size, 3), generator=random).float()
    single = torch.arange(size) % 3
    return {"images": images, "labels": labels if multi_label else single}


def test_the_classifier_is_registered() -> None:
    assert MODELS.get("Classifier") is Classifier


def test_multi_label_loss_is_binary_cross_entropy_of_known_labels() -> None:
    model, given = tiny(positive_weights={"Mass": 3.0}).eval(), batch()
    known = torch.ones(6, 3, dtype=torch.bool)
    known[0, 1] = known[4, 2] = False
    output = model({**given, "labels_known": known})
    p = output["logits"].double().sigmoid()
    expected = 0.0
    for i in range(6):
        for k in range(3):
            if known[i, k]:
                y, weight = float(given["labels"][i, k]), 3.0 if k == 1 else 1.0
                expected -= weight * y * p[i, k].log() + (1 - y) * (1 - p[i, k]).log()
    torch.testing.assert_close(output["loss"].double(), expected / 18, rtol=1e-5, atol=1e-7)


def test_an_unknown_label_has_no_gradient() -> None:
    model, given = tiny(), batch()
    known = torch.ones(6, 3, dtype=torch.bool)
    known[:, 1] = False
    model({**given, "labels_known": known})["loss"].backward()
    gradient = model.head[-1].weight.grad
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0


def test_single_label_loss_is_cross_entropy() -> None:
    model = tiny(multi_label=False, positive_weights={"Nodule": 2.0}).eval()
    given = batch(multi_label=False)
    output = model(given)
    logs = output["logits"].double().log_softmax(dim=1)
    weights = [1.0, 1.0, 2.0]
    losses = [-weights[int(y)] * logs[i, int(y)] for i, y in enumerate(given["labels"])]
    torch.testing.assert_close(output["loss"].double(), sum(losses) / 6, rtol=1e-5, atol=1e-7)


def test_the_loss_of_a_batch_is_the_mean_of_its_halves() -> None:
    model, given = tiny(multi_label=False, positive_weights={"Mass": 5.0}).eval(), batch(6)
    given["labels"] = torch.tensor([0, 1, 1, 2, 2, 2])
    halves = [{key: value[rows] for key, value in given.items()} for rows in ([0, 1, 2], [3, 4, 5])]
    mean = sum(model(half)["loss"] for half in halves) / 2
    torch.testing.assert_close(model(given)["loss"], mean)


def test_balanced_weights_follow_the_counts_of_the_training_split() -> None:
    spec = DataSpec(labels=LABELS, multi_label=True, positives=(2, 10, 0), negatives=(8, 0, 10))
    model = tiny(spec=spec, positive_weights="balanced")
    assert model.positive_weights.tolist() == [4.0, 1.0, 1.0]
    spec = DataSpec(labels=LABELS, positives=(1, 3, 2), negatives=(5, 3, 4))
    model = tiny(spec=spec, positive_weights="balanced")
    torch.testing.assert_close(model.positive_weights, torch.tensor([2.0, 2 / 3, 1.0]))


def test_class_weights_come_from_the_checkpoint() -> None:
    """Regardless of the split for which an evaluation builds the model."""
    trained = tiny(positive_weights={"Mass": 3.0})
    other = tiny(positive_weights="balanced")
    other.load_state_dict(trained.state_dict())
    assert other.positive_weights.tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize(("hidden", "shapes"), [(None, [(3, 1024), (3,)]), (7, None)])
def test_the_head_is_linear_or_has_one_hidden_layer(hidden: int | None, shapes: Any) -> None:
    head = tiny(hidden=hidden, dropout=0.1).head
    expected = shapes or [(7, 1024), (7,), (3, 7), (3,)]
    assert [tuple(p.shape) for p in head.parameters()] == expected


def test_several_images_are_averaged() -> None:
    model, given = tiny().eval(), batch(4)
    images = given["images"].view(2, 2, 3, 32, 32)
    mask = torch.tensor([[True, True], [True, False]])
    found = model({"images": images, "images_mask": mask})
    single = model({"images": given["images"]})["visual_backbone"]
    expected = torch.stack([(single[0] + single[1]) / 2, single[2]])
    torch.testing.assert_close(found["visual_backbone"], expected)
    assert "loss" not in found


def state(model: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: Classifier) -> set[str]:
    """The top-level layers whose weights or statistics a training step changes."""
    before = state(model)
    optimizer = make_optimizer(model.train(), TrainorSection(optim_params={"lr": 0.01}))
    model(batch())["loss"].backward()
    optimizer.step()
    after = state(model)
    names = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {name.split(".")[2] if name.startswith("cnn.") else "head" for name in names}


def test_freezing_up_to_a_layer_keeps_weights_and_statistics() -> None:
    every = {"conv1", "stage2", "stage3", "stage4", "conv5", "head"}
    assert changed(tiny()) == every
    assert changed(tiny(freeze="all")) == {"head"}
    assert changed(tiny(freeze="stage2")) == every - {"conv1", "stage2"}
    inside = tiny(freeze="stage3.1")
    before = state(inside)
    assert changed(inside) == every - {"conv1", "stage2"}
    kept = [f"cnn.network.stage3.{n}.branch2.0.weight" for n in (0, 1, 2)]
    assert [torch.equal(before[k], inside.state_dict()[k]) for k in kept] == [True, True, False]


def test_a_layer_to_freeze_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'stage9' of ShuffleNetV2 does not exist.*stage4"):
        tiny(freeze="stage9")


def test_encoder_and_head_have_own_rates_with_layer_decay() -> None:
    model = tiny(encoder_lr=1e-4, head_lr=1e-2, layer_decay=0.5)
    section = TrainorSection(optim_params={"lr": 1e-3})
    groups = make_optimizer(model, section).param_groups
    blocks = model.cnn.parameters_by_block()
    assert [len(group["params"]) for group in groups] == [*map(len, blocks), 2]
    rates = [group["lr"] for group in groups]
    assert rates[-1] == 1e-2
    assert rates[-2] == pytest.approx(1e-4)
    for lower, upper in pairwise(rates[:-1]):
        assert lower == pytest.approx(upper / 2)
    assert sum(len(b) for b in blocks) == len(list(model.cnn.parameters()))
    names = {id(p): name for name, p in model.cnn.network.named_parameters()}
    assert names[id(blocks[0][0])] == "conv1.0.weight"
    assert any(names[id(p)].startswith("conv5") for p in blocks[-1])


def test_a_single_rate_makes_one_group() -> None:
    assert len(make_optimizer(tiny(), TrainorSection()).param_groups) == 1


def test_a_schedule_keeps_the_ratio_of_rates() -> None:
    model = tiny(encoder_lr=1e-4, head_lr=1e-2)
    section = TrainorSection(optim_params={"lr": 1e-3}, lr_decay="OneCycleLR")
    optimizer = make_optimizer(model, section)
    schedule = Schedule(optimizer, section, 10, better="lower")
    assert [group["max_lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-2])
    for _ in range(4):
        optimizer.step()
        schedule.after_step()
        encoder, head = (group["lr"] for group in optimizer.param_groups)
        assert head == pytest.approx(100 * encoder)


def test_a_resumed_run_uses_the_current_rates() -> None:
    section = TrainorSection(optim_params={"lr": 1e-3})
    before = make_optimizer(tiny(encoder_lr=1e-4), section)
    before.param_groups[0]["lr"] /= 4  # changed by a schedule
    after = make_optimizer(tiny(encoder_lr=2e-4), section)
    restore_optimizer(after, before.state_dict(), section.optim_params, section)
    assert [g["lr"] for g in after.param_groups] == pytest.approx([2e-4 / 4, 1e-3])


def test_data_without_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learns labels.*dataset\.proto=ImLabel"):
        tiny(spec=DataSpec())
    with pytest.raises(ConfigError, match="the one label 'Edema'"):
        tiny(spec=DataSpec(labels=("Edema",)))
    with pytest.raises(ConfigError, match=r"no such label.*Mass"):
        tiny(positive_weights={"Mas": 1.0})
    with pytest.raises(ConfigError, match="the data set gives none"):
        tiny().train()({"images": torch.zeros(2, 3, 32, 32)})
