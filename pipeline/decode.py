"""Decoding images of every kind that the web has, strictly: what is cut short or damaged is told from what is whole."""

import io
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.reasons import Reason

warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on damaged metadata
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before any decoding
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Pixels = NDArray[np.uint8]
"""[height, width, 3], blue green red."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ANIMATED = frozenset({"gif", "png", "webp", "avif"})
EXIF_ORIENTATION = 0x0112


class ImageError(Exception):
    """The body is no usable image: the row's reason, and a few words for people."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Pixels as stored, the EXIF orientation (1 to 8) still to be applied."""

    pixels: Pixels
    orientation: int
    is_animated: bool


def sniff(body: bytes) -> str:
    """The format by the first bytes. Raises ImageError with `not_an_image`."""
    if body.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if body.startswith(PNG_SIGNATURE):
        return "png"
    if body.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "webp"
    if body.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    if body[4:8] == b"ftyp" and (b"avif" in body[8:64] or b"avis" in body[8:64]):
        return "avif"
    if body.startswith(b"BM") and len(body) > 26 and body[14] in (12, 40, 52, 56, 64, 108, 124):
        return "bmp"
    raise ImageError(Reason.NOT_AN_IMAGE, _what_instead(body))


def decode(body: bytes, source_format: str, max_pixels: int) -> Decoded:
    """Decode a body that `sniff` has named. Raises ImageError; on damaged files also what the decoders raise."""
    if source_format == "jpeg":
        return _decode_jpeg(body, max_pixels)
    if source_format == "png":
        return _decode_png(body, max_pixels)
    if source_format == "webp":
        return _decode_webp(body, max_pixels)
    return _decode_with_pillow(body, source_format, max_pixels)


def _decode_jpeg(body: bytes, max_pixels: int) -> Decoded:
    """libjpeg fills missing data with grey; its warnings tell truncated files from harmless oddities."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(body)
        _check_pixels(width, height, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return _decode_with_pillow(body, "jpeg", max_pixels)
        pixels = simplejpeg.decode_jpeg(body, colorspace="BGR")
    except ValueError as error:
        if re.search("premature|no jpeg data|end of", str(error), re.IGNORECASE) or b"\xff\xd9" not in body:
            raise ImageError(Reason.TRUNCATED_IMAGE, str(error)) from None
        pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise ImageError(Reason.UNDECODABLE_IMAGE, str(error)) from None
    has_exif = b"Exif\0\0" in body[:131_072]
    return Decoded(pixels=pixels, orientation=_orientation(body) if has_exif else 1, is_animated=False)


def _decode_png(body: bytes, max_pixels: int) -> Decoded:
    chunks = _png_chunks(body)
    if len(body) < 26:
        raise ImageError(Reason.TRUNCATED_IMAGE, "ends in the header")
    width, height = struct.unpack_from(">II", body, 16)
    _check_pixels(width, height, max_pixels)
    if b"IEND" not in chunks:
        raise ImageError(Reason.TRUNCATED_IMAGE, "has no end marker")
    has_palette = body[25] == 3
    if has_palette or b"tRNS" in chunks or b"acTL" in chunks:
        return _decode_with_pillow(body, "png", max_pixels)
    raw = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise ImageError(Reason.UNDECODABLE_IMAGE, "damaged PNG data")
    orientation = _orientation(body) if b"eXIf" in chunks else 1
    return Decoded(pixels=_flatten(raw), orientation=orientation, is_animated=False)


def _png_chunks(body: bytes) -> set[bytes]:
    """Types of the chunks that are there as a whole."""
    found, at = set(), len(PNG_SIGNATURE)
    while at + 12 <= len(body):
        (length,) = struct.unpack_from(">I", body, at)
        if at + 12 + length > len(body):
            break
        found.add(body[at + 4 : at + 8])
        at += 12 + length
    return found


def _decode_webp(body: bytes, max_pixels: int) -> Decoded:
    if struct.unpack_from("<I", body, 4)[0] + 8 > len(body):
        raise ImageError(Reason.TRUNCATED_IMAGE, "shorter than its RIFF header says")
    with Image.open(io.BytesIO(body), formats=["WEBP"]) as image:  # reads the header only
        _check_pixels(*image.size, max_pixels)
        is_animated = bool(getattr(image, "is_animated", False))
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1) or 1)
    raw = None if is_animated else cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None:
        return _decode_with_pillow(body, "webp", max_pixels)
    return Decoded(pixels=_flatten(raw), orientation=orientation, is_animated=False)


def _decode_with_pillow(body: bytes, source_format: str, max_pixels: int) -> Decoded:
    """Formats and variants that OpenCV reads wrongly or not at all; of several frames the first."""
    try:
        with Image.open(io.BytesIO(body), formats=[source_format.upper()]) as image:
            _check_pixels(*image.size, max_pixels)
            is_animated = source_format in ANIMATED and bool(getattr(image, "is_animated", False))
            image.seek(0)
            image.load()
            orientation = int(image.getexif().get(EXIF_ORIENTATION, 1) or 1)
            return Decoded(pixels=_flatten(_as_array(image)), orientation=orientation, is_animated=is_animated)
    except OSError as error:
        is_cut = "truncated" in str(error).lower()
        reason = Reason.TRUNCATED_IMAGE if is_cut else Reason.UNDECODABLE_IMAGE
        raise ImageError(reason, " ".join(str(error).split())[:200]) from None


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


def _flatten(raw: NDArray[Any]) -> Pixels:
    """Grey, BGR or BGRA values of 8 or 16 bit -> 8-bit BGR; transparency over white."""
    if raw.dtype == np.uint16:
        raw = ((raw.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if raw.ndim == 2:
        return np.repeat(raw[:, :, None], 3, axis=2)
    if raw.shape[2] == 3:
        return raw
    alpha = raw[:, :, 3:].astype(np.uint16)
    over_white = (raw[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return over_white.astype(np.uint8)


def _orientation(body: bytes) -> int:
    try:
        with Image.open(io.BytesIO(body)) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1) or 1)
    except Exception:  # damaged metadata does not make the pixels unusable
        return 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(Reason.TOO_MANY_PIXELS, f"{width}x{height}")
    if width == 0 or height == 0:
        raise ImageError(Reason.UNDECODABLE_IMAGE, f"{width}x{height}")


def _what_instead(body: bytes) -> str:
    head = body[:1_024].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        return "looks like HTML"
    if head.startswith(b"<svg") or b"<svg" in head:
        return "is SVG"
    if head.startswith((b"{", b"[")):
        return "looks like JSON"
    return f"begins with {body[:8].hex(' ')}"
