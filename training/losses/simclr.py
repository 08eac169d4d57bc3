"""SimCLR's contrast of two augmented views (Chen et al. 2020, eq. 1), the second objective of SLIP.

Legend: B pictures of this rank, G pictures of all ranks, D width.
"""

import torch
from torch import Tensor

from training.losses.chunked import softmax_term, sum_over_pairs
from training.losses.distributed import Gathered, LossSum
from training.losses.info_nce import own_rows


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
    views = torch.cat([other.features, own.features])
    scale = view_BD.new_full((), 1 / temperature)
    itself_B = len(other.features) + own_B  # no candidate for itself
    return sum_over_pairs(view_BD, views, scale, softmax_term(own_B, itself_B))
