"""Captions word by word: -log p(word | the words before it, the picture), MUG's language term.

Legend: B captions of this rank, L tokens, V vocabulary.
"""

import torch
from torch import Tensor

from training.losses.distributed import LossSum
from training.losses.masked_text import masked_text


def caption_generation(logits_BLV: Tensor, ids_BL: Tensor, end_B: Tensor) -> LossSum:
    """Return (sum of -log p over the words and the <end of text> of every caption, how many tokens that is).

    logits_BLV: at place l for token l + 1. ids_BL: <start>, words, <end of text>, padding. end_B: where <end of text>
    stands. An empty caption (end_B = 1) says nothing about its picture and does not count.
    """
    place_L = torch.arange(1, ids_BL.shape[1], device=ids_BL.device)
    counted_BL = (place_L <= end_B[:, None]) & (end_B > 1)[:, None]
    return masked_text(logits_BLV[:, :-1], ids_BL[:, 1:], counted_BL)
