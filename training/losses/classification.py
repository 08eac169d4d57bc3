"""Image classification: the Boltzmann distribution of M3I eq. 3 over category embeddings.

Legend: B pictures of this rank, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import LossSum


def classification(logits_BC: Tensor, labels_B: Tensor) -> LossSum:
    """Return (sum of -log softmax(logits)[label] over the pictures that have one, how many have).

    labels_B: -1 where there is none.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        loss_B = functional.cross_entropy(logits_BC.float(), labels_B, ignore_index=-1, reduction="none")
        return LossSum(loss_B.sum(), (labels_B >= 0).sum())
