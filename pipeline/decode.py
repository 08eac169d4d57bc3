"""Decoding images of every kind that the web has, strictly: what is cut short or damaged is told from what is whole.

JPEG, PNG and WebP have decoders of their own here, chosen for speed; the other formats, and variants of these that
those read wrongly, are in `pipeline.decode_rare`.
"""

import re
import struct
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

from pipeline.decode_rare import decode_with_pillow, flatten, read_header
from pipeline.orientation import exif_orientation, jpeg_orientation, swaps_sides, webp_orientation
from pipeline.picture import Decoded, ImageError, check_pixels
from pipeline.reasons import Reason

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
cv2.setNumThreads(1)  # images are spread over processes, not one image over cores

__all__ = ["Decoded", "ImageError", "decode", "sniff"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EIGHTHS = ((1, 1.25), (2, 1.25), (4, 1.0))
"""Parts of its size at which a JPEG is decoded faster, and how many times the pixels needed they must have on a side.
libjpeg-turbo has no SIMD for the other eighths, which take longer than the whole (1024x768: 4/8 1.4 ms, 6/8 2.9 ms,
8/8 1.8 ms). Quarters and eighths have lost so much already that shrinking them a little more shows (33 dB, not 43)."""

Needed = Callable[[int, int], tuple[int, int]]
"""Width and height of the upright image -> the smallest width and height that are of use."""


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


def decode(body: bytes, source_format: str, max_pixels: int, needed: Needed | None = None) -> Decoded:
    """Decode a body that `sniff` has named. Raises ImageError; on damaged files also what the decoders raise.

    With `needed`, a JPEG may come smaller than it is, never smaller than needed: a half, a quarter or an eighth,
    averaged in the domain of its cosine transform, or whole with colours that are not interpolated between pixels.
    """
    if source_format == "jpeg":
        return _decode_jpeg(body, max_pixels, needed)
    if source_format == "png":
        return _decode_png(body, max_pixels)
    if source_format == "webp":
        return _decode_webp(body, max_pixels)
    return decode_with_pillow(body, source_format, max_pixels)


def _decode_jpeg(body: bytes, max_pixels: int, needed: Needed | None) -> Decoded:
    """libjpeg fills missing data with grey; its warnings tell truncated files from harmless oddities."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(body)
        check_pixels(width, height, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return decode_with_pillow(body, "jpeg", max_pixels)
        orientation = jpeg_orientation(body)
        least = _needed_of_stored(height, width, orientation, needed)
        rows, columns = _reduced(height, width, least)
        is_shrunk = least != (height, width)
        pixels = simplejpeg.decode_jpeg(
            body, colorspace="BGR", fastupsample=is_shrunk, min_height=rows, min_width=columns
        )
    except ValueError as error:
        if re.search("premature|no jpeg data|end of", str(error), re.IGNORECASE) or b"\xff\xd9" not in body:
            raise ImageError(Reason.TRUNCATED_IMAGE, str(error)) from None
        check_pixels(*read_header(body, "jpeg")[:2], max_pixels)  # it may be the header that was not understood
        pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise ImageError(Reason.UNDECODABLE_IMAGE, str(error)) from None
        height, width = pixels.shape[:2]
        orientation = jpeg_orientation(body)
    return Decoded(pixels=pixels, width=width, height=height, orientation=orientation)


def _needed_of_stored(height: int, width: int, orientation: int, needed: Needed | None) -> tuple[int, int]:
    """Rows and columns of the stored image that are needed, at most those that there are."""
    if needed is None:
        return height, width
    if swaps_sides(orientation):
        rows, columns = needed(height, width)
    else:
        columns, rows = needed(width, height)
    return min(rows, height), min(columns, width)


def _reduced(height: int, width: int, least: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the smallest of EIGHTHS, or the whole, that has enough for so many."""
    for eighths, margin in EIGHTHS:
        rows, columns = -(-height * eighths // 8), -(-width * eighths // 8)
        if rows >= least[0] * margin and columns >= least[1] * margin:
            return rows, columns
    return height, width


def _decode_png(body: bytes, max_pixels: int) -> Decoded:
    chunks = _png_chunks(body)
    if len(body) < 26:
        raise ImageError(Reason.TRUNCATED_IMAGE, "ends in the header")
    width, height = struct.unpack_from(">II", body, 16)
    check_pixels(width, height, max_pixels)
    if b"IEND" not in chunks:
        raise ImageError(Reason.TRUNCATED_IMAGE, "has no end marker")
    has_palette = body[25] == 3
    if has_palette or b"tRNS" in chunks or b"acTL" in chunks:
        return decode_with_pillow(body, "png", max_pixels)
    raw = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise ImageError(Reason.UNDECODABLE_IMAGE, "damaged PNG data")
    exif = body[chunks[b"eXIf"]] if b"eXIf" in chunks else b""
    return Decoded(
        pixels=flatten(raw),
        width=width,
        height=height,
        orientation=exif_orientation(exif),
        is_plain=body[24] <= 8 and body[25] in (0, 2),
    )


def _png_chunks(body: bytes) -> dict[bytes, slice]:
    """Where the content lies of chunks that are there as a whole; of several of a type, the last."""
    found, at = {}, len(PNG_SIGNATURE)
    while at + 12 <= len(body):
        (length,) = struct.unpack_from(">I", body, at)
        if at + 12 + length > len(body):
            break
        found[body[at + 4 : at + 8]] = slice(at + 8, at + 8 + length)
        at += 12 + length
    return found


def _decode_webp(body: bytes, max_pixels: int) -> Decoded:
    if len(body) < 20 or struct.unpack_from("<I", body, 4)[0] + 8 > len(body):
        raise ImageError(Reason.TRUNCATED_IMAGE, "shorter than its RIFF header says")
    width, height, is_animated = read_header(body, "webp")
    check_pixels(width, height, max_pixels)
    raw = None if is_animated else cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None:
        return decode_with_pillow(body, "webp", max_pixels)
    return Decoded(
        pixels=flatten(raw),
        width=width,
        height=height,
        orientation=webp_orientation(body),
        is_plain=raw.shape[2] == 3,
    )


def _what_instead(body: bytes) -> str:
    head = body[:1_024].lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in head:
        return "looks like HTML"
    if head.startswith(b"<svg") or b"<svg" in head:
        return "is SVG"
    if head.startswith((b"{", b"[")):
        return "looks like JSON"
    return f"begins with {body[:8].hex(' ')}"
