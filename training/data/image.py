"""Encoded image bytes to a uint8 RGB square."""

from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


class BadImageError(Exception):
    """The bytes are not an image that can be decoded."""


def decode_square(data: bytes, image_format: str, side: int) -> Pixels:
    """Decode to RGB uint8 [side, side, 3]: the largest centred square, resized; transparent parts on white.

    A JPEG is decoded at the smallest of its built-in reductions that is not smaller than the square, which costs a
    fraction of a full decode. Raises BadImageError.
    """
    return to_square(_decode_jpeg(data, side) if image_format in ("jpg", "jpeg") else _decode_other(data), side)


def to_square(pixels: Pixels, side: int) -> Pixels:
    """The largest centred square of a picture, resized to [side, side, 3]."""
    height, width = pixels.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    pixels = pixels[top : top + square, left : left + square]
    if square == side:
        return np.ascontiguousarray(pixels)
    interpolation = cv2.INTER_AREA if square > side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, (side, side), interpolation=interpolation), dtype=np.uint8)


def _decode_jpeg(data: bytes, side: int) -> Pixels:
    try:
        decoded: Pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side)
        return decoded
    except ValueError as error:
        raise BadImageError(str(error)) from None


def _decode_other(data: bytes) -> Pixels:
    try:
        decoded: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise BadImageError(str(error)) from None
    if decoded is None:
        raise BadImageError("not an image that OpenCV can decode")
    if decoded.dtype != np.uint8:
        decoded = (decoded / 257).astype(np.uint8)
    if decoded.ndim == 2:
        return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    colours = cv2.cvtColor(decoded[..., :3], cv2.COLOR_BGR2RGB)
    if decoded.shape[2] == 4:
        opacity = decoded[..., 3:].astype(np.float32) / 255
        colours = np.rint(colours * opacity + 255 * (1 - opacity))
    return np.asarray(colours, dtype=np.uint8)
