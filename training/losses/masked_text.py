"""Words that a network was not shown: M3AE's loss, eq. 4 of MAE-CLIP, and MUG's language term.

Legend: B captions of this rank, L tokens of a row, T tokens to be predicted, in all captions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from training.losses.distributed import LossSum


def masked_text(logits_TV: Tensor, ids_T: Tensor) -> LossSum:
    """Return (sum of -log p(token) over the tokens to be predicted, how many they are); (0, 0) if there are none.

    Logits are of these tokens alone: for every token of padded rows they would be the largest tensor of a step.
    """
    with torch.autocast(logits_TV.device.type, enabled=False):
        loss = functional.cross_entropy(logits_TV.float(), ids_T, reduction="sum")
        return LossSum(loss, torch.full((), len(ids_T), device=ids_T.device))


def predicted_places(end_B: Tensor, length: int) -> Tensor:
    """Return bool [B, L]: what a caption decoder writes, words and <end of text>; of an empty caption nothing.

    end_B: where <end of text> stands. <start> stands at place 0, so every one of them has a place before it, where its
    scores are read: `predicted_places(...).roll(-1, 1)`, in the same order.
    """
    place_L = torch.arange(length, device=end_B.device)
    return (place_L >= 1) & (place_L <= end_B[:, None]) & (end_B > 1)[:, None]
