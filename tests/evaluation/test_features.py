from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conversions import WeightConversions
from tests.made_up_evaluations import random
from tests.toy_models import LABELS, ToyAutoencoder, ToyData, ToyModel
from vilmedic.errors import DataError
from vilmedic.evaluation.features import RawPixels, SplitFeatures, collect, ensemble

CPU = torch.device("cpu")


def run(model: torch.nn.Module, data: ToyData, batch_size: int = 4, **options: object):  # type: ignore[no-untyped-def]
    return collect(
        model,
        data,
        data.batches(batch_size),
        split=data.split,
        device=CPU,
        **{"precision": "fp32", **options},  # type: ignore[arg-type]
    )


def test_features_do_not_depend_on_the_batch_size() -> None:
    model, data = ToyModel(), ToyData(size=10)
    whole, parts = run(model, data, 10), run(model, data, 3)
    assert whole.index.tolist() == list(range(10))
    assert sorted(whole.features) == ["linguistic", "visual", "visual_backbone"]
    for name, value in whole.features.items():
        assert value.dtype == torch.float32
        assert not value.requires_grad
        torch.testing.assert_close(parts.features[name], value)
    expected = data.prepare({"images": data.images})["images"].flatten(1)
    torch.testing.assert_close(whole.features["visual_backbone"], expected)
    assert whole.labels is not None
    assert np.array_equal(whole.labels.toarray(), data.targets)
    assert whole.labels.nnz == data.targets.sum()
    assert whole.label_names == LABELS


def test_the_loss_is_the_mean_over_samples_without_a_last_batch_of_one() -> None:
    model, data = ToyModel().eval(), ToyData(size=9)
    result = run(model, data, 4)
    assert len(result) == 9
    assert model.seen == [4, 4, 1]
    losses = []
    for batch in list(data.batches(4))[:2]:
        with torch.no_grad():
            losses.append(model(data.prepare(batch))["loss"].item())
    assert result.loss == pytest.approx(sum(losses) / 2)
    uneven = run(model, ToyData(size=10), 4)
    losses = [
        (len(b["index"]), model(ToyData().prepare(b))["loss"].item())
        for b in ToyData(size=10).batches(4)
    ]
    assert uneven.loss == pytest.approx(sum(n * loss for n, loss in losses) / 10)


def test_missing_loss_inputs_give_no_loss_but_features() -> None:
    result = run(ToyModel(), ToyData(reports=False, labels=False))
    assert result.loss is None
    assert result.labels is None
    assert sorted(result.features) == ["visual", "visual_backbone"]
    assert run(ToyModel(), ToyData(size=1)).loss is None


def test_weights_are_converted_once_in_a_whole_pass() -> None:
    model = ToyModel()
    model.requires_grad_(False)
    with WeightConversions(model) as seen:
        result = run(model, ToyData(size=10), 3, precision="bf16")
    assert len(result) == 10
    assert seen.counts == {"0.image.weight": 1, "0.image.bias": 1}
    assert not any(weight.requires_grad for weight in model.parameters())


def test_modes_of_all_modules_are_restored_even_after_an_error() -> None:
    model = ToyModel()
    before = {module: module.training for module in model.modules()}
    run(model, ToyData())
    assert {module: module.training for module in model.modules()} == before
    assert not model.norm.training
    model.seen = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        run(model, ToyData())
    assert {module: module.training for module in model.modules()} == before


def test_only_vectors_are_kept_unless_named() -> None:
    data = ToyData(size=5)
    result = run(ToyAutoencoder(), data, 2)
    assert sorted(result.features) == ["code"]
    images = data.prepare({"images": data.images})["images"]
    means = [images[rows].mean() * len(rows) for rows in torch.arange(5).split(2)]
    assert result.loss == pytest.approx((sum(means) / 5).item())
    result = run(ToyAutoencoder(), data, 2, keep=["reconstruction"])
    torch.testing.assert_close(result.features["reconstruction"], images)
    assert run(ToyModel(), data, keep=["map"]).features["map"].shape == (5, 2, 48)


def test_single_labels_become_multi_hot() -> None:
    data = ToyData(multi_label=False)
    result = run(ToyModel(), data)
    assert result.labels is not None
    assert result.labels.sum(axis=1).tolist() == [1] * 10
    assert np.array_equal(result.labels.toarray()[:, 1], data.targets[:, 1])
    assert not result.multi_label


def test_features_can_be_used_for_training() -> None:
    features = run(ToyModel(), ToyData()).features["visual"]
    layer = torch.nn.Linear(5, 1)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_reduced_precision_stays_close() -> None:
    model, data = ToyModel(), ToyData()
    exact, rough = run(model, data), run(model, data, precision="bf16")
    assert rough.features["visual"].dtype == torch.float32
    assert not torch.equal(exact.features["visual"], rough.features["visual"])
    torch.testing.assert_close(
        exact.features["visual"], rough.features["visual"], atol=0.05, rtol=0.05
    )


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(DataError, match="'test' has no samples"):
        run(ToyModel(), ToyData(size=0))


def make(seed: int, loss: float | None) -> SplitFeatures:
    return SplitFeatures(
        split="test",
        index=torch.arange(6),
        features={"visual": random(6, 4, seed=seed), "linguistic": random(6, 4, seed=seed + 50)},
        loss=loss,
    )


def test_an_ensemble_averages_losses_and_cosine_similarities() -> None:
    members = [make(1, 2.0), make(2, 3.0), make(3, 7.0)]
    joint = ensemble(members)
    assert joint.loss == 4.0
    similarity = joint.features["visual"] @ joint.features["linguistic"].T
    expected = sum(
        torch.nn.functional.cosine_similarity(
            m.features["visual"][:, None], m.features["linguistic"][None], dim=2
        )
        for m in members
    )
    torch.testing.assert_close(similarity, expected / 3)
    norms = joint.features["visual"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(6))


def test_one_model_keeps_its_features_and_a_missing_loss_stays_missing() -> None:
    alone = make(1, None)
    assert ensemble([alone]) is alone
    assert ensemble([make(1, 2.0), make(2, None)]).loss is None


def test_pixels_are_grey_averaged_and_standardised() -> None:
    images = torch.rand(3, 3, 64, 64)
    feature = RawPixels()({"images": images})["visual_backbone"]
    assert feature.shape == (3, 1024)
    torch.testing.assert_close(feature.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(feature.std(dim=1), torch.ones(3))
    grey = images.mean(dim=1)
    small = grey.reshape(3, 32, 2, 32, 2).mean(dim=(2, 4)).flatten(1)
    correlation = torch.corrcoef(torch.stack([small[0], feature[0]]))[0, 1]
    assert correlation > 0.9999
    brighter = RawPixels()({"images": 0.5 * images + 3})["visual_backbone"]
    torch.testing.assert_close(brighter, feature, atol=1e-3, rtol=0)


def test_pixel_features_use_the_first_image_and_allow_constant_ones() -> None:
    images = torch.rand(2, 4, 3, 32, 32)
    feature = RawPixels()({"images": images})["visual_backbone"]
    assert torch.equal(feature, RawPixels()({"images": images[:, 0]})["visual_backbone"])
    flat = RawPixels()({"images": torch.ones(1, 3, 32, 32)})["visual_backbone"]
    assert flat.isfinite().all()
    assert RawPixels()({"input_ids": torch.zeros(1, 2)}) == {}
