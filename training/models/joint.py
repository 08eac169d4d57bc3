"""What M3AE's joint encoder needs beside an image encoder, whose blocks see the words of the caption as well.

Legend: B batch, L tokens of a caption, V visible ones, D width.
"""

import torch
from torch import Tensor, nn

from training.models.blocks import take_tokens
from training.models.masking import TextMask
from training.models.positions import sincos_1d


class Words(nn.Module):
    """Vectors of words, places (fixed) and the modality; that of pictures is the bias of their stem."""

    positions: Tensor

    def __init__(self, width: int, *, vocabulary_size: int, context_length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.register_buffer("positions", sincos_1d(context_length, width), persistent=False)
        self.modality_token = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, ids_BL: Tensor, words: TextMask) -> Tensor:
        """Return what the blocks are given of the visible words, [B, V, D]."""
        x_BLD = self.tokens(ids_BL) + self.positions[: ids_BL.shape[1]] + self.modality_token
        return take_tokens(x_BLD, words.keep)
