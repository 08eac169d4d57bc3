"""Shrinking by area averaging: OpenCV's INTER_AREA to the last bit, four times as fast where `_area.c` was compiled."""

import ctypes
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np

from pipeline.picture import Pixels

log = logging.getLogger(__name__)


def shrink_area(pixels: Pixels, width: int, height: int) -> Pixels:
    """The image at a size that no side of it exceeds."""
    source_height, source_width = pixels.shape[:2]
    kernel = load_kernel()
    # OpenCV adds up integers where whole numbers of pixels become one: another rounding, and fast enough.
    is_whole = source_height % height == 0 and source_width % width == 0
    if kernel is None or is_whole:
        averaged: Pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        return averaged
    pixels = np.ascontiguousarray(pixels)
    shrunk: Pixels = np.empty((height, width, 3), np.uint8)
    if kernel(pixels.ctypes.data, source_height, source_width, shrunk.ctypes.data, height, width):
        raise MemoryError(f"no memory to shrink {source_width}x{source_height}")
    return shrunk


@cache
def load_kernel() -> Any:
    """The compiled function, None where there is none. A call lets go of the GIL."""
    found = find_spec("pipeline._area")
    if found is None or found.origin is None:
        log.info("pipeline/_area.c was not compiled: OpenCV shrinks images in its place, with the same result")
        return None
    try:
        function = ctypes.CDLL(found.origin).pairmill_shrink_area
    except (OSError, AttributeError) as error:  # compiled for another machine
        log.warning("%s: OpenCV shrinks images in its place, with the same result", error)
        return None
    place, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = (place, number, number, place, number, number)
    function.restype = number
    return function
