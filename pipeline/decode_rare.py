"""Formats and variants that are rare on the web, or that the fast decoders read wrongly: all of them by Pillow."""

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.orientation import ORIENTATION
from pipeline.picture import Decoded, ImageError, Pixels, check_pixels
from pipeline.reasons import Reason

warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on damaged metadata
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any decoding

ANIMATED = frozenset({"gif", "png", "webp", "avif"})
BLOCK_ROWS = 128
"""Rows that are worked on together: what is needed beside the image itself stays small."""


def decode_with_pillow(body: bytes, source_format: str, max_pixels: int) -> Decoded:
    """Of several frames or pages the first. Raises ImageError; on damaged files also what Pillow raises."""
    try:
        with Image.open(io.BytesIO(body), formats=[source_format.upper()]) as image:
            check_pixels(*image.size, max_pixels)
            is_animated = source_format in ANIMATED and bool(getattr(image, "is_animated", False))
            image.seek(0)
            image.load()
            orientation = _orientation(image)
            is_plain = image.mode in ("1", "L", "P", "RGB") and "transparency" not in image.info
            pixels = flatten(_as_array(image))
    except OSError as error:
        is_cut = "truncated" in str(error).lower()
        reason = Reason.TRUNCATED_IMAGE if is_cut else Reason.UNDECODABLE_IMAGE
        raise ImageError(reason, " ".join(str(error).split())[:200]) from None
    height, width = pixels.shape[:2]
    return Decoded(
        pixels=pixels,
        width=width,
        height=height,
        orientation=orientation,
        is_animated=is_animated,
        is_plain=is_plain,
    )


def read_header(body: bytes, source_format: str) -> tuple[int, int, bool]:
    """Width, height, and whether there are several frames. Raises OSError where there is none to read."""
    with Image.open(io.BytesIO(body), formats=[source_format.upper()]) as image:
        return *image.size, bool(getattr(image, "is_animated", False))


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 (upright) where damaged metadata do not tell, which is no reason to lose the image."""
    try:
        value = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's parser raises SyntaxError, struct.error, TypeError, ...
        return 1
    return value if 1 <= value <= 8 else 1


def flatten(raw: NDArray[Any]) -> Pixels:
    """Grey, BGR or BGRA values of 8 or 16 bit -> 8-bit BGR; transparency over white."""
    if raw.dtype == np.uint8 and raw.ndim == 3 and raw.shape[2] == 3:
        return raw
    flat = np.empty((*raw.shape[:2], 3), np.uint8)
    for top in range(0, len(raw), BLOCK_ROWS):
        flat[top : top + BLOCK_ROWS] = _flatten_block(raw[top : top + BLOCK_ROWS])
    return flat


def _flatten_block(raw: NDArray[Any]) -> NDArray[Any]:
    if raw.dtype == np.uint16:
        raw = ((raw.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if raw.ndim == 2:
        return raw[:, :, None]
    if raw.shape[2] == 3:
        return raw
    alpha = raw[:, :, 3:].astype(np.uint16)
    return (raw[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255


def _as_array(image: Image.Image) -> NDArray[Any]:
    """Pillow's image as an array of grey, BGR or BGRA values, 8 or 16 bit."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        deep: NDArray[Any] = np.asarray(image)
        return deep.clip(0, 65_535).astype(np.uint16)
    if image.mode == "F":
        raise ImageError(Reason.UNDECODABLE_IMAGE, "floating-point pixels")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))[:, :, [2, 1, 0, 3]]
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
