"""Blurring rectangles of an image, faces most of all, so that it looks as if img2dataset had done it.

The method is that of Yang et al. (2022), "A study of face obfuscation in ImageNet": each box is grown by a tenth of
its longer side, and the image is mixed with a blurred one by a mask that is blurred as well, so no edge shows.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.picture import Boxes, Pixels

MARGIN = 0.1
SIGMA = 0.1
"""Margin and reach of the blur, as parts of the longest box's longer side."""


def blur(pixels: Pixels, boxes: Boxes) -> Pixels:
    """The image with the boxes blurred. Boxes reaching out of it are cut; none at all leaves it as it is."""
    if not boxes:
        return pixels
    mask, longest = _mask(pixels.shape[0], pixels.shape[1], boxes)
    side = max(3, int(2 * math.ceil(SIGMA * longest) + 1))  # odd
    # Single precision throughout and the fraction cut off at the end, as img2dataset does.
    image = pixels.astype(np.float32) / 255
    weight = cv2.GaussianBlur(mask, (side, side), 0)[:, :, None]
    blurred = cv2.GaussianBlur(image, (side, side), 0)
    mixed = image * (1 - weight) + blurred * weight
    result: Pixels = (mixed * 255).astype(np.uint8)
    return result


def _mask(height: int, width: int, boxes: Boxes) -> tuple[NDArray[np.float32], int]:
    """[height, width] 1 inside the grown boxes, and the longest side of the boxes before they grew."""
    mask = np.zeros((height, width), np.float32)
    longest = 0
    for x_min, y_min, x_max, y_max in boxes:
        left, top, right, bottom = int(x_min * width), int(y_min * height), int(x_max * width), int(y_max * height)
        side = max(right - left, bottom - top)
        longest = max(longest, side)
        left, right = (min(max(int(x), 0), width - 1) for x in (left - MARGIN * side, right + MARGIN * side))
        top, bottom = (min(max(int(y), 0), height - 1) for y in (top - MARGIN * side, bottom + MARGIN * side))
        mask[top:bottom, left:right] = 1
    return mask, longest
