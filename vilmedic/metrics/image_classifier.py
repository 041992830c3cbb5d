"""A small convolutional classifier of X-rays, trained on the spot as a measuring instrument."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (24, 48, 96, 96)
BATCH = 64
MOST_BLUR = 3  # average pooling of 1 to this many pixels
SHIFT = 4  # pixels


def _network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for width in WIDTHS:
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    # Positions count: a side is where something is.
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(classes)
    )


class ImageClassifier:
    """Tells which of some classes grey images have, each on its own.

    Images are shifted and blurred at random in training, so that sharpness, which generated images
    lack, does not decide. Training starts from the seed and leaves the caller's random state alone.

    Args:
        images: uint8 [N, 1, H, W].
        labels: multi-hot, [N, C].
        epochs: passes over the images.
        seed: of weights, order and augmentation.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, epochs: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = _network(labels.shape[1])
            self._fit(images, labels.float(), epochs)
        self.network.eval()

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """Logits of the classes, [N, C], of uint8 images [N, 1, H, W]; equal of equal ones."""
        # In batches of different size an image gets logits that differ by rounding.
        distinct, places = images.unique(dim=0, return_inverse=True)
        return torch.cat([self.network(_normalise(part)) for part in distinct.split(256)])[places]

    def _fit(self, images: Tensor, labels: Tensor, epochs: int) -> None:
        self.network(_normalise(images[:2]))  # makes the last layer
        self.network.train()
        steps = epochs * -(-len(images) // BATCH)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(images)).split(BATCH):
                    logits = self.network(_normalise(_augment(images[rows])))
                    loss = functional.binary_cross_entropy_with_logits(logits, labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()


def _normalise(images: Tensor) -> Tensor:
    """Each image with mean 0 and deviation 1, whatever its exposure."""
    values = images.float().flatten(1)
    spread, mean = torch.std_mean(values, dim=1, keepdim=True)
    return ((values - mean) / spread.clamp(min=1e-3)).view(images.shape)


def _augment(images: Tensor) -> Tensor:
    """Images moved by a few pixels and blurred, one draw a batch."""
    down, across = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    values = functional.pad(images.float(), [SHIFT] * 4, mode="replicate")
    height, width = images.shape[-2:]
    values = values[..., SHIFT + down :, SHIFT + across :][..., :height, :width]
    blur = int(torch.randint(1, MOST_BLUR + 1, ()))
    if blur > 1:
        size = (height, width)
        values = functional.avg_pool2d(values, blur, ceil_mode=True)
        values = functional.interpolate(values, size=size, mode="bilinear", align_corners=False)
    return values
