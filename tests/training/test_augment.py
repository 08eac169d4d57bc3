"""SLIP's views: each change is what its name says, and a view depends on the sample alone."""

import pytest
import torch
from torch import Tensor

from training.data.augment import GREY_C, blur, jitter, luminance, simclr_view
from training.data.transforms import MEAN_C, STD_C

IDS = torch.arange(64) * 31
EPOCHS = torch.zeros(64, dtype=torch.int64)


def pictures(batch: int = 4, side: int = 12) -> Tensor:
    return torch.randint(30, 200, (batch, side, side, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def pixels(batch: int = 4) -> Tensor:
    return pictures(batch).permute(0, 3, 1, 2).float()


def view(images: Tensor, rows: slice = slice(None), *, stream: str = "view/0", epoch: int = 0) -> Tensor:
    ids, epochs = IDS[: len(images)][rows], EPOCHS[: len(images)][rows] + epoch
    return simclr_view(
        images[rows], side=8, crop_scale=(0.08, 1.0), seed=3, sample_ids_B=ids, epoch_B=epochs, stream=stream
    )


def strength(**keys: float) -> Tensor:
    names = ("brightness", "contrast", "saturation", "hue")
    return torch.tensor([[keys.get(name, 0.0) for name in names]]).expand(4, 4)


def test_no_strength_changes_nothing() -> None:
    # The hue's matrices are rounded to float32: 2^-24 of 255.
    torch.testing.assert_close(jitter(pixels(), strength()), pixels(), rtol=0, atol=1e-3)


def test_brightness_scales_and_is_cut_at_white() -> None:
    torch.testing.assert_close(
        jitter(pixels(), strength(brightness=1)), (pixels() * 1.4).clamp(max=255), rtol=0, atol=1e-3
    )


def test_contrast_scales_the_distance_to_the_mean_luminance() -> None:
    mean = luminance(pixels()).mean((1, 2, 3), keepdim=True)
    expected = mean + 0.6 * (pixels() - mean)
    torch.testing.assert_close(jitter(pixels(), strength(contrast=-1)), expected, rtol=0, atol=1e-3)


def test_a_saturation_of_zero_would_be_grey_and_less_saturation_lies_between() -> None:
    red, green, blue = pixels().unbind(1)
    grey = (GREY_C[0] * red + GREY_C[1] * green + GREY_C[2] * blue)[:, None]
    torch.testing.assert_close(luminance(pixels()), grey.expand(-1, 3, -1, -1))
    expected = 0.6 * pixels() + 0.4 * grey
    torch.testing.assert_close(jitter(pixels(), strength(saturation=-1)), expected, rtol=0, atol=1e-3)


def test_turning_the_hue_keeps_the_luminance_and_turning_back_restores_it() -> None:
    muted = pixels() * 0.2 + 100  # far from black and white, where colours would be cut
    turned = jitter(muted, strength(hue=1))
    assert (turned - muted).abs().max() > 2
    torch.testing.assert_close(luminance(turned), luminance(muted), rtol=0, atol=0.05)
    torch.testing.assert_close(jitter(turned, strength(hue=-1)), muted, rtol=0, atol=1e-2)


def test_a_blur_is_the_gaussian_of_each_pictures_own_width() -> None:
    dot = torch.zeros(2, 3, 41, 41)
    dot[:, :, 20, 20] = 1
    blurred = blur(dot, torch.tensor([1.0, 2.0]))
    for row, sigma in enumerate((1.0, 2.0)):
        # exp(-d^2 / (2 sigma^2)) next to the middle, whatever the normalisation.
        ratio = (blurred[row, 0, 20, 21] / blurred[row, 0, 20, 20]).item()
        assert ratio == pytest.approx(torch.exp(torch.tensor(-0.5 / sigma**2)).item(), rel=1e-5)
    flat = torch.full((2, 3, 15, 15), 90.0)
    torch.testing.assert_close(blur(flat, torch.tensor([0.1, 5.0])), flat)


def test_a_view_depends_on_the_sample_and_not_on_the_batch() -> None:
    together = view(pictures(8))
    for row in (0, 3, 7):
        torch.testing.assert_close(view(pictures(8), slice(row, row + 1))[0], together[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(together, view(pictures(8)))


def test_two_views_of_a_sample_differ_and_so_do_two_epochs() -> None:
    images = pictures(8)
    for other in (view(images, stream="view/1"), view(images, epoch=1)):
        assert ((view(images) - other).abs().flatten(1).amax(1) > 0.01).all()


def test_a_fifth_of_the_views_is_grey() -> None:
    images = pictures(1).expand(64, 12, 12, 3)
    views = view(images) * torch.tensor(STD_C)[:, None, None] + torch.tensor(MEAN_C)[:, None, None]
    num_grey = int(((views.amax(1) - views.amin(1)).flatten(1).amax(1) < 1e-4).sum())
    assert 4 <= num_grey <= 24  # 12.8 expected, deviation 3.2; the draw is fixed


def test_views_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = view(pictures())
    assert torch.equal(inside, view(pictures()))
