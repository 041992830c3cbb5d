from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.small_dalles import save_vae, tiny_dalle
from tests.small_models import tiny_batch, tiny_convirt, tiny_gloria, tiny_simclr, tiny_views
from tests.toy_models import ToyAutoencoder
from vilmedic.losses.barlow_twins import BarlowTwinsLoss
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.losses.vicreg import VICRegLoss
from vilmedic.training.health import (
    StuckWarning,
    contrastive_diagnostics,
    duplicates,
    feature_std,
    in_batch_r1,
    observing,
    warn_of_collapsed_codes,
)

HEALTHY = {
    "loss_over_ln_batch": 0.5,
    "feature_std_visual": 0.9,
    "feature_std_linguistic": 0.9,
    "duplicate_reports": 0.0,
}
AT_CHANCE = HEALTHY | {"loss_over_ln_batch": 0.995}


def warnings(numbers: dict[str, float], steps: int = 400, every: int = 10) -> list[tuple[int, str]]:
    watch = StuckWarning(patience=100)
    found = ((step, watch.look(step, numbers)) for step in range(every, steps + 1, every))
    return [(step, text) for step, text in found if text]


def test_a_healthy_run_gives_no_warning() -> None:
    assert warnings(HEALTHY) == []
    assert warnings({}) == []


@pytest.mark.parametrize(
    ("numbers", "cause"),
    [
        ({"feature_std_linguistic": 0.02}, "The 'linguistic' features have collapsed"),
        ({"duplicate_reports": 0.6}, "60% of the reports of a batch repeat another"),
        ({}, "Check that line n of the image file and line n of the report file are one sample"),
    ],
)
def test_the_cause_is_named(
    numbers: dict[str, float], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = warnings(AT_CHANCE | numbers)
    assert cause in found[0][1]
    assert cause in caplog.text
    assert "Nothing was learned in the last 100 steps" in found[0][1]


def test_warnings_wait_for_patience_then_twice_as_long() -> None:
    assert [step for step, _ in warnings(AT_CHANCE, steps=700)] == [110, 210, 410]


def test_few_logged_steps_give_no_warning() -> None:
    assert warnings(AT_CHANCE, steps=400, every=100) == []


def test_warnings_end_when_the_run_learns() -> None:
    watch = StuckWarning(patience=100)
    for step in range(10, 120, 10):
        watch.look(step, AT_CHANCE)
    later = [watch.look(step, HEALTHY) for step in range(120, 2000, 10)]
    assert later == [None] * len(later)


def test_recall_counts_rows_whose_partner_is_nearest_in_both_directions() -> None:
    one = torch.eye(4)
    other = torch.eye(4)[[0, 1, 3, 2]]
    assert in_batch_r1(one, one) == 1.0
    assert in_batch_r1(one, other) == 0.5
    # The nearest report of image 0 is report 1; the nearest image of report 0 is image 0.
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.nn.functional.normalize(torch.tensor([[1.0, 1.2], [1.0, 1.0]]), dim=1)
    similarity = (first @ second.T).tolist()
    right = (similarity[0][0] > similarity[0][1]) + (similarity[1][1] > similarity[1][0])
    down = (similarity[0][0] > similarity[1][0]) + (similarity[1][1] > similarity[0][1])
    assert in_batch_r1(first, second) == (right + down) / 4


def test_collapsed_features_do_not_count_as_recall() -> None:
    same = torch.ones(5, 3) / math.sqrt(3)
    assert in_batch_r1(same, same) == 0.0


def test_feature_std_is_one_on_the_sphere_and_zero_when_collapsed() -> None:
    random = torch.nn.functional.normalize(torch.randn(4000, 32), dim=1)
    assert feature_std(random) == pytest.approx(1.0, abs=0.02)
    assert feature_std(random[:1].expand(10, 32)) == 0.0


def test_duplicates() -> None:
    assert duplicates(torch.tensor([[1, 2], [1, 2], [3, 4], [1, 2]])) == 0.5
    assert duplicates(torch.tensor([[1], [2]])) == 0.0


@pytest.mark.parametrize(
    ("make", "batch", "temperature", "names"),
    [
        (tiny_convirt, tiny_batch, 0.1, ("visual", "linguistic")),
        (tiny_gloria, tiny_batch, 0.1, ("visual", "regions")),
        (tiny_simclr, tiny_views, 0.5, ("visual", "visual_second")),
    ],
)
def test_each_system_gives_its_numbers(make, batch, temperature, names) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, data = make(), batch(6)
    with observing(model, wanted=True) as observed:
        loss = model(data)["loss"].item()

    numbers = contrastive_diagnostics(model, observed.features, loss, data, len(data["index"]))

    assert numbers["loss_over_ln_batch"] == pytest.approx(loss / model.chance_loss(6))
    assert 0 <= numbers["in_batch_r1"] <= 1
    assert numbers["temperature"] == pytest.approx(temperature)
    assert {name for name in numbers if name.startswith("feature_std_")} == {
        f"feature_std_{name}" for name in names if name != "regions"
    } | ({"feature_std_linguistic"} if "regions" in names else set())
    assert ("duplicate_reports" in numbers) == ("input_ids" in data)


@pytest.mark.parametrize("make", [tiny_convirt, tiny_simclr, tiny_gloria])
def test_chance_is_the_loss_of_uninformative_features(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = make()
    data = tiny_views(5) if make is tiny_simclr else tiny_batch(5)
    with torch.no_grad(), observing(model, wanted=True) as observed:
        model(data)
    same = {
        name: value if value.dtype == torch.bool else value[:1].expand_as(value)
        for name, value in observed.features.items()
    }
    if "word_mask" in same:
        same["word_mask"] = same["word_mask"][:1].expand_as(same["word_mask"])
    if "visual_second" in same:
        same["visual_second"] = same["visual"]
    loss = model.contrast(same)["loss"].item()
    assert loss == pytest.approx(model.chance_loss(5), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "temperature", "chance"),
    [
        (InfoNCELoss(tau=0.2), 0.2, math.log(6)),
        (SigLIPLoss(scale=5.0), 0.2, math.log(6) + 5 * math.log(6 / 5)),
        (NTXentLoss(tau=0.2), 0.2, math.log(11)),
        (ConVIRTLoss(tau=0.2), 0.2, math.log(6)),
        (VICRegLoss(), None, None),
        (BarlowTwinsLoss(), None, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("make", [tiny_convirt, tiny_simclr])
def test_each_loss_gives_its_temperature_and_chance(make, loss, temperature, chance) -> None:  # type: ignore[no-untyped-def]
    features = {name: torch.randn(6, 8) for name in ("visual", "linguistic", "visual_second")}
    model = make(loss=loss)
    numbers = contrastive_diagnostics(model, features | model.learned(), 3.0, {}, 6)
    expected = None if temperature is None else pytest.approx(temperature)
    assert numbers.get("temperature") == expected
    ratio = numbers.get("loss_over_ln_batch")
    assert ratio == (None if chance is None else pytest.approx(3.0 / chance))
    assert 0 <= numbers["in_batch_r1"] <= 1


def test_observing_has_no_side_effects_and_ends() -> None:
    torch.manual_seed(0)
    model, data = tiny_convirt().eval(), tiny_batch(4)
    plain = model(data)["loss"]
    with observing(model, wanted=True) as observed:
        watched = model(data)["loss"]
    assert torch.equal(plain, watched)
    assert not observed.features["visual"].requires_grad
    assert "contrast" not in vars(model)
    with observing(model, wanted=False) as nothing:
        model(data)
    assert nothing.features == {}


def test_other_models_are_not_observed() -> None:
    with observing(ToyAutoencoder(), wanted=True) as observed:
        pass
    assert observed.features == {}


def test_a_collapsed_codebook_is_reported_before_dalle_trains(tmp_path: Path) -> None:
    model = tiny_dalle(save_vae(tmp_path / "vae.pth", num_tokens=512))
    even = torch.arange(512).view(32, 16)
    assert warn_of_collapsed_codes(model, even.split(8)) is None
    text = warn_of_collapsed_codes(model, torch.full_like(even, 7).split(8))
    assert text is not None
    assert f"model.vae.ckpt={tmp_path}/vae.pth has collapsed: on 32 images it uses 1 of 512" in text
