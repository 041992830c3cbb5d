from __future__ import annotations

import pytest
import torch

from tests.small_models import several_images, tiny_cnn, tiny_simclr, tiny_views
from vilmedic.blocks.projection import VisualProjection
from vilmedic.errors import ConfigError
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.learned import LearnedLoss
from vilmedic.losses.ntxent import NTXentLoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.models.simclr import SimCLR
from vilmedic.registry import LOSSES, MODELS


def test_the_published_names_are_registered() -> None:
    assert MODELS.get("SimCLR") is SimCLR
    assert LOSSES.get("NTXentLoss") is NTXentLoss


def test_each_view_is_embedded_independently() -> None:
    model, batch = tiny_simclr(), tiny_views()
    for _ in range(20):  # with fresh running statistics all embeddings are nearly equal
        model(batch)
    features = model.eval().encode(batch)
    first = model.encode({"images": batch["images"][:, 0]})
    second = model.encode({"images": batch["images"][:, 1]})
    assert features["visual"].shape == (4, 8)
    assert features["visual_backbone"].shape == (4, 1024)
    for name, expected in (
        ("visual", first["visual"]),
        ("visual_backbone", first["visual_backbone"]),
        ("visual_second", second["visual"]),
    ):
        torch.testing.assert_close(features[name], expected)
    assert not torch.allclose(features["visual"], features["visual_second"])


def test_the_representation_is_the_input_of_the_head() -> None:
    model = tiny_simclr().eval()
    features = model.encode(tiny_views())
    projected = model.projection.visual(features["visual_backbone"])
    torch.testing.assert_close(features["visual"], projected)


@pytest.mark.parametrize("loss", [InfoNCELoss(), SigLIPLoss()])
def test_learned_loss_parameters_pass_through_the_features(loss: LearnedLoss) -> None:
    model = tiny_simclr(loss=loss).eval()
    features = model.encode(tiny_views())
    given = {name: torch.tensor(0.5, requires_grad=True) for name in loss.learns}
    assert [name for name, value in features.items() if value.ndim == 0] == list(loss.learns)
    model.contrast(features | given)["loss"].backward()
    assert all(value.grad is not None for value in given.values())
    assert all(weight.grad is None for weight in loss.parameters())


def test_the_head_has_the_published_shape() -> None:
    projection = VisualProjection(visual_embedding_dim=2048, projection_dim=768)
    shapes = [tuple(parameter.shape) for parameter in projection.parameters()]
    assert shapes == [(768, 2048), (768,), (768, 768), (768,)]


def test_one_view_gives_embeddings_but_no_loss() -> None:
    model = tiny_simclr().eval()
    features = model.encode({"images": torch.randn(3, 3, 32, 32)})
    assert set(features) == {"visual", "visual_backbone"}
    with pytest.raises(ConfigError, match=r"two views.*dataset\.views=2"):
        model.contrast(features)


def test_both_views_share_batch_statistics_in_training() -> None:
    model, batch = tiny_simclr().train(), tiny_views()
    features = model.encode(batch)
    assert set(features) == {"visual", "visual_second"}
    together = model.projection.visual(model.cnn.pooled(batch["images"].flatten(0, 1)))
    torch.testing.assert_close(features["visual_second"], together[1::2])


def test_a_chunked_batch_has_the_loss_of_the_whole() -> None:
    model, batch = tiny_simclr(), tiny_views(6)
    for _ in range(5):  # with fresh running statistics the features hardly depend on the image
        model(batch)
    whole = model.eval()(batch)["loss"]
    chunked = tiny_simclr(forward_batch_size=2).eval()
    chunked.load_state_dict(model.state_dict())
    assert len(list(chunked.chunks(batch))) == 3
    torch.testing.assert_close(chunked(batch)["loss"], whole)
    halves = [model({"images": part})["loss"] for part in batch["images"].split(3)]
    assert abs(sum(halves) / 2 - whole) > 0.1


def test_the_loss_is_lower_for_views_that_agree() -> None:
    model, batch = tiny_simclr().train(), tiny_views(6)
    same = {"images": batch["images"][:, :1].expand(-1, 2, -1, -1, -1)}
    assert model(same)["loss"] < model(batch)["loss"] - 0.1


def test_gradients_reach_every_parameter() -> None:
    model = tiny_simclr().train()
    model(tiny_views())["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_a_batch_of_one_has_no_loss() -> None:
    with pytest.raises(ValueError, match="at least two"):
        tiny_simclr().eval()(tiny_views(1))


def test_unsuitable_data_is_refused() -> None:
    model, images = tiny_simclr(), torch.zeros(2, 3, 3, 32, 32)
    with pytest.raises(ConfigError, match="gives none"):
        model.encode({"input_ids": torch.zeros(2, 4)})
    with pytest.raises(ConfigError, match="gives 3"):
        model.encode({"images": images})
    mask = torch.ones(2, 3).bool()
    with pytest.raises(ConfigError, match="gives 3"):
        model.encode({"images": torch.zeros(2, 3, 3, 3, 32, 32), "images_mask": mask})


def test_image_features_of_a_study_are_averaged() -> None:
    model, batch = tiny_simclr().eval(), several_images(tiny_views(3))
    images, mask = batch["images"], batch["images_mask"]
    found = model.encode(batch)
    for view, name in enumerate(("visual", "visual_second")):
        for row in range(3):
            backbone = model.cnn.pooled(images[row, mask[row], view]).mean(dim=0, keepdim=True)
            expected = model.projection.visual(backbone)[0]
            torch.testing.assert_close(found[name][row], expected)
    plain = model.encode({"images": images[:, :, 0], "images_mask": mask})
    torch.testing.assert_close(plain["visual"], found["visual"])
    assert "visual_second" not in plain
    counts = {"host_image_count": [1, 2, 3]}  # as on a GPU, to avoid a sync
    torch.testing.assert_close(model.encode(batch | counts), found)


def test_a_wrong_head_width_names_the_right_one() -> None:
    projection = VisualProjection(visual_embedding_dim=512, projection_dim=8)
    with pytest.raises(ConfigError, match=r"visual_embedding_dim: given 512.*Set 1024"):
        SimCLR(cnn=tiny_cnn(), projection=projection, loss=NTXentLoss())
