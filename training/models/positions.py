"""Fixed sine-cosine positions: of patches in two dimensions, as in MAE, and of words in one, as in M3AE.

Legend: N patches in row-major order, D width.
"""

import torch
from torch import Tensor


def sincos_2d(side: int, width: int) -> Tensor:
    """Return float32 [side * side, width]: half of the width tells the column, half the row (MAE's order).

    Each half holds sin(p w_k) then cos(p w_k) with w_k = 10000^(-4k / width), k < width / 4.
    """
    place_N = torch.arange(side, dtype=torch.float64)
    row_NN, column_NN = torch.meshgrid(place_N, place_N, indexing="ij")
    return torch.cat([_sincos(column_NN.flatten(), width // 2), _sincos(row_NN.flatten(), width // 2)], dim=1).float()


def sincos_1d(length: int, width: int) -> Tensor:
    """Return float32 [length, width]: sin(p w_k) then cos(p w_k) with w_k = 10000^(-2k / width), k < width / 2."""
    return _sincos(torch.arange(length, dtype=torch.float64), width).float()


def _sincos(place_N: Tensor, width: int) -> Tensor:
    frequency = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angle = place_N[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
