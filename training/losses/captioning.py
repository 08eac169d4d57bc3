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
    stands.
    """
    return masked_text(logits_BLV[:, :-1], ids_BL[:, 1:], predicted_places(end_B, ids_BL.shape[1])[:, 1:])


def predicted_places(end_B: Tensor, length: int) -> Tensor:
    """Return bool [B, L], True at words and <end of text>; an empty caption says nothing about its picture: none."""
    place_L = torch.arange(length, device=end_B.device)
    return (place_L >= 1) & (place_L <= end_B[:, None]) & (end_B > 1)[:, None]
