"""Image-text contrastive loss: RILS eq. 5 and 6, the objective of CLIP.

Legend: B pairs of this rank (or part), G pairs that meet, D width, V pairs with both sides.
"""

import torch
from torch import Tensor

from training.losses.chunked import softmax_term, sum_over_pairs, tiles
from training.losses.distributed import Gathered, LossSum
from training.losses.similarity import product

TIE = 1e-5
"""Cosines as close as this are equal: one caption encoded behind two paddings differs by float32 rounding."""


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    images: Gathered,
    texts: Gathered,
    scale: Tensor,
    valid: Gathered | None = None,
) -> LossSum:
    """Return (sum over this part's pairs of (L_I2T + L_T2I) / 2, number of pairs).

    image_BD, text_BD: this part's L2-normalised features. images, texts: the same features of all that meet.
    scale: 1 / sigma. valid: [G], whether a pair takes part at all, by default every one does.
    """
    own_B = own_rows(image_BD, texts)
    images_GD, texts_GD = images.features, texts.features
    if valid is not None:
        valid_G = valid.features.bool()
        valid_B = valid_G[own_B]
        own_B = (valid_G.cumsum(0) - 1)[own_B][valid_B]
        image_BD, text_BD = image_BD[valid_B], text_BD[valid_B]
        images_GD, texts_GD = images_GD[valid_G], texts_GD[valid_G]
    i2t = sum_over_pairs(image_BD, texts_GD, scale, softmax_term(own_B))
    t2i = sum_over_pairs(text_BD, images_GD, scale, softmax_term(own_B))
    return LossSum((i2t + t2i) / 2, torch.full((), len(image_BD), device=image_BD.device))


def own_rows(features_BD: Tensor, gathered: Gathered) -> Tensor:
    """Return [B]: the row of each of this part's samples among the gathered ones."""
    return gathered.offset + torch.arange(len(features_BD), device=features_BD.device)


@torch.no_grad()
def matched(image_BD: Tensor, texts: Gathered) -> Tensor:
    """Return bool [B], the set C of RILS eq. 9: no text of the batch is closer to the picture than its own.

    Captions that are equal tie, and a tie counts as matched: which of two equal captions comes first, or which other
    captions it was padded with, is the order of ranks, and must not decide.
    """
    own_B = own_rows(image_BD, texts)
    found_B = torch.empty(len(image_BD), dtype=torch.bool, device=image_BD.device)
    for part in tiles(len(image_BD), len(texts.features)):
        similarity_TG = product(image_BD[part], texts.features)
        found_B[part] = similarity_TG.amax(1) <= similarity_TG.gather(1, own_B[part, None])[:, 0] + TIE
    return found_B
