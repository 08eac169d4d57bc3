"""Reconstruction of masked words: M3AE's loss, eq. 4 of MAE-CLIP.

Legend: B captions of this rank, M places for masked words, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import LossSum


def masked_text(logits_BMV: Tensor, ids_BM: Tensor, counted_BM: Tensor) -> LossSum:
    """Return (sum of -log p(word) over the masked words, how many words that is); (0, 0) if no caption has words.

    ids_BM: the words that stood there. counted_BM: True where there is a masked word; a short caption has fewer.
    """
    with torch.autocast(logits_BMV.device.type, enabled=False):
        loss_BM = functional.cross_entropy(logits_BMV.float().transpose(1, 2), ids_BM, reduction="none")
        return LossSum((loss_BM * counted_BM).sum(), counted_BM.sum())
