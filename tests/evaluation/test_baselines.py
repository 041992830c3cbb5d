from __future__ import annotations

import torch

from vilmedic.evaluation.baselines import RawPixels


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


def test_takes_the_first_of_several_images_and_survives_a_flat_one() -> None:
    images = torch.rand(2, 4, 3, 32, 32)
    feature = RawPixels()({"images": images})["visual_backbone"]
    assert torch.equal(feature, RawPixels()({"images": images[:, 0]})["visual_backbone"])
    flat = RawPixels()({"images": torch.ones(1, 3, 32, 32)})["visual_backbone"]
    assert flat.isfinite().all()
    assert RawPixels()({"input_ids": torch.zeros(1, 2)}) == {}
