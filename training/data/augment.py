"""SimCLR's augmentation on the device: crop, flip, colour jitter, greyscale, blur; a function of the sample alone.

Every step is one linear map, so a batch with other strengths for every picture needs no loop: colours are 3 x 3
matrices, a blur is a matrix product per axis.

Legend: B batch, H W source rows and columns, C colours, S side of the result, n draws.
"""

import math

import torch
from torch import Tensor

from training import random
from training.data.transforms import normalise, random_boxes, resample

JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY = 0.8, 0.2, 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.4, 0.1
"""Largest changes: of factors around 1, and of the hue in turns; SLIP's values."""
BLUR_SIGMA = (0.1, 2.0)
"""Least and most deviation of the blur, in pixels of a picture with side 224."""
GREY_C = (0.299, 0.587, 0.114)
"""Share of each colour in the luminance (ITU-R BT.601)."""
_TO_YIQ = torch.tensor([GREY_C, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)], dtype=torch.float64)


@torch.no_grad()
def simclr_view(
    images_BHWC: Tensor,
    *,
    side: int,
    crop_scale: tuple[float, float],
    seed: int,
    sample_ids_B: Tensor,
    epoch_B: Tensor,
    stream: str,
) -> Tensor:
    """Return normalised float32 [B, C, S, S]: SLIP's view for self-supervision, drawn by (seed, stream, id, epoch).

    Where torchvision draws the order of the colour changes, it is fixed here: brightness, contrast, saturation, hue.
    The hue is turned in YIQ, which is linear. The blur's width scales with the side.
    """
    device = images_BHWC.device
    box_B4 = random_boxes(seed, sample_ids_B, epoch_B, crop_scale=crop_scale, stream=stream)
    draws_Bn = random.uniform(seed, sample_ids_B, epoch_B, f"{stream}/colour", 9, device)
    mirrored_B, jittered_B, grey_B, blurred_B = (
        draws_Bn[:, :4] < draws_Bn.new_tensor([0.5, JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY])
    ).unbind(1)
    strength_B4, sigma_B = 2 * draws_Bn[:, 4:8] - 1, draws_Bn[:, 8]
    box_B4 = torch.where(mirrored_B[:, None], box_B4[:, [0, 3, 2, 1]], box_B4)
    pixels_BCSS = resample(images_BHWC, box_B4, side)
    with torch.autocast(device.type, enabled=False):
        pixels_BCSS = jitter(pixels_BCSS, strength_B4 * jittered_B[:, None])
        pixels_BCSS = torch.where(grey_B[:, None, None, None], luminance(pixels_BCSS), pixels_BCSS)
        least, most = BLUR_SIGMA
        sigma_B = (least + (most - least) * sigma_B) * (side / 224)
        pixels_BCSS = torch.where(blurred_B[:, None, None, None], blur(pixels_BCSS, sigma_B), pixels_BCSS)
    return normalise(pixels_BCSS)


def jitter(pixels_BCSS: Tensor, strength_B4: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of pixels in [0, 255]; strengths in [-1, 1], 0 is no change."""
    change_B4 = strength_B4 * strength_B4.new_tensor([BRIGHTNESS, CONTRAST, SATURATION, HUE])
    factor_B3, turn_B = 1 + change_B4[:, :3], change_B4[:, 3]
    brightness_B111, contrast_B111, saturation_B111 = factor_B3[:, :, None, None, None].unbind(1)
    x_BCSS = (pixels_BCSS * brightness_B111).clamp(0, 255)
    mean_B111 = luminance(x_BCSS).mean((1, 2, 3), keepdim=True)
    x_BCSS = (mean_B111 + contrast_B111 * (x_BCSS - mean_B111)).clamp(0, 255)
    grey_BCSS = luminance(x_BCSS)
    x_BCSS = (grey_BCSS + saturation_B111 * (x_BCSS - grey_BCSS)).clamp(0, 255)
    return torch.einsum("bij,bjhw->bihw", _hue_turn(turn_B), x_BCSS).clamp(0, 255)


def luminance(pixels_BCSS: Tensor) -> Tensor:
    """Return the grey picture, [B, C, S, S], all colours equal."""
    weight_C = pixels_BCSS.new_tensor(GREY_C)
    return torch.einsum("c,bchw->bhw", weight_C, pixels_BCSS)[:, None].expand_as(pixels_BCSS)


def blur(pixels_BCSS: Tensor, sigma_B: Tensor) -> Tensor:
    """Return each picture convolved with a Gaussian of its own deviation, in pixels; at the border it is cut off."""
    place_S = torch.arange(pixels_BCSS.shape[-1], device=pixels_BCSS.device, dtype=torch.float32)
    distance_SS = place_S[:, None] - place_S
    weight_BSS = torch.exp(-(distance_SS**2) / (2 * sigma_B[:, None, None] ** 2))
    weight_B1SS = (weight_BSS / weight_BSS.sum(-1, keepdim=True))[:, None]
    return weight_B1SS @ pixels_BCSS @ weight_B1SS.transpose(-1, -2)


def _hue_turn(turn_B: Tensor) -> Tensor:
    """Matrices [B, C, C] that turn the hue by shares of a full turn and leave the luminance."""
    angle_B = 2 * math.pi * turn_B.double()
    to_yiq = _TO_YIQ.to(turn_B.device)
    turn_BCC = torch.eye(3, dtype=torch.float64, device=turn_B.device).repeat(len(turn_B), 1, 1)
    turn_BCC[:, 1, 1] = turn_BCC[:, 2, 2] = angle_B.cos()
    turn_BCC[:, 2, 1] = angle_B.sin()
    turn_BCC[:, 1, 2] = -turn_BCC[:, 2, 1]
    return (to_yiq.inverse() @ turn_BCC @ to_yiq).float()
