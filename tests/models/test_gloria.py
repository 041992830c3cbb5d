from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.small_models import several_images, tiny_batch, tiny_cnn, tiny_gloria
from vilmedic.blocks.projection import VisualEmbedder
from vilmedic.errors import ConfigError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.gloria import GLoRIALoss
from vilmedic.models.gloria import GLoRIA
from vilmedic.registry import LOSSES, MODELS

TEXT = ("input_ids", "attention_mask", "word_ids")


def test_the_published_names_are_registered() -> None:
    assert MODELS.get("GLoRIA") is GLoRIA
    assert LOSSES.get("GLoRIALoss") is GLoRIALoss


def test_encode_gives_global_and_local_features() -> None:
    features = tiny_gloria().eval().encode(tiny_batch())
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "visual": (4, 16),
        "regions": (4, 16, 4, 4),
        "visual_backbone": (4, 1024),
        "linguistic": (4, 16),
        "words": (4, 16, 16),
        "word_mask": (4, 16),
    }
    assert "visual_backbone" not in tiny_gloria().train().encode(tiny_batch())


def test_features_are_projections_of_two_layers() -> None:
    model, batch = tiny_gloria().eval(), tiny_batch()
    features = model.encode(batch)
    layers = model.cnn.features(batch["images"], ["stage2", "avgpool"])
    torch.testing.assert_close(
        features["regions"],
        torch.einsum("bchw,dc->bdhw", layers["stage2"], model.local_embedder.weight[:, :, 0, 0]),
    )
    torch.testing.assert_close(features["visual_backbone"], layers["avgpool"])
    torch.testing.assert_close(features["visual"], model.global_embedder(layers["avgpool"]))
    assert model.local_embedder.bias is None


def test_images_are_enlarged_with_aligned_corners() -> None:
    batch = {"images": tiny_batch()["images"]}
    model = tiny_gloria(upsample=64).eval()
    plain = tiny_gloria().eval()
    plain.load_state_dict(model.state_dict())
    enlarged = functional.interpolate(
        batch["images"], size=(64, 64), mode="bilinear", align_corners=True
    )
    features, expected = model.encode(batch), plain.encode({"images": enlarged})
    assert features["regions"].shape == (4, 16, 8, 8)
    for name, value in expected.items():
        torch.testing.assert_close(features[name], value)


def test_prompts_are_encoded_like_reports() -> None:
    model, batch = tiny_gloria().eval(), tiny_batch()
    features = model.encode(batch)
    alone = model.encode_text({name: batch[name] for name in TEXT})
    assert set(alone) == {"linguistic", "words", "word_mask"}
    for name, value in alone.items():
        torch.testing.assert_close(features[name], value)


def test_the_word_mask_excludes_the_closing_token_and_padding() -> None:
    batch = tiny_batch()
    mask = tiny_gloria().eval().encode(batch)["word_mask"]
    assert mask.sum(dim=1).tolist() == (batch["attention_mask"].sum(dim=1) - 1).tolist()
    assert mask[:, 0].all()


def test_a_chunked_batch_has_the_loss_and_gradient_of_the_whole() -> None:
    model = tiny_gloria().eval().double()
    chunked = tiny_gloria(forward_batch_size=2).eval().double()
    chunked.load_state_dict(model.state_dict())
    batch = tiny_batch(5)
    batch["images"] = batch["images"].double()
    whole, parts = model(batch)["loss"], chunked(batch)["loss"]
    torch.testing.assert_close(parts, whole)
    whole.backward()
    parts.backward()
    for (name, a), b in zip(model.named_parameters(), chunked.parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_encoding_has_no_interaction_between_samples() -> None:
    model, batch = tiny_gloria().eval(), tiny_batch(4)
    together = model.encode(batch)
    alone = model.encode({name: value[2:3] for name, value in batch.items()})
    for name, value in alone.items():
        torch.testing.assert_close(together[name][2:3], value, msg=name)


def test_several_images_of_a_study_pool_their_regions() -> None:
    model, batch = tiny_gloria().eval(), several_images(tiny_batch(4))
    images, mask = batch["images"], batch["images_mask"]
    found = model.encode(batch)
    assert found["regions"].shape == (4, 16, 3, 4, 4)
    assert torch.equal(found["region_mask"], mask)
    similarity = model.local_similarity(
        found["regions"],
        found["words"],
        found["word_mask"],
        aggregation="sum",
        region_mask=found["region_mask"],
    )
    for row in range(4):
        single = model.encode({"images": images[row, mask[row]]})
        regions = single["regions"]
        torch.testing.assert_close(found["regions"][row].transpose(0, 1)[mask[row]], regions)
        torch.testing.assert_close(found["visual_backbone"][row], single["visual_backbone"].mean(0))
        torch.testing.assert_close(found["visual"][row], single["visual"].mean(0))
        side_by_side = regions.transpose(0, 1).flatten(1)[None]
        expected = model.local_similarity(
            side_by_side, found["words"], found["word_mask"], aggregation="sum"
        )
        torch.testing.assert_close(similarity[row], expected[0])
    first = model.attention(found["regions"], found["words"], found["word_mask"])
    alone = model.attention(found["regions"][:, :, 0], found["words"], found["word_mask"])
    assert torch.equal(first, alone)
    terms, one = model.contrast(found), tiny_batch(4)
    assert terms["loss"] != model(one)["loss"]
    counts = {"host_image_count": [1, 2, 3, 1]}
    torch.testing.assert_close(model.encode(batch | counts), found)


def test_a_study_with_one_image_equals_that_image() -> None:
    model, batch = tiny_gloria().eval(), tiny_batch(4)
    mask = torch.tensor([[True, False]] * 4)
    images = torch.stack((batch["images"], torch.zeros_like(batch["images"])), dim=1)
    study = model({**batch, "images": images, "images_mask": mask})
    torch.testing.assert_close(study, model(batch))


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model, batch = tiny_gloria().train(), tiny_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_attention_follows_the_paper() -> None:
    model = tiny_gloria().eval()
    features = model.encode(tiny_batch())
    mask = features["word_mask"]
    maps = model.attention(features["regions"], features["words"], mask)
    assert maps.shape == (4, 16, 4, 4)
    for sample in range(4):
        words = features["words"][sample][mask[sample]]
        regions = features["regions"][sample].flatten(1)
        over_words = torch.softmax(regions.T @ words.T, dim=1)
        expected = torch.softmax(4.0 * over_words, dim=0).T
        torch.testing.assert_close(maps[sample][mask[sample]].flatten(1), expected)


@pytest.mark.parametrize("aggregation", ["sum", "max"])
def test_local_similarity_covers_every_pair(aggregation: Any) -> None:
    model = tiny_gloria().eval()
    features = model.encode(tiny_batch())
    regions, words, mask = (features[name] for name in ("regions", "words", "word_mask"))
    found = model.local_similarity(regions, words, mask, aggregation=aggregation)
    for image in range(4):
        for report in range(4):
            kept = words[report][mask[report]]
            if aggregation == "max":
                kept = kept[1:]  # the published evaluation has no opening token
            maps = model.attention(
                regions[image][None], kept[None], torch.ones(1, len(kept)).bool()
            )
            context = maps[0].flatten(1) @ regions[image].flatten(1).T
            scores = 5.0 * functional.cosine_similarity(kept, context, dim=1)
            expected = scores.logsumexp(0) if aggregation == "sum" else scores.max()
            torch.testing.assert_close(found[image, report], expected)


def test_a_text_without_words_is_compared_by_its_opening_token() -> None:
    model = tiny_gloria().eval()
    features = model.encode(tiny_batch())
    regions, words, mask = (features[name] for name in ("regions", "words", "word_mask"))
    empty = mask.clone()
    empty[1, 1:] = False
    found = model.local_similarity(regions, words, empty, aggregation="max")
    alone = model.local_similarity(regions, words[1:2, :1], empty[1:2, :1], aggregation="max")
    torch.testing.assert_close(found[:, 1:2], alone)
    others = model.local_similarity(regions, words, mask, aggregation="max")
    torch.testing.assert_close(found[:, [0, 2, 3]], others[:, [0, 2, 3]])


def test_missing_images_or_reports_are_refused() -> None:
    model, batch = tiny_gloria().eval(), tiny_batch()
    with pytest.raises(ConfigError, match="no reports"):
        model.contrast(model.encode({"images": batch["images"]}))
    with pytest.raises(ConfigError, match="no images"):
        model.contrast(model.encode({name: batch[name] for name in TEXT}))
    with pytest.raises(ConfigError, match="or several per sample with a mask"):
        model.encode({"images": batch["images"].unsqueeze(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_layer": "layer3"}, r"^local_layer: the layer 'layer3'.*does not exist"),
        ({"local_layer": "stage4"}, r"interm_feature_dim: given 48.*gives 192.*Set 192"),
        ({"local_layer": "avgpool"}, r"^local_layer: 'avgpool'.*gives no map of regions"),
        (
            {"visual_embedder": VisualEmbedder(interm_feature_dim=48, feature_dim=512)},
            r"feature_dim: given 512.*Set 1024",
        ),
        (
            {"cnn": tiny_cnn(output_layer="conv1"), "local_layer": "stage2"},
            r"'stage2'.*lies behind output_layer",
        ),
        ({"loss": ConVIRTLoss()}, r"^loss: given ConVIRTLoss\. Allowed: GLoRIALoss"),
    ],
)
def test_inconsistent_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_gloria(**settings)


def test_resnet_has_the_published_layers() -> None:
    cnn = tiny_cnn(backbone="resnet18")
    embedder = VisualEmbedder(interm_feature_dim=256, feature_dim=512)
    model = tiny_gloria(cnn=cnn, visual_embedder=embedder, local_layer="layer3", upsample=299)
    features = model.eval().encode({"images": torch.zeros(1, 3, 32, 32)})
    assert features["regions"].shape == (1, 16, 19, 19)


def test_counting_words_on_the_host_does_not_change_results() -> None:
    """On a GPU the host counts them, so that the loss does not read the mask."""
    batch = tiny_batch(6)
    told: dict[str, Any] = batch | {"host_word_count": (batch["word_ids"].amax(1) + 1).tolist()}
    for chunks in (None, 2):
        found = []
        for given in (batch, told):
            torch.manual_seed(0)
            model = tiny_gloria(forward_batch_size=chunks).train()
            output = model(given)
            output["loss"].backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append([output["loss"], *gradients])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
