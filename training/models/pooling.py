"""From a row of tokens to one feature: mean, maximum, one given token, or attention with a learned query.

Legend: B batch, L tokens, D width, H heads, K width of a head.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from training.models.blocks import attend

PoolingName = Literal["mean", "max", "map", "class", "end"]


class Pooling(nn.Module):
    """[B, L, D] -> [B, D]. Every pooling takes the same arguments, so that encoders need not know which they hold."""

    def __init__(self, name: PoolingName, width: int, heads: int) -> None:
        super().__init__()
        self.name = name
        if name == "map":
            self.heads = heads
            self.query = nn.Parameter(torch.randn(width) * width**-0.5)
            self.key_value = nn.Linear(width, 2 * width)
            self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, keys_BL: Tensor | None = None, token_B: Tensor | None = None) -> Tensor:
        """keys_BL: True where a token counts, all by default. token_B: the index that `class` and `end` return."""
        if self.name == "mean":
            return _mean(x_BLD, keys_BL)
        if self.name == "max":
            hidden_BL1 = None if keys_BL is None else ~keys_BL[..., None]
            return (x_BLD if hidden_BL1 is None else x_BLD.masked_fill(hidden_BL1, -torch.inf)).amax(1)
        if self.name == "map":
            return self._attend(x_BLD, keys_BL)
        index_B = torch.zeros(len(x_BLD), dtype=torch.int64, device=x_BLD.device) if token_B is None else token_B
        return x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), index_B]

    def _attend(self, x_BLD: Tensor, keys_BL: Tensor | None) -> Tensor:
        """Multi-head attention pooling (MAP): one learned query."""
        k_BHLK, v_BHLK = self.key_value(x_BLD).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q_BH1K = self.query.to(k_BHLK.dtype).view(1, self.heads, 1, -1).expand(len(x_BLD), -1, -1, -1)
        y_BH1K = attend(q_BH1K, k_BHLK, v_BHLK, keys_BL=keys_BL)
        y_BD: Tensor = self.out(y_BH1K.flatten(1))
        return y_BD


def _mean(x_BLD: Tensor, keys_BL: Tensor | None) -> Tensor:
    if keys_BL is None:
        return x_BLD.mean(1)
    weight_BL1 = keys_BL[..., None].to(x_BLD.dtype)
    return (x_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
