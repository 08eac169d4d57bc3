"""Two encoders that meet in one space: what every contrastive method here is built on.

Legend: B batch, C colours, S side, L tokens, D encoder width, E width of the shared space.
"""

import math

import torch
from torch import Tensor, nn

from training.models.config import ModelConfig
from training.models.image_encoder import build_image_encoder
from training.models.text import TextTransformer


class Towers(nn.Module):
    """Image encoder, text encoder, a bias-free projection of each, and the learned temperature of their product."""

    def __init__(self, config: ModelConfig, *, vocabulary_size: int, end_of_text_id: int) -> None:
        super().__init__()
        self.image = build_image_encoder(config.vision)
        self.text = TextTransformer(config.text, vocabulary_size=vocabulary_size, end_of_text_id=end_of_text_id)
        self.image_projection = _projection(self.image.pooled_width, config.embed_dim)
        self.text_projection = _projection(config.text.width, config.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_pooled(self, tokens_BLD: Tensor) -> Tensor:
        """theta of RILS eq. 4: project the pooled picture; [B, E], not normalised."""
        z_BE: Tensor = self.image_projection(self.image.pool(tokens_BLD))
        return z_BE

    def embed_text(self, ids_BL: Tensor) -> Tensor:
        """phi of RILS eq. 4: encode and project captions; [B, E], not normalised."""
        z_BE: Tensor = self.text_projection(self.text(ids_BL))
        return z_BE


def _projection(width: int, embed_dim: int) -> nn.Linear:
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection
