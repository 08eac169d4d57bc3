"""Masked views hide exactly the right number of patches, and the same ones in any batch."""

import pytest
import torch

from training.models.masking import random_mask

IDS = torch.arange(200) * 7919
EPOCH = torch.zeros(200, dtype=torch.int64)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "visible"), [(196, 0.75, 49), (64, 0.75, 16), (49, 0.6, 19), (9, 0.9, 1), (10, 0.9, 1)]
)
def test_every_sample_hides_the_same_number_and_each_patch_is_on_one_side(
    num_patches: int, ratio: float, visible: int
) -> None:
    keep, masked = random_mask(0, IDS, EPOCH, num_patches=num_patches, ratio=ratio)
    assert keep.shape == (200, visible)
    both = torch.cat([keep, masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(num_patches).expand(200, -1))


def test_a_mask_does_not_depend_on_the_rest_of_the_batch() -> None:
    keep, _ = random_mask(0, IDS, EPOCH, num_patches=64, ratio=0.75)
    for row in (0, 57, 199):
        alone, _ = random_mask(0, IDS[row, None], EPOCH[row, None], num_patches=64, ratio=0.75)
        assert torch.equal(alone[0], keep[row])


def test_masks_differ_between_samples_and_epochs_and_favour_no_patch() -> None:
    keep, _ = random_mask(0, IDS, EPOCH, num_patches=64, ratio=0.75)
    later, _ = random_mask(0, IDS, EPOCH + 1, num_patches=64, ratio=0.75)
    assert len(torch.unique(torch.cat([keep, later]), dim=0)) == 400
    # 200 draws of probability 1/4: mean 50, deviation 6.1; the largest of 64 is within 4 deviations.
    assert (torch.bincount(keep.flatten(), minlength=64) - 50).abs().max() < 25
