"""Projection heads: features of different encoders mapped to one space."""

from __future__ import annotations

from torch import nn

from vilmedic.config.types import Width
from vilmedic.errors import ArgumentError


def projection_head(in_features: int, out_features: int) -> nn.Sequential:
    """The non-linear head of Zhang et al. (2020): linear, ReLU, linear, all of the output's width.

    Args:
        in_features: width of the encoder's features.
        out_features: width of the shared space.
    """
    return nn.Sequential(
        nn.Linear(in_features, out_features),
        nn.ReLU(),
        nn.Linear(out_features, out_features),
    )


def check_width(key: str, given: int, encoder: str, actual: int) -> None:
    """Refuse a head that does not fit its encoder.

    Args:
        key: the argument that sets the input width of the head, such as `projection.width`.
        given: its value.
        encoder: the encoder and the settings that set its width, for the message.
        actual: the width of the encoder's features.

    Raises:
        ConfigError: if the two differ.
    """
    if given != actual:
        raise ArgumentError(
            {key: f"given {given}, but {encoder} gives {actual} features. Set {actual}."}
        )


class PairedProjection(nn.Module):
    """One head for images and one for reports, into the same space.

    Args:
        visual_embedding_dim: width of the image encoder's features.
        textual_embedding_dim: width of the text encoder's features.
        projection_dim: width of the shared space.
    """

    def __init__(
        self, *, visual_embedding_dim: Width, textual_embedding_dim: Width, projection_dim: Width
    ) -> None:
        super().__init__()
        self.visual_embedding_dim = visual_embedding_dim
        self.textual_embedding_dim = textual_embedding_dim
        self.projection_dim = projection_dim
        self.visual = projection_head(visual_embedding_dim, projection_dim)
        self.linguistic = projection_head(textual_embedding_dim, projection_dim)


class VisualProjection(nn.Module):
    """One head for images, in front of a loss that compares images with images.

    Args:
        visual_embedding_dim: width of the image encoder's features.
        projection_dim: width of the space in which images are compared.
    """

    def __init__(self, *, visual_embedding_dim: Width, projection_dim: Width) -> None:
        super().__init__()
        self.visual_embedding_dim = visual_embedding_dim
        self.projection_dim = projection_dim
        self.visual = projection_head(visual_embedding_dim, projection_dim)


class VisualEmbedder:
    """Maps image features into the space of the text encoder.

    Args:
        interm_feature_dim: channels of the feature map whose positions are the regions.
        feature_dim: width of the image encoder's output.
    """

    def __init__(self, *, interm_feature_dim: Width, feature_dim: Width) -> None:
        self.interm_feature_dim = interm_feature_dim
        self.feature_dim = feature_dim
