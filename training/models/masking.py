"""Which patches a masked view hides.

Legend: B batch, N patches, V visible ones, M masked ones.
"""

from typing import NamedTuple

from torch import Tensor

from training import random


class PatchMask(NamedTuple):
    """Indices of the visible and of the hidden patches of each sample, both ascending; together all of them, once."""

    keep: Tensor
    """int64 [B, V]."""
    masked: Tensor
    """int64 [B, M]."""


def random_mask(seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, num_patches: int, ratio: float) -> PatchMask:
    """Leave exactly num_patches * (1 - ratio) patches of every sample, rounded down but at least 1; the rest is hidden.

    A function of (seed, sample id, epoch) alone: neither the batch nor the rank plays a part.
    """
    num_visible = max(1, int(num_patches * (1 - ratio) + 1e-6))
    order_BN = random.bits(seed, sample_ids_B, epoch_B, "mask", num_patches).argsort(dim=1, stable=True)
    return PatchMask(order_BN[:, :num_visible].sort(dim=1).values, order_BN[:, num_visible:].sort(dim=1).values)
