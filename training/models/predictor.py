"""M3I's input-to-target decoder f_psi: what the encoder knows of a view, asked about every patch of a target view.

Legend: B batch, V tokens of the input view, N patches of the target view, K values predicted for a patch, D width.
"""

import torch
from torch import Tensor, nn

from cluster.config import key
from training.models.blocks import Blocks
from training.models.config import Shape
from training.models.decoder import DecoderConfig
from training.models.relative import sincos_places


class PredictorConfig(DecoderConfig):
    """The shape of the predictor: 4 layers (M3I), 768 wide (SiameseIM)."""

    width: int = key(768, "width", ge=8, multiple_of=8)
    depth: int = key(4, "number of blocks", ge=1)
    heads: int = key(12, "attention heads", ge=1)


class Predictor(nn.Module):
    """Linear, blocks over the input view's tokens and one mask token for each target patch, norm, linear."""

    def __init__(self, encoder_width: int, shape: Shape, out_width: int) -> None:
        super().__init__()
        self.width = shape.width
        self.enter = nn.Linear(encoder_width, shape.width)
        self.mask_token = nn.Parameter(torch.randn(shape.width) * 0.02)
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.leave = nn.Linear(shape.width, out_width)
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, tokens_BVD: Tensor, places_BV4: Tensor, target_places_BN4: Tensor, keys_BV: Tensor | None = None
    ) -> Tensor:
        """Return [B, N, K]. places: as `relative_places` gives them. keys_BV: True where a token may be looked at."""
        x_BVD = self.enter(tokens_BVD)
        x_BVD = x_BVD + sincos_places(places_BV4, self.width).to(x_BVD.dtype)
        mask_BND = self.mask_token + sincos_places(target_places_BN4, self.width)
        x_BLD = torch.cat([x_BVD, mask_BND.to(x_BVD.dtype)], dim=1)
        keys_BL = None
        if keys_BV is not None:
            keys_BL = torch.cat([keys_BV, keys_BV.new_ones(mask_BND.shape[:2])], dim=1)
        asked_BND = self.blocks(x_BLD, keys_BL=keys_BL)[:, tokens_BVD.shape[1] :]
        y_BNK: Tensor = self.leave(self.norm(asked_BND))
        return y_BNK
