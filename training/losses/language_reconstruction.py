"""Masked visual reconstruction in language semantic space: RILS eq. 7 to 9.

Legend: B pictures of this rank, M masked patches of a picture, G texts of all ranks, D width of the shared space.
"""

import torch
from torch import Tensor

from training.losses.distributed import LossSum
from training.losses.similarity import product


def language_reconstruction(
    target_BMD: Tensor,
    prediction_BMD: Tensor,
    prototypes_GD: Tensor,
    counted_B: Tensor,
    *,
    target_temperature: float,
    prediction_temperature: float,
) -> LossSum:
    """Return (sum of KL(sg[p] || q) over the masked patches of the counted pictures, how many patches that is).

    target_BMD: projected, normalised patches of the whole picture; no gradient reaches them. prediction_BMD: the
    decoder's, of the masked picture. prototypes_GD: normalised text embeddings. counted_B: the set C. The targets'
    entropy is subtracted from eq. 9's cross-entropy: same gradient, and 0 is a perfect prediction.
    """
    with torch.no_grad():
        log_p_BMG = (product(target_BMD, prototypes_GD) / target_temperature).log_softmax(-1)
        p_BMG = log_p_BMG.exp()
    log_q_BMG = (product(prediction_BMD, prototypes_GD) / prediction_temperature).log_softmax(-1)
    kl_BM = (p_BMG * (log_p_BMG - log_q_BMG)).sum(-1)
    return LossSum((kl_BM.sum(-1) * counted_B).sum(), counted_B.sum() * kl_BM.shape[1])
