from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.small_models import tiny_vae
from vilmedic.datasets.image import ImageDataset
from vilmedic.errors import ConfigError
from vilmedic.evaluation.evaluation import Ensemble, Evaluation
from vilmedic.evaluation.features import SplitFeatures
from vilmedic.models.vae import VAE
from vilmedic.post_processing.plot_reconstruction import GAP, HEAD, PlotReconstruction, draw_pairs


class Constant(VAE):
    """Reconstructs every image as one grey level."""

    level = 0.25

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full_like(images, self.level)


@pytest.fixture
def run(tmp_path: Path) -> Evaluation:
    """An evaluation of ten images, each of one grey level."""
    names = [f"{10 * number}.png" for number in range(10)]
    for number, name in enumerate(names):
        Image.new("L", (20, 16), 20 * number).save(tmp_path / name)
    (tmp_path / "test.image.tok").write_text("\n".join(names) + "\n")
    data = ImageDataset(
        split="test",
        training=False,
        seed=0,
        root=str(tmp_path),
        resize=16,
        crop=16,
        preset="center_crop",
        mean=[0.0],
        std=[1.0],
    )
    model = Constant(image_size=16, num_layers=2, num_tokens=4, codebook_dim=2, hidden_dim=4)
    networks = Ensemble(
        members=[lambda: model],
        dataset=lambda split: data,
        loader=list,
        device=torch.device("cpu"),
        precision="fp32",
    )
    features = SplitFeatures(split="test", index=torch.arange(10), features={})
    return Evaluation(
        name="run",
        split="test",
        features=features,
        dataset=data,
        networks=networks,
        source="VAE, epoch 1, seed 2",
        out_dir=tmp_path,
    )


def test_originals_and_reconstructions_keep_their_grey_levels(run: Evaluation) -> None:
    (path,) = PlotReconstruction(num_samples=4)(run)
    assert path.name == "test_reconstruction.png"
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for column, level in enumerate((0, 60, 120, 180)):  # samples 0, 3, 6 and 9 of 10
        x = GAP + column * (256 + GAP)
        original = pixels[HEAD : HEAD + 128, x : x + 128]
        made = pixels[HEAD : HEAD + 128, x + 128 : x + 256]
        assert np.unique(original).tolist() == [level]
        assert np.unique(made).tolist() == [64]


def test_number_of_images_is_limited_by_the_split(run: Evaluation) -> None:
    PlotReconstruction(num_samples=99)(run)
    width, height = Image.open(run.out_dir / "test_reconstruction.png").size
    assert width == GAP + 4 * (256 + GAP)
    assert height > HEAD + 3 * 128


def test_large_images_keep_their_size_and_grey_images_are_drawn(tmp_path: Path) -> None:
    images = torch.rand(1, 1, 200, 200)
    draw_pairs(tmp_path / "a.png", images, images, [3], title="x", caption="y")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))[HEAD : HEAD + 200, GAP : GAP + 400]
    expected = (images[0, 0] * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(pixels[:, :200, 0], expected)
    assert np.array_equal(pixels[:, 200:, 2], expected)


def test_invalid_options_are_refused(run: Evaluation) -> None:
    run.networks.members = [tiny_vae, tiny_vae]
    with pytest.raises(ConfigError, match=r"^2 checkpoints"):
        PlotReconstruction().check(run)
