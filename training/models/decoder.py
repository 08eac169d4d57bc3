"""The patch decoder: from the visible patches to a feature for every patch.

Legend: B batch, N patches, V visible ones, D width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from training.models.blocks import Blocks
from training.models.config import Shape
from training.models.positions import sincos_2d


class PatchDecoder(nn.Module):
    """Linear, blocks of the encoder's width, norm, linear (RILS; eq. 3), with one learned [MASK] token."""

    positions: Tensor

    def __init__(self, encoder: Shape, *, depth: int, grid: int) -> None:
        super().__init__()
        width = encoder.width
        self.enter = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", sincos_2d(grid, width), persistent=False)
        self.blocks = Blocks(replace(encoder, depth=depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, width)
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, visible_BVD: Tensor, keep_BV: Tensor) -> Tensor:
        """Return [B, N, D]: g^k for every patch k. keep_BV: where the visible patches stood."""
        visible_BVD = self.enter(visible_BVD)
        index_BVD = keep_BV[:, :, None].expand_as(visible_BVD)
        blank_BND = self.mask_token.to(visible_BVD.dtype).expand(len(keep_BV), len(self.positions), -1)
        x_BND = blank_BND.scatter(1, index_BVD, visible_BVD) + self.positions.to(visible_BVD.dtype)
        y_BND: Tensor = self.leave(self.norm(self.blocks(x_BND)))
        return y_BND
