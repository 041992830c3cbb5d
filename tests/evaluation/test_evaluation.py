from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.made_up_evaluations import evaluation, random, split_features
from tests.toy_models import ToyData, ToyModel
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import PROMPT_BATCH, Ensemble
from vilmedic.evaluation.features import RawPixels


def networks(*models: torch.nn.Module) -> Ensemble:
    return Ensemble(
        members=[lambda model=model: model for model in models],  # type: ignore[misc]
        dataset=lambda split: ToyData(split),
        loader=lambda data: data.batches(4),
        device=torch.device("cpu"),
        precision="fp32",
    )


def test_splits_are_cached_until_released() -> None:
    model = ToyModel()
    ensemble = networks(model)
    first = ensemble.split("test")
    assert ensemble.split("test") is first
    assert model.seen == [4, 4, 2]
    ensemble.forget()
    assert ensemble.split("test") is not first


def test_texts_are_encoded_in_evaluation_mode_and_compared_like_images() -> None:
    models = [ToyModel(), ToyModel()]
    texts = ["x" * (i % 7 + 1) for i in range(PROMPT_BATCH + 3)]
    data = ToyData()
    alone = networks(models[0]).encode_text(data, texts)
    assert alone is not None
    assert alone.shape == (len(texts), 5)
    assert models[0].training
    ids = data.encode_text(texts)["input_ids"]
    torch.testing.assert_close(alone, models[0].text(ids).mean(dim=1).detach())
    joint = networks(*models)
    both = joint.encode_text(data, texts)
    visual = joint.split("test").features["visual"]
    assert both is not None
    cosines = [
        functional.cosine_similarity(
            networks(m).split("test").features["visual"][:, None],
            m.text(ids).mean(dim=1)[None],
            dim=2,
        )
        for m in models
    ]
    torch.testing.assert_close(visual @ both.T, (cosines[0] + cosines[1]) / 2)


def test_missing_text_is_an_error() -> None:
    assert networks(RawPixels()).encode_text(ToyData(), ["a"]) is None
    assert networks(ToyModel()).encode_text(object(), ["a"]) is None


def test_features_that_are_not_finite_are_named(caplog: pytest.LogCaptureFixture) -> None:
    broken = random(4, 3)
    broken[1, 1] = torch.nan
    run = evaluation(split_features({"visual": broken, "linguistic": random(4, 3)}))
    assert run.feature("visual") is None
    assert "'visual' holds values that are not finite" in caplog.text
    assert run.feature("linguistic") is not None
    assert run.feature("other") is None


def test_unknown_names_are_refused_with_the_nearest() -> None:
    split = split_features({"visual": random(4, 3)}, torch.zeros(4, 2), names=("Mass", "Nodule"))
    run = evaluation(split, split_features({"visual": random(2, 3)}, split="train"))
    run.check_feature("visual", "k")
    with pytest.raises(ConfigError, match=r"k: .*'visuals'.* Allowed: visual\. .*mean 'visual'"):
        run.check_feature("visuals", "k")
    with pytest.raises(ConfigError, match=r"Allowed: Mass, Nodule\. Did you mean 'Nodule'"):
        run.check_label("nodul", "k")
    codes = torch.zeros(4, 3, dtype=torch.int64)
    coded = evaluation(split_features({"codes": codes, "visual": random(4, 3)}))
    coded.check_feature("codes", "k", compared=False)
    with pytest.raises(ConfigError, match=r"k: .*'codes' holds numbers of codes.*Allowed: visual"):
        coded.check_feature("codes", "k")
    assert len(run.other("train")) == 2
    assert run.other("test") is split
    assert run.line_numbers([0, 3]) == [1, 4]
