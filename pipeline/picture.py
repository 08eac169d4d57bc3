"""What decoders give and what they refuse: the words that all modules about images share."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.reasons import Reason

Pixels = NDArray[np.uint8]
"""[height, width, 3], blue green red."""

Boxes = list[list[float]]
"""Rectangles of the upright image, each [x_min, y_min, x_max, y_max] as parts of its width and height, 0 to 1."""


class ImageError(Exception):
    """The body is no usable image: the row's reason, and a few words for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Pixels as stored, the EXIF orientation (1 to 8) still to be applied.

    width, height: of the file; `pixels` may be smaller where a smaller image is all that was needed.
    is_plain: 8-bit grey or RGB without transparency, so that the body shows just these pixels.
    """

    pixels: Pixels
    width: int
    height: int
    orientation: int = 1
    is_animated: bool = False
    is_plain: bool = True


@dataclass(frozen=True, kw_only=True)
class Processed:
    """An encoded image and what one decode told; measures as in `pipeline.signals`. Originals are upright sizes.

    exif: JSON of the tags, None unless asked for.
    """

    data: bytes
    source_format: str
    original_width: int
    original_height: int
    width: int
    height: int
    is_animated: bool
    grey_std: float
    mean_red: float
    mean_green: float
    mean_blue: float
    phash: int
    phash_mirror: int
    sharpness: float
    exif: str | None


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Refuse by the size that a header states, before anything is decoded."""
    if width * height > max_pixels:
        raise ImageError(Reason.TOO_MANY_PIXELS, f"{width}x{height}")
    if width <= 0 or height <= 0:
        raise ImageError(Reason.UNDECODABLE_IMAGE, f"{width}x{height}")
