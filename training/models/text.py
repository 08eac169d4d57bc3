"""The text encoder: a transformer over token ids, causal with the feature at <end of text>, or bidirectional.

Legend: B batch, L tokens, D width.
"""

import torch
from torch import Tensor, nn

from training.models.blocks import Blocks
from training.models.config import TextConfig
from training.models.pooling import Pooling


class TextTransformer(nn.Module):
    """CLIP's text encoder (causal, `end` pooling, as in SLIP and RILS) and its bidirectional relative (MAE-CLIP)."""

    def __init__(self, config: TextConfig, *, vocabulary_size: int, end_of_text_id: int) -> None:
        super().__init__()
        shape = config.shape
        self.causal = config.attention == "causal"
        self.end_of_text_id = end_of_text_id
        self.tokens = nn.Embedding(vocabulary_size, shape.width)
        self.positions = nn.Parameter(torch.randn(config.context_length, shape.width) * 0.01)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = Blocks(shape)
        self.norm = nn.LayerNorm(shape.width)
        self.pooling = Pooling(config.pooling, shape.width, shape.heads)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return one feature a caption, [B, D] (eq. 2 of RILS). What follows <end of text> has no influence."""
        end_B, keys_BL = self.ends(ids_BL)
        feature_BD: Tensor = self.pooling(self.encode(self.embed(ids_BL), keys_BL), keys_BL, end_B)
        return feature_BD

    def ends(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return where <end of text> stands, [B], and which tokens are the caption's, bool [B, L]: no padding."""
        end_B = (ids_BL == self.end_of_text_id).int().argmax(dim=1)
        return end_B, torch.arange(ids_BL.shape[1], device=ids_BL.device) <= end_B[:, None]

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Return what the blocks are given, [B, L, D]: a token's vector and its place's."""
        x_BLD: Tensor = self.tokens(ids_BL) + self.positions[: ids_BL.shape[1]]
        return x_BLD

    def encode(self, x_BLD: Tensor, keys_BL: Tensor) -> Tensor:
        """Return the blocks' normalised output, [B, L, D]. keys_BL: True where a token may be seen (not if causal)."""
        y_BLD: Tensor = self.norm(self.blocks(x_BLD, causal=self.causal, keys_BL=None if self.causal else keys_BL))
        return y_BLD
