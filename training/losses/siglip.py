"""Sigmoid loss for image-text pairs (SigLIP, Zhai et al. 2023, eq. 1 and algorithm 1).

Legend: B pairs of this rank (or part), G pairs that meet, D width.
"""

import torch
from torch import Tensor

from training.losses.chunked import sigmoid_term, sum_over_pairs
from training.losses.distributed import Gathered, LossSum
from training.losses.info_nce import own_rows


def sigmoid_pairs(image_BD: Tensor, texts: Gathered, scale: Tensor, bias: Tensor) -> LossSum:
    """Return (-sum_i sum_j log sigmoid(y_ij (t <x_i, y_j> + b)), number of pairs i).

    i runs over this part's pictures and j over the texts of all that meet, so every pair is counted once in all.
    image_BD, texts: L2-normalised. scale, bias: t and b, float32. y_ij = 1 for i = j, else -1.
    """
    term = sigmoid_term(own_rows(image_BD, texts))
    total = sum_over_pairs(image_BD, texts.features, scale, term, bias=bias)
    return LossSum(total, torch.full((), len(image_BD), device=image_BD.device))
