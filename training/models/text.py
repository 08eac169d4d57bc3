"""The text encoder: a transformer over token ids, causal with the feature at <end of text>, or bidirectional.

Legend: B batch, L tokens, V visible ones, D width.
"""

import torch
from torch import Tensor, nn

from training.models.blocks import Blocks, take_tokens
from training.models.config import TextConfig
from training.models.masking import TextMask
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
        self.norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.pooling = Pooling(config.pooling, shape.width, shape.heads)

    def forward(self, ids_BL: Tensor, words: TextMask | None = None, *, pooled: bool = True) -> Tensor:
        """Return one feature a caption, [B, D] (eq. 2 of RILS). What follows <end of text> has no influence.

        pooled=False: return every token's feature, [B, L, D]. words: encode the visible tokens only, [B, V, D].
        """
        x_BLD = self.tokens(ids_BL) + self.positions[: ids_BL.shape[1]]
        keys_BL = self._keys(ids_BL) if words is None else words.seen
        if words is not None:
            x_BLD = take_tokens(x_BLD, words.keep)
        y_BLD: Tensor = self.norm(self.blocks(x_BLD, causal=self.causal, keys_BL=None if self.causal else keys_BL))
        return self.pool(y_BLD, ids_BL) if pooled and words is None else y_BLD

    def pool(self, tokens_BLD: Tensor, ids_BL: Tensor) -> Tensor:
        """Return one feature a caption, [B, D], of its tokens' features."""
        feature_BD: Tensor = self.pooling(tokens_BLD, self._keys(ids_BL), self._end(ids_BL))
        return feature_BD

    def _end(self, ids_BL: Tensor) -> Tensor:
        """Where <end of text> stands, [B]."""
        return (ids_BL == self.end_of_text_id).int().argmax(dim=1)

    def _keys(self, ids_BL: Tensor) -> Tensor:
        """Which tokens are the caption's, bool [B, L]: no padding."""
        return torch.arange(ids_BL.shape[1], device=ids_BL.device) <= self._end(ids_BL)[:, None]
