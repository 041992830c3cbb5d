from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaModel

from tests.small_models import (
    tiny_batch,
    tiny_cnn,
    tiny_convirt,
    tiny_encoder,
    tiny_spec,
)
from vilmedic.blocks.projection import PairedProjection
from vilmedic.blocks.text import TextEncoder
from vilmedic.blocks.vision import VisionEncoder
from vilmedic.config.load import check_arguments
from vilmedic.errors import ArgumentError, ConfigError
from vilmedic.losses.convirt import ConVIRTLoss
from vilmedic.losses.info_nce import InfoNCELoss
from vilmedic.losses.learned import LearnedLoss
from vilmedic.losses.siglip import SigLIPLoss
from vilmedic.losses.vicreg import VICRegLoss
from vilmedic.models.convirt import ConVIRT


@pytest.fixture
def model() -> ConVIRT:
    torch.manual_seed(0)
    return tiny_convirt()


def test_forward_is_the_loss_of_encoded_features(model: ConVIRT) -> None:
    model.eval()
    features = model.encode(tiny_batch())
    out = model(tiny_batch())
    expected = ConVIRTLoss()(features["visual"], features["linguistic"])
    assert out.keys() == {"loss", "image_to_text", "text_to_image"}
    torch.testing.assert_close(out["loss"], expected["loss"])


@pytest.mark.parametrize("loss", [InfoNCELoss(), SigLIPLoss()])
def test_learned_loss_parameters_pass_through_the_features(loss: LearnedLoss) -> None:
    model = tiny_convirt(loss=loss)
    features = model.eval().encode(tiny_batch())
    assert [name for name, value in features.items() if value.ndim == 0] == list(loss.learns)
    out = model.contrast(features)
    torch.testing.assert_close(
        out["loss"], loss(features["visual"], features["linguistic"])["loss"]
    )
    given = {name: torch.tensor(0.5, requires_grad=True) for name in loss.learns}
    model.contrast(features | given)["loss"].backward()
    assert all(value.grad is not None for value in given.values())
    assert all(weight.grad is None for weight in loss.parameters())


def test_learned_temperature_is_clamped_at_each_step() -> None:
    model = tiny_convirt(loss=InfoNCELoss())
    model.loss.log_temperature.data.fill_(-9.0)
    assert model.schedule(1) == {}
    assert model.encode(tiny_batch())["temperature"].item() == pytest.approx(0.01)


def test_every_parameter_gets_a_gradient(model: ConVIRT) -> None:
    model(tiny_batch())["loss"].backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    # The gradient of the key bias is zero by construction, but not missing.
    assert without == []


def test_training_lowers_the_loss(model: ConVIRT) -> None:
    model.train()
    model.encoder.eval()  # no dropout, so that eight pairs can be memorised
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(100):
        loss = model(tiny_batch(8))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_backbone_features_are_returned_only_in_evaluation(model: ConVIRT) -> None:
    assert model.train().encode(tiny_batch()).keys() == {"visual", "linguistic"}
    features = model.eval().encode(tiny_batch())
    assert features["visual_backbone"].shape == (4, 1024)
    torch.testing.assert_close(
        model.projection.visual(features["visual_backbone"]), features["visual"]
    )


def test_prompts_are_encoded_like_reports(model: ConVIRT) -> None:
    model.eval()
    batch = tiny_batch()
    prompts = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(
        model.encode_text(prompts)["linguistic"], model.encode(batch)["linguistic"]
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 100])
def test_chunks_do_not_change_evaluation(model: ConVIRT, size: int) -> None:
    model.eval()
    expected = model(tiny_batch(7))["loss"]
    model.forward_batch_size = size
    torch.testing.assert_close(model(tiny_batch(7))["loss"], expected)


def test_chunks_are_balanced_and_within_the_limit() -> None:
    model = tiny_convirt(forward_batch_size=4)
    sizes = [len(chunk["images"]) for chunk in model.chunks(tiny_batch(9))]
    assert sizes == [3, 3, 3]
    together = torch.cat([chunk["index"] for chunk in model.chunks(tiny_batch(9))])
    assert together.tolist() == list(range(9))


def test_forward_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="forward_batch_size: given 0; allowed: integer >= 1"):
        check_arguments(ConVIRT, {"forward_batch_size": 0})


def test_several_images_are_averaged_and_padding_is_ignored(model: ConVIRT) -> None:
    model.eval()
    single = tiny_batch(3)["images"]
    images = torch.full((2, 2, 3, 32, 32), float("nan"))
    images[0] = single[:2]
    images[1, 0] = single[2]
    mask = torch.tensor([[True, True], [True, False]])
    batch = {"images": images, "images_mask": mask}
    backbone = model.encode(batch)["visual_backbone"]
    each = model.cnn(single)
    torch.testing.assert_close(backbone, torch.stack([each[:2].mean(dim=0), each[2]]))
    told: dict[str, Any] = batch | {"host_image_count": [2, 1]}
    assert torch.equal(model.encode(told)["visual_backbone"], backbone)


def test_views_are_refused(model: ConVIRT) -> None:
    with pytest.raises(ConfigError, match="Views are for SimCLR"):
        model.encode({"images": torch.zeros(2, 2, 3, 32, 32)})


def test_images_without_reports_are_encoded_but_have_no_loss(model: ConVIRT) -> None:
    batch = {key: value for key, value in tiny_batch().items() if key in ("index", "images")}
    assert model.eval().encode(batch).keys() == {"visual", "visual_backbone"}
    with pytest.raises(ConfigError, match="the data set gives no reports"):
        model.train()(batch)


def test_one_pair_has_no_loss(model: ConVIRT) -> None:
    model.eval()
    assert model.encode(tiny_batch(1))["visual"].shape == (1, 8)
    with pytest.raises(ValueError, match="at least two pairs"):
        model(tiny_batch(1))


def test_bfloat16_is_close_to_float32(model: ConVIRT) -> None:
    model.eval()
    exact = model(tiny_batch())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tiny_batch())["loss"]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)


def test_wrong_widths_name_the_keys() -> None:
    spec = tiny_spec()
    parts = {"spec": spec, "encoder": tiny_encoder(spec), "cnn": tiny_cnn(), "loss": ConVIRTLoss()}
    with pytest.raises(ConfigError, match=r"visual_embedding_dim: given 2048, but cnn \(shuf"):
        ConVIRT(
            projection=PairedProjection(
                visual_embedding_dim=2048, textual_embedding_dim=16, projection_dim=8
            ),
            **parts,
        )
    with pytest.raises(ConfigError, match=r"textual_embedding_dim: given 768, but .* gives 16"):
        ConVIRT(
            projection=PairedProjection(
                visual_embedding_dim=1024, textual_embedding_dim=768, projection_dim=8
            ),
            **parts,
        )


def test_published_configuration(tmp_path: Path) -> None:
    """The settings of the published ConVIRT with a small RoBERTa of the same width."""
    spec = tiny_spec()
    config = RobertaConfig(
        vocab_size=spec.vocab_size, num_hidden_layers=1, intermediate_size=64, pad_token_id=0
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = ConVIRT(
        spec=spec,
        encoder=TextEncoder(spec=spec, proto=str(tmp_path)),
        cnn=VisionEncoder(
            backbone="resnet50",
            output_layer="avgpool",
            dropout_out=0.0,
            permute="batch_first",
            freeze=False,
            pretrained=False,
        ),
        projection=PairedProjection(
            visual_embedding_dim=2048, textual_embedding_dim=768, projection_dim=768
        ),
        loss=ConVIRTLoss(tau=0.1, lambda_=0.75),
    ).eval()
    features = model.encode(tiny_batch(2))
    assert features["visual"].shape == features["linguistic"].shape == (2, 768)
    assert model.contrast(features)["loss"].isfinite()


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(4, 3), (5, 1), (1, 5), (7, 0), (2, 2)])
def test_all_processes_encode_the_same_number_of_chunks(limit: int, sizes: tuple[int, ...]) -> None:
    """Also with fewer samples; a process without samples has a batch that is not counted."""
    model = tiny_convirt(forward_batch_size=limit)
    found = []
    for size in sizes:
        chunks = list(model.chunks(tiny_batch(size or 9), max(sizes)))
        found.append(len(chunks))
        lengths = [len(chunk["images"]) for chunk in chunks]
        assert min(lengths) > 0
        assert max(lengths) <= limit
        index = torch.cat([chunk["index"] for chunk in chunks]).tolist()
        assert index[:size] == list(range(size))
        assert len(index) <= max(sizes)
    assert set(found) == {-(-max(sizes) // limit)}


def test_equal_reports_are_positives_across_chunks() -> None:
    batch = tiny_batch(6) | {"report_hash": torch.tensor([1, 2, 1, 3, 2, 1])}
    model = tiny_convirt(targets="same_text").eval()
    assert model.reads_hashes
    whole = model(batch)
    features = model.encode(batch)
    expected = ConVIRTLoss()(
        features["visual"], features["linguistic"], targets=batch["report_hash"]
    )
    torch.testing.assert_close(whole["loss"], expected["loss"])
    assert whole["several_positives"].item() == pytest.approx(5 / 6)
    model.forward_batch_size = 2
    torch.testing.assert_close(model(batch)["loss"], whole["loss"])


def test_soft_targets_compare_labels() -> None:
    spec = tiny_spec(labels=("a", "b"), multi_label=True)
    several = tiny_batch(4) | {"labels": torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 0]])}
    model = tiny_convirt(spec, targets="soft").eval().double()
    several["images"] = several["images"].double()
    targets = model.encode(several)["targets"]
    assert targets.dtype == torch.float64
    cosines = torch.tensor([[1, 0.5**0.5, 0, 0], [0.5**0.5, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    torch.testing.assert_close(targets @ targets.T * 0.1, cosines.double())
    single = several | {"labels": torch.tensor([1, 0, 1, 0])}
    found = model.encode(single)["targets"]
    torch.testing.assert_close((found @ found.T * 0.1)[0], torch.tensor([1.0, 0, 1, 0]).double())


def test_an_unknown_label_counts_half_in_soft_targets() -> None:
    spec = tiny_spec(labels=("edema", "mass"), multi_label=True)
    targets = tiny_convirt(spec, targets="soft").targets
    assert targets is not None
    batch = {
        "labels": torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]),
        "labels_known": torch.tensor([[True, True], [False, True], [True, True], [True, False]]),
    }
    vectors = targets(batch, torch.zeros((), dtype=torch.float64))
    assert vectors is not None
    cosines = vectors @ vectors.T * targets.temperature
    assert cosines[1, 2] == 0  # an unknown label is not a negative one
    torch.testing.assert_close(cosines[0, 1].item(), 1.0)
    torch.testing.assert_close(cosines[0, 3].item(), 1 / 1.25**0.5)


def test_identity_needs_no_data_and_other_targets_do() -> None:
    plain = tiny_convirt(targets="identity")
    assert plain.targets is None
    assert not plain.reads_hashes
    assert "targets" not in plain.encode(tiny_batch() | {"report_hash": torch.arange(4)})
    model = tiny_convirt(targets="same_text")
    assert model.lacks(model.encode(tiny_batch())) == ["targets"]
    with pytest.raises(ConfigError, match="same_text needs report_hash"):
        model(tiny_batch())


def test_a_loss_without_negatives_takes_no_targets() -> None:
    with pytest.raises(ArgumentError, match="VICRegLoss does not take them"):
        tiny_convirt(targets="soft", loss=VICRegLoss())
