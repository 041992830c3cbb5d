from __future__ import annotations

import pytest
from torch import nn

from vilmedic.blocks.projection import PairedProjection, check_width
from vilmedic.errors import ConfigError


def test_heads_are_linear_relu_linear() -> None:
    projection = PairedProjection(visual_embedding_dim=6, textual_embedding_dim=4, projection_dim=3)
    for head, width in ((projection.visual, 6), (projection.linguistic, 4)):
        assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
        assert head[0].weight.shape == (3, width)
        assert head[2].weight.shape == (3, 3)


def test_wrong_width_names_key_and_both_numbers() -> None:
    check_width("a.b", 4, "model.cnn", 4)
    with pytest.raises(ConfigError, match=r"a.b: given 2048, but model.cnn gives 512 .* Set 512"):
        check_width("a.b", 2048, "model.cnn", 512)
