"""VAE: a discrete variational autoencoder that turns an image into a grid of tokens."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vilmedic.blocks.autoencoder import (
    PixelScale,
    at_least_float32,
    likeliest_codes,
    make_decoder,
    make_encoder,
    relaxed_lookup,
)
from vilmedic.checkpoints.checkpoint import find_checkpoints, load_checkpoint, load_weights
from vilmedic.checkpoints.older_formats import older_names, zoo_file
from vilmedic.config.declared import IMAGES
from vilmedic.config.trained import data_parts
from vilmedic.config.types import (
    Between,
    Count,
    Normalization,
    Runtime,
    Share,
    Side,
    Temperature,
    UsedWith,
    Weight,
    Width,
)
from vilmedic.datasets.aligned import DataSpec
from vilmedic.datasets.image import ImageDataset
from vilmedic.device import block_numbers
from vilmedic.errors import ArgumentError, CheckpointError, ConfigError, DataError
from vilmedic.log import counted
from vilmedic.manifest import is_export
from vilmedic.models.contract import Batch, Model

PART = 2**24
"""Numbers in the largest maps of the decoder that exist at a time on a CPU: 64 MiB of float32."""
SHAPE = ("num_tokens", "codebook_dim", "num_layers", "num_resnet_blocks", "hidden_dim", "channels")
"""Hyperparameters that follow from the weights."""
STATED = ("image_size", "normalization")
"""Hyperparameters that only the configuration in the file has."""


class VAE(Model):
    """The first stage of text-to-image: images as grids of codes, and codes as images.

    "Zero-Shot Text-to-Image Generation" (Ramesh et al. 2021, arXiv:2102.12092, section 2.1). The
    encoder halves the image `num_layers` times and gives each position logits over the codebook;
    in training a code is drawn by Gumbel softmax, the decoder makes an image of the vectors, and
    the loss is the mean error of a pixel (in normalised units) plus the weighted divergence of the
    codes from the uniform distribution, KL(q || uniform), summed over positions and averaged
    over images. Weights have the names and shapes of dalle-pytorch's `DiscreteVAE`.

    Args:
        spec: data properties: tokenizer, label names, normalisation; None for a model without any.
        image_size: side of the square images in pixels; a multiple of 2 ** num_layers.
        num_tokens: number of codes in the codebook.
        codebook_dim: width of a code's vector.
        num_layers: times the sides are halved: 256 pixels and 3 layers give 32 x 32 positions.
        num_resnet_blocks: residual blocks at the end of the encoder and at the start of the
            decoder.
        hidden_dim: channels of the convolutions.
        channels: channels of an image: 3, or 1 for the mean of the channels that the data set
            gives.
        smooth_l1_loss: measure the error as smooth L1 instead of the squared difference.
        temperature: of the Gumbel softmax, at the first step.
        temperature_rate: rate of its exponential decay: at step n (from 0) it is
            temperature * exp(-rate * n).
        temperature_end: the temperature below which it does not fall.
        straight_through: decode the one drawn code instead of the mixture, with the mixture's
            gradient.
        reinmax: with straight_through, a gradient of second order.
        kl_div_loss_weight: weight of the divergence.
        normalization: mean and standard deviation of each channel, for pixels in 0..1; the images
            that come out are put back. null leaves pixels as they are.
    """

    image_options: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mean": ([0], [0, 0, 0]),
        "std": ([1], [1, 1, 1]),
        "views": (1,),
        "multi_image": (1,),
    }
    keep: ClassVar[tuple[str, ...]] = ("codes",)
    prefixes: ClassVar[tuple[str, ...]] = ("", "vae.", "vae.vae.", "dalle.vae.")

    def __init__(
        self,
        *,
        spec: Runtime[DataSpec | None] = None,
        image_size: Side = 256,
        num_tokens: Count = 512,
        codebook_dim: Width = 512,
        num_layers: Annotated[int, Between(1, 14)] = 3,
        num_resnet_blocks: Annotated[int, Between(0, 256)] = 0,
        hidden_dim: Width = 64,
        channels: Annotated[int, Between(1, 3)] = 3,
        smooth_l1_loss: bool = False,
        temperature: Temperature = 0.9,
        temperature_rate: Share = 0.0,
        temperature_end: Annotated[float, UsedWith("temperature_rate"), Between(0, 1000)] = 0.0,
        straight_through: bool = False,
        reinmax: Annotated[bool, UsedWith("straight_through")] = False,
        kl_div_loss_weight: Weight = 0.0,
        normalization: Normalization | None = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    ) -> None:
        super().__init__()
        if spec is not None:
            spec.check_pixels("VAE")
        _check_image_size(image_size, num_layers)
        _check_temperature(temperature, temperature_end)
        self.image_size, self.num_tokens, self.channels = image_size, num_tokens, channels
        self.codebook_dim, self.hidden_dim = codebook_dim, hidden_dim
        self.num_layers, self.num_resnet_blocks = num_layers, num_resnet_blocks
        self.smooth_l1_loss, self.kl_div_loss_weight = smooth_l1_loss, kl_div_loss_weight
        self.straight_through, self.reinmax = straight_through, reinmax
        self.temperature = self.temperature_start = temperature
        self.temperature_rate, self.temperature_end = temperature_rate, temperature_end
        self.pixels = PixelScale(normalization, channels)
        self.codebook = nn.Embedding(num_tokens, codebook_dim)
        self.encoder = make_encoder(channels, hidden_dim, num_layers, num_resnet_blocks, num_tokens)
        self.decoder = make_decoder(
            channels, hidden_dim, num_layers, num_resnet_blocks, codebook_dim
        )

    @property
    def grid(self) -> int:
        """Positions along a side of the grid of codes."""
        return self.image_size // 2**self.num_layers

    def repeated_blocks(self) -> list[nn.Module]:
        """All but the last doubling, which is called, and computed twice, for parts of a batch."""
        return [block for block in super().repeated_blocks() if block is not self.decoder[-2]]

    def schedule(self, step: int) -> dict[str, float]:
        """Set the temperature of a training step, from 1, and return it for the log."""
        decayed = self.temperature_start * math.exp(-self.temperature_rate * (step - 1))
        self.temperature = max(self.temperature_end, decayed)
        return {"temperature": self.temperature}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch of images.

        Args:
            batch: `images` [B, C, H, W] in 0..1.

        Returns:
            The scalar `loss`; outside training also, for each image, `reconstruction_loss` [B, 1]
            with codes drawn as in training, `hard_reconstruction_loss` [B, 1] with the likeliest
            codes, and these `codes`, int64 [B, N].

        Raises:
            ConfigError: the data set gives no images, or of another size or number.
        """
        images = self._images(batch)
        loss, errors = self.objective(images)
        if self.training:
            return {"loss": loss}
        codes = self.get_codebook_indices(images)
        hard = self._errors(self.pixels.normalize(images), self._decode(codes))
        return {
            "loss": loss,
            "reconstruction_loss": errors[:, None],
            "hard_reconstruction_loss": hard[:, None],
            "codes": codes,
        }

    def objective(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss that is trained on.

        Args:
            images: in 0..1, [B, C, H, W].
            noise: Gumbel noise to use instead of drawing it, [B, N, K].

        Returns:
            The scalar loss and the reconstruction error of each image, [B].
        """
        target = self.pixels.normalize(images)
        features = self._features(target)
        vectors, decoder = self._fold_decoder()
        found, spread = relaxed_lookup(
            features.flatten(0, 1),
            *_linear(self.encoder[-1]),
            vectors,
            temperature=self.temperature,
            hard=self.straight_through,
            reinmax=self.reinmax,
            divergence=self.kl_div_loss_weight != 0,
            noise=None if noise is None else noise.flatten(0, 1),
        )
        maps = decoder[:-2](self._to_grid(found.unflatten(0, features.shape[:2])))
        errors = self._errors_in_parts(target, maps)
        divergence = spread / len(images)
        return errors.mean() + self.kl_div_loss_weight * divergence, errors

    @torch.no_grad()
    def get_codebook_indices(self, images: Tensor) -> Tensor:
        """The likeliest code at each position, rows from the top, whatever the autocast.

        Args:
            images: in 0..1, [B, C, H, W].

        Returns:
            int64 [B, N], N positions.
        """
        with torch.autocast(images.device.type, enabled=False):
            features = self._features(self.pixels.normalize(self.own_channels(images)))
            codes = likeliest_codes(features.flatten(0, 1), *_linear(self.encoder[-1]))
        return codes.unflatten(0, features.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """The images of codes, ready to be shown: the normalisation is undone.

        Args:
            codes: int64 [B, N], rows from the top; N is a square number.

        Returns:
            Images in 0..1, [B, C, H, W].

        Raises:
            DataError: a code is not in the codebook, or N is no square number.
        """
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= self.num_tokens:
            raise DataError(
                f"Codes from {lowest} to {highest} cannot be decoded: the codebook has "
                f"{self.num_tokens}, numbered from 0. They are of another VAE."
            )
        return self.pixels.restore(self._decode(codes))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in 0..1 [B, C, H, W] through their likeliest codes and back."""
        return self.decode(self.get_codebook_indices(images))

    def _images(self, batch: Batch) -> Tensor:
        if "images" not in batch or batch["images"].ndim != 4:
            raise ConfigError(
                "VAE takes one image per sample. Use dataset.proto=ImageDataset with views=1 and "
                "multi_image=1."
            )
        images = batch["images"]
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ConfigError(
                f"VAE has image_size={self.image_size}, but the images are {height} x {width} "
                "pixels. Set the resize and crop of the images to the same number."
            )
        return self.own_channels(images)

    def own_channels(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] with the channels that the model takes: the mean of them for one.

        Raises:
            ConfigError: images have another number of channels.
        """
        if images.shape[1] != self.channels and self.channels == 1:
            return images.mean(dim=1, keepdim=True)
        if images.shape[1] != self.channels:
            raise ConfigError(
                f"VAE has channels={self.channels}, but the images have {images.shape[1]}."
            )
        return images

    def _features(self, normalized: Tensor) -> Tensor:
        """Return the inputs of the linear map to the logits: [B, N, H]."""
        features: Tensor = self.encoder[:-1](normalized)
        return features.flatten(2).transpose(1, 2)

    def _fold_decoder(self) -> tuple[Tensor, nn.Sequential]:
        """The vectors of the codebook after the linear map that the decoder starts with, if any.

        Mapping the K vectors instead of the mixtures at all positions gives the same and
        costs a fraction, since the mixtures then have the width of the convolutions.

        Returns:
            Vectors [K, D'], and the part of the decoder that is left.
        """
        if not self.num_resnet_blocks:
            return self.codebook.weight, self.decoder
        vectors = functional.linear(self.codebook.weight, *_linear(self.decoder[0]))
        return vectors, self.decoder[1:]

    def _decode(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            output: Tensor = self.decoder(self._to_grid(self.codebook(codes)))
        return output

    def _to_grid(self, vectors: Tensor) -> Tensor:
        """Vectors [B, N, D] of square grids as [B, D, side, side]."""
        side = math.isqrt(vectors.shape[1])
        if side**2 != vectors.shape[1]:
            raise DataError(f"{vectors.shape[1]} codes do not fill a square grid.")
        return vectors.transpose(1, 2).unflatten(2, (side, side))

    def _errors_in_parts(self, target: Tensor, maps: Tensor) -> Tensor:
        """The errors [B] after the last doubling, whose large maps exist for a few images only."""

        def measure(some: Tensor, wanted: Tensor) -> Tensor:
            return self._errors(wanted, self.decoder[-2:](some))

        part = block_numbers(maps.device, PART)
        size = max(1, part // (self.hidden_dim * self.image_size**2))
        parts = list(zip(maps.split(size), target.split(size), strict=True))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([measure(*part) for part in parts])
        again = partial(checkpoint, measure, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(*part) for part in parts])

    def _errors(self, target: Tensor, output: Tensor) -> Tensor:
        """The mean error over the pixels of each image: float32 [B] in reduced precision."""
        measure = functional.smooth_l1_loss if self.smooth_l1_loss else functional.mse_loss
        output = at_least_float32(output)
        return measure(output, target, reduction="none").flatten(1).mean(dim=1)


def load_vae(path: str | Path, settings: Mapping[str, Any]) -> VAE:
    """A frozen VAE.

    Hyperparameters come from the checkpoint. Those that are given as well must agree with it.

    Args:
        path: a file, an exported folder, a folder of the original's model zoo, or a run directory,
            whose best checkpoint is taken.
        settings: arguments of `VAE` that are given. Those of its training
            (temperature, loss) have no effect on a frozen one and are not compared.

    Returns:
        The VAE, in evaluation mode and without gradients.

    Raises:
        CheckpointError: the file is damaged, holds no VAE, or one that differs from the settings;
            all differences are listed.
        ConfigError: there is no such file, or neither it nor the settings tell the size of the
            images.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentError({"vae.ckpt": f"there is no {path}, neither a file nor a folder."})
    if path.is_dir() and zoo_file(path) is None and not is_export(path):
        path = find_checkpoints(path, "best-1", remedy="Name the file to use")[0]
    state = load_checkpoint(path)
    weights = _vae_weights(state["model"], path)
    stated = _stated(state.get("config")) | dict(state.get("vae") or {})
    actual = {**stated, **_shape(weights, path)}
    differences = [
        f"{name} is {_shown(actual[name])}, the configuration says {_shown(settings[name])}"
        for name in (*STATED, *SHAPE)
        if name in settings
        and name in actual
        and _differ(actual[name], settings[name], actual["channels"])
    ]
    if differences:
        raise CheckpointError(
            f"{path}: is another VAE than the section vae describes: {'; '.join(differences)}. "
            "Leave these keys out to take what the checkpoint says, or give the checkpoint that "
            "belongs to them."
        )
    for name in STATED:
        if name in settings:
            actual.setdefault(name, settings[name])
    if "image_size" not in actual:
        raise ArgumentError(
            {
                "vae.image_size": f"{path} does not contain it, so it has to be given: the side of "
                "the images, in pixels, that the VAE was trained on."
            }
        )
    vae = VAE(**actual)
    load_weights(vae, {"model": weights}, path)
    return vae.eval().requires_grad_(False)


def _linear(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution of one pixel as those of a linear map."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    return convolution.weight.flatten(1), convolution.bias


def _check_image_size(image_size: int, num_layers: int) -> None:
    factor = 2**num_layers
    if image_size % factor:
        below = image_size // factor * factor
        allowed = [size for size in (below, below + factor) if size]
        raise ArgumentError(
            {
                "image_size": f"given {image_size}, but num_layers={num_layers} halves the image "
                f"{counted(num_layers, 'time')}, so the size must be a multiple of {factor}. "
                "Nearest: "
                f"{' or '.join(map(str, allowed))}."
            }
        )


def _check_temperature(start: float, end: float) -> None:
    if end > start:
        raise ArgumentError(
            {"temperature_end": f"given {end}, must not be above temperature={start}."}
        )


def _vae_weights(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the VAE in a file, which may hold a whole DALLE."""
    bare = older_names(weights, ())
    for prefix in VAE.prefixes:
        if f"{prefix}codebook.weight" in bare:
            own = re.compile(re.escape(prefix) + r"(?=(?:codebook|encoder|decoder)\.)")
            return {own.sub("", name, 1): value for name, value in bare.items() if own.match(name)}
    raise CheckpointError(
        f"{path}: holds no VAE: it has no codebook.weight, but {', '.join(sorted(bare)[:3])}, ..."
    )


def _shape(weights: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The hyperparameters that names and shapes of the weights tell."""
    first = weights.get("encoder.0.0.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{path}: holds no VAE: its encoder has no first convolution.")
    tokens, width = weights["codebook.weight"].shape

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, name)) for name in weights)

    return {
        "num_tokens": tokens,
        "codebook_dim": width,
        "num_layers": count(r"encoder\.\d+\.0\.weight"),
        "num_resnet_blocks": count(r"encoder\.\d+\.net\.0\.weight"),
        "hidden_dim": first.shape[0],
        "channels": first.shape[1],
    }


def _stated(config: Any) -> dict[str, Any]:
    """Image settings of the configuration in a file, with defaults, which never changed."""
    node = config.get("model") if isinstance(config, Mapping) else None
    if isinstance(node, Mapping) and isinstance(node.get("vae"), Mapping):
        node = node["vae"]
        if "image_size" not in node:
            found = {name: node[name] for name in STATED if name in node}
            side = _side_of_images(config.get("dataset"))
            return found if side is None else found | {"image_size": side}
    if not isinstance(node, Mapping):
        return {}
    defaults = inspect.signature(VAE).parameters
    return {name: node.get(name, defaults[name].default) for name in STATED}


def _side_of_images(dataset: Any) -> int | None:
    """The side of the images that DALLE was trained on, which is that of its VAE."""
    parts = dict(data_parts(dataset)) if isinstance(dataset, dict) else {}
    if IMAGES not in parts:
        return None
    default = inspect.signature(ImageDataset).parameters["crop"].default
    node = parts[IMAGES][1]
    side = node.get("crop", default) or node.get("resize")
    return side if isinstance(side, int) else None


def _differ(actual: Any, given: Any, channels: int) -> bool:
    return bool(_comparable(actual, channels) != _comparable(given, channels))


def _comparable(value: Any, channels: int) -> Any:
    """Normalise a value: 1 equals 1.0, a list a tuple, and surplus channels are dropped."""
    if isinstance(value, list | tuple):
        return [[float(number) for number in part[:channels]] for part in value]
    return value


def _shown(value: Any) -> str:
    return str(list(map(list, value))) if isinstance(value, tuple) else str(value)
