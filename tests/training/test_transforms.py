"""Crops are exact resizes of boxes that depend on the sample alone."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.data.transforms import MEAN_C, STD_C, evaluation_view, normalise, random_boxes, resample, training_view

IDS = torch.arange(64) * 31
EPOCHS = torch.zeros(64, dtype=torch.int64)


def pictures(batch: int, side: int) -> Tensor:
    """Smooth random pictures, so that resizing methods are comparable."""
    coarse = torch.randint(0, 256, (batch, 3, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    fine = functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    return fine.permute(0, 2, 3, 1).round().to(torch.uint8)


def whole(batch: int) -> Tensor:
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(batch, 4)


def view(images: Tensor, rows: slice = slice(None), *, flip: bool = False, epoch: int = 0) -> Tensor:
    return training_view(
        images[rows],
        side=16,
        crop_scale=(0.5, 1.0),
        flip=flip,
        seed=3,
        sample_ids_B=IDS[: len(images)][rows],
        epoch_B=EPOCHS[: len(images)][rows] + epoch,
    )


def test_the_whole_picture_at_its_own_size_is_unchanged() -> None:
    images = pictures(2, 12)
    torch.testing.assert_close(resample(images, whole(2), 12), images.permute(0, 3, 1, 2).float())


def test_a_box_of_whole_pixels_is_a_slice() -> None:
    images = pictures(1, 8)
    box = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    torch.testing.assert_close(resample(images, box, 4), images[:, 2:6, 4:8].permute(0, 3, 1, 2).float())


def test_a_box_with_its_sides_swapped_is_mirrored() -> None:
    images = pictures(1, 8)
    mirrored = resample(images, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 8)
    torch.testing.assert_close(mirrored, images.permute(0, 3, 1, 2).flip(-1).float())


def test_resizing_agrees_with_pillows_antialiased_bilinear() -> None:
    noise = torch.randint(0, 256, (1, 37, 37, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    for side in (10, 16, 50):
        pillow = np.asarray(Image.fromarray(noise[0].numpy()).resize((side, side), Image.Resampling.BILINEAR))
        ours = resample(noise, whole(1), side)[0].permute(1, 2, 0)
        # Pillow rounds to whole grey levels after each axis: up to half a level each.
        assert (ours - torch.from_numpy(pillow.copy()).float()).abs().max() <= 1.01


def test_normalised_pixels_have_clips_mean_and_deviation_at_zero_and_one() -> None:
    mean, deviation = torch.tensor(MEAN_C)[None, :, None, None], torch.tensor(STD_C)[None, :, None, None]
    torch.testing.assert_close(normalise(mean * 255), torch.zeros(1, 3, 1, 1))
    torch.testing.assert_close(normalise((mean + deviation) * 255), torch.ones(1, 3, 1, 1))


def test_a_crop_does_not_depend_on_the_rest_of_the_batch() -> None:
    images = pictures(8, 20)
    together = view(images, flip=True)
    for row in range(8):
        torch.testing.assert_close(view(images, slice(row, row + 1), flip=True)[0], together[row])


def test_crops_repeat_within_an_epoch_and_change_with_the_next() -> None:
    images = pictures(8, 20)
    assert torch.equal(view(images), view(images))
    changed = (view(images) - view(images, epoch=1)).abs().flatten(1).amax(1)
    assert (changed > 0.01).all()


def test_boxes_lie_inside_and_keep_the_asked_share_of_the_area() -> None:
    ids = torch.arange(5000)
    box = random_boxes(0, ids, torch.zeros_like(ids), crop_scale=(0.3, 0.6), stream="crop")
    height, width = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    assert box.min() >= 0
    assert box.max() <= 1 + 1e-6
    # sqrt(0.6 * 4/3) < 1, so no side is ever cut and the area is exactly what was drawn.
    assert (height * width).min() >= 0.3 - 1e-5
    assert (height * width).max() <= 0.6 + 1e-5
    assert abs((height * width).mean() - 0.45) < 0.005
    assert (width / height).min() >= 0.75 - 1e-4
    assert (width / height).max() <= 4 / 3 + 1e-4


def test_half_of_the_pictures_are_mirrored_when_asked() -> None:
    images = pictures(1, 16).expand(64, 16, 16, 3)
    plain, flipped = view(images), view(images, flip=True)
    mirrored = [
        torch.equal(a, b.flip(-1)) or torch.allclose(a, b.flip(-1), atol=1e-4)
        for a, b in zip(plain, flipped, strict=True)
    ]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert all(one != other for one, other in zip(mirrored, same, strict=True))
    assert 18 <= sum(mirrored) <= 46  # 32 expected, deviation 4; the draw is fixed


def test_the_evaluation_view_is_the_centred_square() -> None:
    images = pictures(1, 12)
    wide = torch.cat(
        [torch.zeros(1, 12, 4, 3, dtype=torch.uint8), images, torch.zeros(1, 12, 4, 3, dtype=torch.uint8)], 2
    )
    torch.testing.assert_close(evaluation_view(wide, 12), normalise(images.permute(0, 3, 1, 2).float()))
    assert evaluation_view(wide, 6).shape == (1, 3, 6, 6)


def test_crops_are_float32_under_autocast() -> None:
    images = pictures(4, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = view(images)
    assert torch.equal(inside, view(images))
