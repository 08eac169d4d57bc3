"""The mix of M3I: which two pictures meet, and which pixels each of them keeps.

Both are functions of the samples alone. Partners are found inside groups of consecutive samples of the global batch;
a group never straddles ranks or micro-batches, so no pixel travels and the pairs do not depend on how a batch is cut.

Legend: B batch, C colours, S side, G side of the mask's grid, F side of the feature grid, N = F * F.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from training import random

MaskKind = Literal["random", "block"]

_NUM_BLOCKS = 16
_BLOCK_AREA = (0.08, 0.3)
_BLOCK_ASPECT = 1 / 0.3


def partners(seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, group: int) -> Tensor:
    """Return sigma, int64 [B]: a random cycle through every `group` consecutive samples, so nobody meets itself.

    A group of 2 swaps its samples. Raises ValueError when the batch is no multiple of the group.
    """
    if len(sample_ids_B) % group:
        raise ValueError(f"{len(sample_ids_B)} samples cannot be mixed in groups of {group}")
    drawn_B = random.bits(seed, sample_ids_B, epoch_B, "mix/partner", 1)[:, 0]
    order_QG = drawn_B.view(-1, group).argsort(dim=1, stable=True)
    next_QG = torch.empty_like(order_QG).scatter_(1, order_QG, order_QG.roll(-1, dims=1))
    first_Q1 = torch.arange(0, len(drawn_B), group, device=drawn_B.device)[:, None]
    return (first_Q1 + next_QG).flatten()


def hidden_cells(
    seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, grid: int, ratio: float, kind: MaskKind
) -> Tensor:
    """Return bool [B, G, G], True where the sample is hidden: in round(G * G * ratio) cells, at least 1, never all.

    random: any cells. block: rectangles as in BEiT (8 to 30 % of the area, aspect 0.3 to 3.3) laid on the grid one
    after the other until the number is reached; of the last one and of what is then missing, random cells.
    """
    num_cells = grid * grid
    num_hidden = min(max(1, round(num_cells * ratio)), num_cells - 1)
    score_BN = random.uniform(seed, sample_ids_B, epoch_B, "mix/cells", num_cells)
    if kind == "block":
        score_BN = score_BN + _first_block(seed, sample_ids_B, epoch_B, grid).flatten(1)
    chosen_BM = score_BN.argsort(dim=1, stable=True)[:, :num_hidden]
    hidden_BN = torch.zeros_like(score_BN, dtype=torch.bool).scatter_(1, chosen_BM, True)
    return hidden_BN.view(-1, grid, grid)


def _first_block(seed: int, sample_ids_B: Tensor, epoch_B: Tensor, grid: int) -> Tensor:
    """Return [B, G, G]: the number of the first rectangle that covers a cell; _NUM_BLOCKS if none does."""
    drawn_B4K = random.uniform(seed, sample_ids_B, epoch_B, "mix/blocks", 4 * _NUM_BLOCKS).view(-1, 4, _NUM_BLOCKS)
    area_BK, aspect_BK, top_BK, left_BK = drawn_B4K.unbind(1)
    area_BK = (_BLOCK_AREA[0] + (_BLOCK_AREA[1] - _BLOCK_AREA[0]) * area_BK) * grid * grid
    aspect_BK = torch.exp((2 * aspect_BK - 1) * math.log(_BLOCK_ASPECT))
    height_BK = (area_BK * aspect_BK).sqrt().round().clamp(1, grid)
    width_BK = (area_BK / aspect_BK).sqrt().round().clamp(1, grid)
    rows_BKG = _covers((top_BK * (grid - height_BK + 1)).floor(), height_BK, grid)
    columns_BKG = _covers((left_BK * (grid - width_BK + 1)).floor(), width_BK, grid)
    covered_BKGG = rows_BKG[..., None] & columns_BKG[..., None, :]
    number_K11 = torch.arange(_NUM_BLOCKS, device=area_BK.device, dtype=torch.float32)[:, None, None]
    return torch.where(covered_BKGG, number_K11, float(_NUM_BLOCKS)).amin(1)


def _covers(first_BK: Tensor, length_BK: Tensor, grid: int) -> Tensor:
    place_G = torch.arange(grid, device=first_BK.device)
    return (place_G >= first_BK[..., None]) & (place_G < (first_BK + length_BK)[..., None])


def mix(first_BCSS: Tensor, second_BCSS: Tensor, hidden_BGG: Tensor) -> Tensor:
    """Return m * first + (1 - m) * second, where m is 1 outside the hidden cells of the first."""
    return torch.where(enlarge(hidden_BGG, first_BCSS.shape[-1])[:, None], second_BCSS, first_BCSS)


def enlarge(cells_BGG: Tensor, side: int) -> Tensor:
    """Return [B, S, S]: every cell as a square of pixels."""
    cell = side // cells_BGG.shape[-1]
    return cells_BGG.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def seen_features(shown_BGG: Tensor, feature_grid: int) -> Tensor:
    """Return bool [B, N]: the features that stand for a picture: those at least half of whose cell shows it.

    Where mask and features have the same grid that is the mask itself. A coarser feature grid may have no such cell:
    then those with most of the picture count, so that there is always one.
    """
    share_BFF = torch.nn.functional.adaptive_avg_pool2d(shown_BGG.float()[:, None], feature_grid)[:, 0]
    share_BN = share_BFF.flatten(1)
    return share_BN >= share_BN.amax(1, keepdim=True).clamp(max=0.5)
