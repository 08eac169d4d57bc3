"""Where the patches of one view lie in another view of the same picture (M3I section 3.4, after SiameseIM).

A place is four numbers in units of the input view's patches: row and column of the patch's centre, counted from the
centre of the input view's first patch (its left top origin), then the patch's height and width. A width below zero
says that one view mirrors the other. The input view's own patches are at (row, column, 1, 1).

Legend: B batch, G side of a patch grid, N = G * G patches in row-major order, D width.
"""

import torch
from torch import Tensor


def own_places(grid: int, device: torch.device) -> Tensor:
    """Return [N, 4]: where a view's patches lie in that view."""
    whole_14 = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    return relative_places(whole_14, whole_14, input_grid=grid, target_grid=grid)[0]


def relative_places(input_B4: Tensor, target_B4: Tensor, *, input_grid: int, target_grid: int) -> Tensor:
    """Return float32 [B, N, 4]: where the target view's patches lie in the input view.

    input_B4, target_B4: (top, left, bottom, right) of the views in shares of the picture, right < left if mirrored.
    """
    origin_B2, size_B2 = input_B4[:, :2], (input_B4[:, 2:] - input_B4[:, :2]) / input_grid
    step_B2 = (target_B4[:, 2:] - target_B4[:, :2]) / target_grid
    index_G = torch.arange(target_grid, device=target_B4.device, dtype=torch.float32) + 0.5
    centre_BG2 = target_B4[:, None, :2] + index_G[:, None] * step_B2[:, None]
    place_BG2 = (centre_BG2 - origin_B2[:, None]) / size_B2[:, None] - 0.5
    row_BGG = place_BG2[:, :, None, 0].expand(-1, -1, target_grid)
    column_BGG = place_BG2[:, None, :, 1].expand(-1, target_grid, -1)
    extent_BN2 = (step_B2 / size_B2)[:, None].expand(-1, target_grid**2, -1)
    return torch.cat([row_BGG.flatten(1)[..., None], column_BGG.flatten(1)[..., None], extent_BN2], dim=2)


def sincos_places(place_BN4: Tensor, width: int) -> Tensor:
    """Return float32 [B, N, D]: a quarter of the width for each number, sines then cosines.

    The frequencies are those of `sincos_2d` with half its width: w_k = 10000^(-8k / width), k < width / 8.
    """
    frequency_K = 10_000.0 ** -(torch.arange(width // 8, device=place_BN4.device, dtype=torch.float32) / (width / 8))
    angle_BN4K = place_BN4.float()[..., None] * frequency_K
    return torch.cat([angle_BN4K.sin(), angle_BN4K.cos()], dim=-1).flatten(2)
