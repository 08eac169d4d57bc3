"""Masked visual reconstruction in language semantic space: RILS eq. 7 to 9.

Legend: B pictures of this part, M masked patches of a picture, A those of counted pictures, G texts that meet, D width.
"""

from torch import Tensor

from training.losses.chunked import divergence_term, sum_over_pairs
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
    target_AD = target_BMD.detach()[counted_B.bool()].flatten(0, 1)
    prediction_AD = prediction_BMD[counted_B.bool()].flatten(0, 1)

    def target_logits(rows: slice) -> Tensor:
        return product(target_AD[rows], prototypes_GD.detach()) / target_temperature

    scale = prediction_AD.new_full((), 1 / prediction_temperature)
    total = sum_over_pairs(prediction_AD, prototypes_GD, scale, divergence_term(target_logits))
    return LossSum(total, counted_B.sum() * prediction_BMD.shape[1])
