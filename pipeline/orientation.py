"""EXIF orientation: found without decoding anything, and applied."""

import struct

import cv2

from pipeline.picture import Pixels

ORIENTATION = 0x0112
_SHORT, _LONG = 3, 4


def orient(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation, so that the image stands as it was meant to."""
    if swaps_sides(orientation):
        pixels = cv2.transpose(pixels)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def swaps_sides(orientation: int) -> bool:
    """Whether the upright image is as wide as the stored one is high."""
    return 5 <= orientation <= 8


def jpeg_orientation(body: bytes) -> int:
    """Of a JPEG file, 1 (upright) where it does not tell."""
    at = 2
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker = body[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # pixels begin
            break
        if marker == 0xE1 and body[at + 4 : at + 10] == b"Exif\0\0":
            return exif_orientation(body[at + 10 : at + 2 + int.from_bytes(body[at + 2 : at + 4])])
        at += 2 + int.from_bytes(body[at + 2 : at + 4])
    return 1


def webp_orientation(body: bytes) -> int:
    """Of a WebP file, 1 (upright) where it does not tell."""
    at = 12
    while at + 8 <= len(body):
        (length,) = struct.unpack_from("<I", body, at + 4)
        if body[at : at + 4] == b"EXIF":
            return exif_orientation(body[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    return 1


def exif_orientation(exif: bytes) -> int:
    """Of an EXIF block (a TIFF header and its first directory), 1 (upright) where it does not tell."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", exif, 4)
    if directory + 2 > len(exif):
        return 1
    (num_entries,) = struct.unpack_from(order + "H", exif, directory)
    for at in range(directory + 2, min(directory + 2 + 12 * num_entries, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", exif, at)
        if tag == ORIENTATION and kind in (_SHORT, _LONG):
            (value,) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), exif, at + 8)
            return value if 1 <= value <= 8 else 1
    return 1
