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
    """Hide exactly num_patches - int(num_patches * (1 - ratio)) patches of every sample, uniformly at random.

    A function of (seed, sample id, epoch) alone: neither the batch nor the rank plays a part.
    """
    num_visible = int(num_patches * (1 - ratio))
    order_BN = random.bits(seed, sample_ids_B, epoch_B, "mask", num_patches).argsort(dim=1, stable=True)
    return PatchMask(order_BN[:, :num_visible].sort(dim=1).values, order_BN[:, num_visible:].sort(dim=1).values)
