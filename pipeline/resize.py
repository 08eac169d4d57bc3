"""Target sizes, and how an image gets there."""

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.area import shrink_area
from pipeline.picture import ImageError, Pixels
from pipeline.reasons import Reason

if TYPE_CHECKING:  # it imports far more than a decoding process needs
    from pipeline.config import ImageConfig

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "bilinear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
    "lanczos4": cv2.INTER_LANCZOS4,
}


def target_size(width: int, height: int, config: "ImageConfig") -> tuple[int, int]:
    """Width and height after resizing, before cropping or a border. Raises ImageError when that is too large."""
    if config.resize == "no":
        return width, height
    fits_inside = config.resize in ("keep_ratio_largest", "border")
    scale = config.size / (max(height, width) if fits_inside else min(height, width))
    if scale == 1 or (scale > 1 and config.only_if_bigger):
        return width, height
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    if target[0] * target[1] > config.max_pixels:
        raise ImageError(Reason.TOO_MANY_PIXELS, f"{target[0]}x{target[1]} after enlarging")
    return target


def resize(pixels: Pixels, size: tuple[int, int], config: "ImageConfig") -> Pixels:
    """The image at this width and height."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    shrinks = size[0] <= width and size[1] <= height
    name = config.downscale_interpolation if shrinks else config.upscale_interpolation
    if shrinks and name == "area":
        return shrink_area(pixels, *size)
    resized: Pixels = cv2.resize(pixels, size, interpolation=INTERPOLATIONS[name])
    return resized


def crop_centre(pixels: Pixels, side: int) -> Pixels:
    """The middle square; a side that is shorter stays as it is."""
    top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def add_border(pixels: Pixels, side: int) -> Pixels:
    """White on both sides, up to a square."""
    height, width = pixels.shape[:2]
    side = max(side, height, width)
    top, left = (side - height) // 2, (side - width) // 2
    edges = (top, side - height - top, left, side - width - left)
    bordered: Pixels = cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return bordered
