"""The patch decoder: from the visible patches to a prediction for every patch.

Legend: B batch, N patches, V visible ones, D width of the encoder, K values predicted for a patch.
"""

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cluster.config import Config, key
from training.models.blocks import Blocks
from training.models.config import Shape
from training.models.positions import sincos_2d


class DecoderConfig(Config):
    """The shape of a decoder of its own width, thrown away after training."""

    width: int = key(512, "width", ge=8)
    depth: int = key(8, "number of blocks", ge=1)
    heads: int = key(16, "attention heads", ge=1)

    @property
    def shape(self) -> Shape:
        """The transformer's shape."""
        return Shape(width=self.width, depth=self.depth, heads=self.heads, mlp_width=4 * self.width)

    @model_validator(mode="after")
    def _shapes_fit(self) -> "DecoderConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width}: has to be a multiple of 4 and of heads={self.heads}")
        return self


class PatchDecoder(nn.Module):
    """Linear, blocks, norm, linear, with one learned [MASK] token (MAE; RILS eq. 3)."""

    positions: Tensor

    def __init__(self, encoder_width: int, shape: Shape, *, grid: int, out_width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.randn(shape.width) * 0.02)
        self.register_buffer("positions", sincos_2d(grid, shape.width), persistent=False)
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.leave = nn.Linear(shape.width, out_width)
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, visible_BVD: Tensor, keep_BV: Tensor) -> Tensor:
        """Return [B, N, K]: g^k for every patch k. keep_BV: where the visible patches stood."""
        x_BND = put_back(self.enter(visible_BVD), keep_BV, self.mask_token, len(self.positions))
        x_BND = x_BND + self.positions.to(x_BND.dtype)
        y_BNK: Tensor = self.leave(self.norm(self.blocks(x_BND)))
        return y_BNK


def put_back(visible_BVD: Tensor, keep_BV: Tensor, mask_token_D: Tensor, length: int) -> Tensor:
    """Return [B, length, D]: the visible tokens at their own places, the mask token everywhere else."""
    index_BVD = keep_BV[:, :, None].expand_as(visible_BVD)
    blank_BLD = mask_token_D.to(visible_BVD.dtype).expand(len(keep_BV), length, -1)
    return blank_BLD.scatter(1, index_BVD, visible_BVD)
