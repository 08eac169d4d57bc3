"""SimCLR's contrast of two augmented views (Chen et al. 2020, eq. 1), the second objective of SLIP.

Legend: B pictures of this rank, G pictures of all ranks, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import Gathered, LossSum
from training.losses.info_nce import own_rows
from training.losses.similarity import product


def simclr(a_BD: Tensor, b_BD: Tensor, all_a: Gathered, all_b: Gathered, *, temperature: float) -> LossSum:
    """Return (sum over this rank's pictures of the mean of both views' losses, number of pictures).

    A view has to find the other view of its picture among all views of the global batch but itself: 2 G - 1
    candidates. a_BD, b_BD: L2-normalised. all_a, all_b: the same of all ranks.
    """
    own_B = own_rows(a_BD, all_a)
    a = _view(a_BD, own=all_a, other=all_b, own_B=own_B, temperature=temperature)
    b = _view(b_BD, own=all_b, other=all_a, own_B=own_B, temperature=temperature)
    return LossSum((a + b) / 2, torch.full((), len(a_BD), device=a_BD.device))


def _view(view_BD: Tensor, *, own: Gathered, other: Gathered, own_B: Tensor, temperature: float) -> Tensor:
    across_BG = product(view_BD, other.features) / temperature
    within_BG = product(view_BD, own.features) / temperature
    within_BG = within_BG.scatter(1, own_B[:, None], -torch.inf)  # a view is no candidate for itself
    return functional.cross_entropy(torch.cat([across_BG, within_BG], dim=1), own_B, reduction="sum")
