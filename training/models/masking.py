"""What a masked view hides: patches of a picture, words of a caption; at random, or by a score.

Every mask is a function of its own sample: of (seed, sample id, epoch), or of the sample's scores. Neither the batch
nor the rank plays a part.

Legend: B batch, N patches, V visible ones, M masked ones, L tokens of a caption.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training import random

Side = Literal["high", "low"]


class PatchMask(NamedTuple):
    """Indices of the visible and of the hidden patches of each sample, both ascending; together all of them, once."""

    keep: Tensor
    """int64 [B, V]."""
    masked: Tensor
    """int64 [B, M]."""


class TextMask(NamedTuple):
    """Places of the visible and of the hidden tokens of each caption, ascending, then fillers up to a fixed width.

    <start> and <end of text> are always visible; padding is neither visible nor hidden.
    """

    keep: Tensor
    """int64 [B, V]."""
    seen: Tensor
    """bool [B, V]: False where `keep` is a filler."""
    masked: Tensor
    """int64 [B, M]."""
    counted: Tensor
    """bool [B, M]: False where `masked` is a filler."""

    def hidden(self, length: int) -> Tensor:
        """Return bool [B, length]: True where a word is hidden."""
        blank_BL = torch.zeros(len(self.masked), length + 1, dtype=torch.bool, device=self.masked.device)
        return blank_BL.scatter(1, self.masked.masked_fill(~self.counted, length), True)[:, :length]


def random_mask(seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, num_patches: int, ratio: float) -> PatchMask:
    """Leave exactly num_patches * (1 - ratio) patches of every sample, rounded down but at least 1."""
    score_BN = random.bits(seed, sample_ids_B, epoch_B, "mask", num_patches)
    return _split(score_BN, num_visible(num_patches, ratio))


def similarity_mask(similarity_BN: Tensor, *, ratio: float, hide: Side) -> PatchMask:
    """Hide as many patches as `random_mask`, those of highest (or lowest) similarity; of equals the first stays."""
    score_BN = similarity_BN.detach() if hide == "high" else -similarity_BN.detach()
    return _split(score_BN, num_visible(similarity_BN.shape[1], ratio))


def num_visible(num_patches: int, ratio: float) -> int:
    """Return how many patches of a sample stay: num_patches * (1 - ratio), rounded down but at least 1."""
    return max(1, int(num_patches * (1 - ratio) + 1e-6))


def _split(score_BN: Tensor, visible: int) -> PatchMask:
    order_BN = score_BN.argsort(dim=1, stable=True)
    return PatchMask(order_BN[:, :visible].sort(dim=1).values, order_BN[:, visible:].sort(dim=1).values)


def random_text_mask(
    seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, end_B: Tensor, length: int, ratio: float
) -> TextMask:
    """Hide `ratio` of each caption's words: of n words, n * (1 - ratio) stay, rounded down, possibly none.

    end_B: where <end of text> stands, so that words are places 1 .. end - 1. length: of the padded row, L.
    """
    bits_BL = random.bits(seed, sample_ids_B, epoch_B, "mask/text", length)
    # Ranks are exact where float64 would round 64 bits.
    return _split_text(bits_BL.argsort(dim=1, stable=True).argsort(dim=1).double(), end_B, ratio)


def similarity_text_mask(similarity_BL: Tensor, *, end_B: Tensor, ratio: float, hide: Side) -> TextMask:
    """Hide as many words as `random_text_mask`, those of highest (or lowest) similarity; of equals the first stays."""
    score_BL = similarity_BL.detach().double()
    return _split_text(score_BL if hide == "high" else -score_BL, end_B, ratio)


def _split_text(score_BL: Tensor, end_B: Tensor, ratio: float) -> TextMask:
    """Order every row as: start and end, words by score, padding; cut it after what stays visible."""
    length = score_BL.shape[1]
    place_L = torch.arange(length, device=score_BL.device)
    end_B1 = end_B[:, None]
    score_BL = score_BL.masked_fill((place_L == 0) | (place_L == end_B1), -torch.inf)
    score_BL = score_BL.masked_fill(place_L > end_B1, torch.inf)
    order_BL = score_BL.argsort(dim=1, stable=True)
    num_seen_B1 = end_B1 + 1 - num_hidden_words(end_B1, ratio)
    # The widths hold the longest caption that fits into the row: no look at the lengths, no wait for the device.
    most_words = max(0, length - 2)
    most_seen = min(length, 2 + int(_num_visible_words(torch.tensor(most_words), ratio)))
    most_masked = max(1, most_words - (most_seen - 2))
    rank_L = place_L
    seen_BL = rank_L < num_seen_B1
    counted_BL = (rank_L >= num_seen_B1) & (rank_L < end_B1 + 1)
    keep_BV, seen_BV = _ascending(order_BL, seen_BL, most_seen)
    masked_BM, counted_BM = _ascending(order_BL, counted_BL, most_masked)
    return TextMask(keep_BV, seen_BV, masked_BM, counted_BM)


def num_hidden_words(end_B: Tensor, ratio: float) -> Tensor:
    """Return [B]: how many words a mask hides, whichever they are. end_B: where <end of text> stands."""
    num_words_B = (end_B - 1).clamp(min=0)
    return num_words_B - _num_visible_words(num_words_B, ratio)


def _num_visible_words(num_words: Tensor, ratio: float) -> Tensor:
    return (num_words.double() * (1 - ratio) + 1e-6).long()


def _ascending(order_BL: Tensor, wanted_BL: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The wanted places in ascending order, filled up to `width` with the last place, and which ones are wanted."""
    length = order_BL.shape[1]
    places_BL = order_BL.masked_fill(~wanted_BL, length).sort(dim=1).values[:, :width]
    return places_BL.clamp(max=length - 1), places_BL < length
