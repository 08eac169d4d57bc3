"""From a downloaded body to an encoded image: sniff, check, decode, orient, resize, blur, measure, encode.

Contents decide, never the name or the Content-Type. Every function is pure, its heavy parts run without the GIL, and
the same body gives the same bytes. A body that is no usable image raises `ImageError` with the row's reason.

Two modes (docs/images.md has their speed and loss):
    exact   the whole image is decoded, then shrunk by area averaging: the pixels of cv2.imdecode and INTER_AREA
    fast    a JPEG is decoded at the smallest half, quarter or eighth that is not smaller than the result, then shrunk
"""

from typing import TYPE_CHECKING

import cv2

from pipeline.blur import blur
from pipeline.decode import decode, sniff
from pipeline.orientation import orient, swaps_sides
from pipeline.picture import Boxes, Decoded, ImageError, Pixels, Processed
from pipeline.reasons import Reason
from pipeline.resize import add_border, crop_centre, resize, target_size
from pipeline.signals import measure

__all__ = ["Boxes", "ImageError", "Pixels", "Processed", "decode_resized", "encode", "process"]

if TYPE_CHECKING:  # it imports far more than a decoding process needs
    from pipeline.config import ImageConfig


def process(body: bytes, config: "ImageConfig", boxes: Boxes | None = None) -> Processed:
    """Turn a body into the encoded image that the settings ask for. Raises ImageError, and nothing else.

    boxes: what is to be blurred.
    """
    source_format = sniff(body)
    try:
        return _process(body, source_format, config, boxes or [])
    except ImageError:
        raise
    except (Exception, MemoryError) as error:  # decoders raise whatever a damaged file leads them to
        detail = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ImageError(Reason.UNDECODABLE_IMAGE, detail) from None


def decode_resized(body: bytes, source_format: str, config: "ImageConfig") -> tuple[Decoded, Pixels]:
    """What was decoded, and its pixels upright and at their target size, neither cropped nor bordered."""

    def needed(width: int, height: int) -> tuple[int, int]:
        return target_size(width, height, config)

    decoded = decode(body, source_format, config.max_pixels, needed if config.mode == "fast" else None)
    pixels = orient(decoded.pixels, decoded.orientation)
    return decoded, resize(pixels, target_size(*_upright_size(decoded), config), config)


def encode(pixels: Pixels, config: "ImageConfig") -> bytes:
    """The file that is stored."""
    options = {
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, config.quality],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, config.quality],
        "png": [cv2.IMWRITE_PNG_COMPRESSION, config.png_compression],
    }
    done, data = cv2.imencode(f".{config.format}", pixels, options[config.format])
    if not done:
        raise ValueError(f"cannot be written as {config.format}")
    return bytes(data)


def _process(body: bytes, source_format: str, config: "ImageConfig", boxes: Boxes) -> Processed:
    decoded, resized = decode_resized(body, source_format, config)
    blurred = blur(resized, boxes)
    picture = crop_centre(blurred, config.size) if config.resize == "center_crop" else blurred
    final = add_border(picture, config.size) if config.resize == "border" else picture
    height, width = final.shape[:2]
    original_width, original_height = _upright_size(decoded)
    is_kept = (
        config.encode == "keep"
        and (source_format, config.format) in (("jpeg", "jpg"), ("png", "png"), ("webp", "webp"))
        and (width, height, decoded.orientation) == (decoded.width, decoded.height, 1)
        and decoded.is_plain
        and not decoded.is_animated
        and not boxes
    )
    return Processed(
        data=body if is_kept else encode(final, config),
        source_format=source_format,
        original_width=original_width,
        original_height=original_height,
        width=width,
        height=height,
        is_animated=decoded.is_animated,
        exif=_exif(body) if config.exif else None,
        **vars(measure(picture)),
    )


def _upright_size(decoded: Decoded) -> tuple[int, int]:
    if swaps_sides(decoded.orientation):
        return decoded.height, decoded.width
    return decoded.width, decoded.height


def _exif(body: bytes) -> str | None:
    from pipeline.exif import exif_json  # only those who ask for it load its parser

    return exif_json(body)
