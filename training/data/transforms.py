"""Pixels on the device: random crops and normalisation of whole uint8 batches.

Cropping and resizing are one linear map per axis, so a batch is two batched matrix products: rows, then columns. The
weights are a triangle filter widened by the reduction factor, as Pillow's antialiased bilinear resize has it.

Legend: B batch, H W source rows and columns, C colours, S side of the result.
"""

import math

import torch
from torch import Tensor

from training import random

MEAN_C = (0.48145466, 0.4578275, 0.40821073)
"""Mean of RGB / 255 that CLIP normalises with."""
STD_C = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of RGB / 255 that CLIP normalises with."""


def normalise(pixels_BCSS: Tensor) -> Tensor:
    """Map float pixels in [0, 255] to zero mean and unit variance per colour (on CLIP's training data)."""
    mean_C11 = pixels_BCSS.new_tensor(MEAN_C)[:, None, None] * 255
    std_C11 = pixels_BCSS.new_tensor(STD_C)[:, None, None] * 255
    return (pixels_BCSS - mean_C11) / std_C11


def denormalise(pixels_BCSS: Tensor) -> Tensor:
    """Map normalised pixels back to [0, 255]: the inverse of `normalise`."""
    mean_C11 = pixels_BCSS.new_tensor(MEAN_C)[:, None, None] * 255
    std_C11 = pixels_BCSS.new_tensor(STD_C)[:, None, None] * 255
    return pixels_BCSS * std_C11 + mean_C11


@torch.no_grad()
def evaluation_view(images_BHWC: Tensor, side: int) -> Tensor:
    """Return normalised float32 [B, C, S, S] of the largest centred square, antialiased when it is reduced."""
    height, width = images_BHWC.shape[1:3]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    images_BHWC = images_BHWC[:, top : top + square, left : left + square]
    if square == side:
        return normalise(images_BHWC.permute(0, 3, 1, 2).float())
    whole_B = torch.zeros(1, device=images_BHWC.device)
    box_B4 = torch.stack([whole_B, whole_B, whole_B + 1, whole_B + 1], dim=1).expand(len(images_BHWC), 4)
    return normalise(resample(images_BHWC, box_B4, side))


@torch.no_grad()
def training_view(
    images_BHWC: Tensor,
    *,
    side: int,
    crop_scale: tuple[float, float],
    flip: bool,
    seed: int,
    sample_ids_B: Tensor,
    epoch_B: Tensor,
    stream: str = "crop",
) -> Tensor:
    """Return normalised float32 [B, C, S, S] of one random crop of each picture; a function of (seed, id, epoch).

    crop_scale: least and most share of the area. flip: mirror half of the pictures. stream: other views of the same
    sample use other names.
    """
    box_B4 = view_boxes(seed, sample_ids_B, epoch_B, crop_scale=crop_scale, flip=flip, stream=stream)
    return normalise(resample(images_BHWC, box_B4, side))


def view_boxes(
    seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, crop_scale: tuple[float, float], flip: bool, stream: str
) -> Tensor:
    """Return [B, 4], the geometry of `training_view`: as `random_boxes`, right and left swapped where it mirrors."""
    box_B4 = random_boxes(seed, sample_ids_B, epoch_B, crop_scale=crop_scale, stream=stream)
    if not flip:
        return box_B4
    mirrored_B = random.uniform(seed, sample_ids_B, epoch_B, f"{stream}/flip", 1)[:, 0] < 0.5
    return torch.where(mirrored_B[:, None], box_B4[:, [0, 3, 2, 1]], box_B4)


def random_boxes(
    seed: int, sample_ids_B: Tensor, epoch_B: Tensor, *, crop_scale: tuple[float, float], stream: str
) -> Tensor:
    """Return [B, 4] (top, left, bottom, right) in shares of the side: RandomResizedCrop on square pictures.

    Area uniform in crop_scale, log of width/height uniform in log(3/4) .. log(4/3). A side that would leave the
    picture is cut to it, where torchvision draws again up to ten times: one draw keeps the draw count fixed.
    """
    area_u, ratio_u, top_u, left_u = random.uniform(seed, sample_ids_B, epoch_B, stream, 4).unbind(1)
    area_B = crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area_u
    ratio_B = torch.exp((2 * ratio_u - 1) * math.log(4 / 3))
    height_B = (area_B / ratio_B).sqrt().clamp(max=1.0)
    width_B = (area_B * ratio_B).sqrt().clamp(max=1.0)
    top_B, left_B = top_u * (1 - height_B), left_u * (1 - width_B)
    return torch.stack([top_B, left_B, top_B + height_B, left_B + width_B], dim=1)


def resample(images_BHWC: Tensor, box_B4: Tensor, side: int) -> Tensor:
    """Return float32 [B, C, S, S]: each picture's box, resized. right < left mirrors it."""
    with torch.autocast(images_BHWC.device.type, enabled=False):
        rows_BSH = _filter(box_B4[:, 0], box_B4[:, 2], images_BHWC.shape[1], side)
        columns_BSW = _filter(box_B4[:, 1], box_B4[:, 3], images_BHWC.shape[2], side)
        x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        return rows_BSH[:, None] @ x_BCHW @ columns_BSW[:, None].transpose(-1, -2)


def _filter(first_B: Tensor, last_B: Tensor, source: int, side: int) -> Tensor:
    """Weights [B, S, source] that resize source[first:last] (shares of the source) to `side`; each row sums to 1."""
    index_S = torch.arange(side, device=first_B.device, dtype=torch.float32)
    step_B = (last_B - first_B).float() * source / side
    centre_BS = first_B[:, None] * source + (index_S + 0.5) * step_B[:, None]
    support_B11 = step_B.abs().clamp(min=1.0)[:, None, None]
    pixel_H = torch.arange(source, device=first_B.device, dtype=torch.float32) + 0.5
    weight_BSH = (1 - (pixel_H - centre_BS[..., None]).abs() / support_B11).clamp(min=0)
    return weight_BSH / weight_BSH.sum(-1, keepdim=True)
