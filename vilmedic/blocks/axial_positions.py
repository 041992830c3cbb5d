"""Learned positions of an image: the sum of a vector for the row and one for the column."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AxialPositions(nn.Module):
    """Position embeddings of a square grid, with the names and shapes of dalle-pytorch's.

    Args:
        dim: width.
        side: positions along a side.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        shapes = ((1, side, 1, dim), (1, 1, side, dim))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, places: Tensor) -> Tensor:
        """Places in the grid, int64 [n], rows from the top, to vectors [n, dim]."""
        rows, columns = self.weights[0][0, :, 0], self.weights[1][0, 0]
        return rows[places // self.side] + columns[places % self.side]
