"""From a downloaded body to an encoded image: sniff, check, decode, orient, resize, measure, encode.

Contents decide, never the name or the Content-Type. Every function is pure, its heavy parts run without the GIL, and
the same body gives the same bytes. A body that is no usable image raises `ImageError` with the row's reason.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.config import ImageConfig
from pipeline.decode import ImageError, Pixels, decode, sniff
from pipeline.reasons import Reason


@dataclass(frozen=True, kw_only=True)
class Processed:
    """An encoded image and what one decode told. Original sizes are those of the oriented image.

    grey_std: standard deviation of the resized image's grey values, 0 to 127.5. means: 0 to 255. Both without border.
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


def process(body: bytes, config: ImageConfig) -> Processed:
    """Turn a body into the encoded image that the settings ask for. Raises ImageError, and nothing else."""
    source_format = sniff(body)
    try:
        decoded = decode(body, source_format, config.max_pixels)
        pixels = orient(decoded.pixels, decoded.orientation)
        height, width = pixels.shape[:2]
        resized = resize(pixels, config)
        blue, green, red = (float(mean) for mean in cv2.mean(resized)[:3])
        grey_std = float(cv2.meanStdDev(cv2.cvtColor(resized, cv2.COLOR_BGR2GRAY))[1][0, 0])
        final = _add_border(resized, config.size) if config.resize == "border" else resized
        data = _encode(final, config)
    except ImageError:
        raise
    except (Exception, MemoryError) as error:  # decoders raise whatever a damaged file leads them to
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ImageError(Reason.UNDECODABLE_IMAGE, detail) from None
    return Processed(
        data=data,
        source_format=source_format,
        original_width=width,
        original_height=height,
        width=final.shape[1],
        height=final.shape[0],
        is_animated=decoded.is_animated,
        grey_std=round(grey_std, 4),
        mean_red=round(red, 4),
        mean_green=round(green, 4),
        mean_blue=round(blue, 4),
    )


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation, so that the image stands as it was meant to."""
    if orientation in (5, 6, 7, 8):
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def resize(pixels: Pixels, config: ImageConfig) -> Pixels:
    """The image at its target size, by area averaging when it shrinks; the border is not yet added."""
    height, width = pixels.shape[:2]
    if config.resize == "no":
        return pixels
    fits_inside = config.resize in ("keep_ratio_largest", "border")
    scale = config.size / (max(height, width) if fits_inside else min(height, width))
    if scale < 1 or (scale > 1 and not config.only_if_bigger):
        target = (max(1, round(width * scale)), max(1, round(height * scale)))
        if target[0] * target[1] > config.max_pixels:
            raise ImageError(Reason.TOO_MANY_PIXELS, f"{target[0]}x{target[1]} after enlarging")
        pixels = cv2.resize(pixels, target, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    if config.resize == "center_crop":
        top, left = (max(0, (side - config.size) // 2) for side in pixels.shape[:2])
        pixels = np.ascontiguousarray(pixels[top : top + config.size, left : left + config.size])
    return pixels


def _add_border(pixels: Pixels, size: int) -> Pixels:
    height, width = pixels.shape[:2]
    side = max(size, height, width)
    top, left = (side - height) // 2, (side - width) // 2
    edges = (top, side - height - top, left, side - width - left)
    bordered: Pixels = cv2.copyMakeBorder(pixels, *edges, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return bordered


def _encode(pixels: Pixels, config: ImageConfig) -> bytes:
    options = {
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, config.quality],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, config.quality],
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 6],
    }
    done, data = cv2.imencode(f".{config.format}", pixels, options[config.format])
    if not done:
        raise ValueError(f"cannot be written as {config.format}")
    return bytes(data)
