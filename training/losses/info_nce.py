"""Image-text contrastive loss: RILS eq. 5 and 6, the objective of CLIP.

Legend: B pairs of this rank, G pairs of all ranks, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import Gathered, LossSum
from training.losses.similarity import product


def info_nce(image_BD: Tensor, text_BD: Tensor, images: Gathered, texts: Gathered, scale: Tensor) -> LossSum:
    """Return (sum over this rank's pairs of (L_I2T + L_T2I) / 2, number of pairs).

    image_BD, text_BD: this rank's L2-normalised features. images, texts: the same features of all ranks (or of this
    one, for the local loss). scale: 1 / sigma.
    """
    own_B = own_rows(image_BD, texts)
    i2t = functional.cross_entropy(scale * product(image_BD, texts.features), own_B, reduction="sum")
    t2i = functional.cross_entropy(scale * product(text_BD, images.features), own_B, reduction="sum")
    return LossSum((i2t + t2i) / 2, torch.full((), len(image_BD), device=image_BD.device))


def own_rows(features_BD: Tensor, gathered: Gathered) -> Tensor:
    """Return [B]: the row of each of this rank's samples among the gathered ones."""
    return gathered.offset + torch.arange(len(features_BD), device=features_BD.device)


@torch.no_grad()
def matched(image_BD: Tensor, texts: Gathered) -> Tensor:
    """Return bool [B], the set C of RILS eq. 9: no text of the batch is closer to the picture than its own.

    Captions that are equal tie, and a tie counts as matched: which of two equal captions comes first is the order of
    ranks, and must not decide.
    """
    similarity_BG = product(image_BD, texts.features)
    own_B1 = similarity_BG.gather(1, own_rows(image_BD, texts)[:, None])
    return (similarity_BG <= own_B1).all(dim=1)
