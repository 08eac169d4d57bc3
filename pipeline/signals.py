"""What is measured of every image, all from its resized pixels: nothing is decoded for it.

phash is that of Zauner (2010) as the library ImageHash computes it: the image averaged to 32x32, made grey, its cosine
transform, and for each of the 8x8 lowest frequencies (rows first, the highest bit first) whether it is above their
median. Mirroring an image negates the odd horizontal frequencies: its hash needs no second transform.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.area import shrink_area
from pipeline.picture import Pixels

DCT_SIDE = 32
HASH_SIDE = 8
SHARPNESS_SIDE = 256
_MIRROR = np.ones((2, HASH_SIDE, HASH_SIDE), np.float32)
"""Signs of the frequencies of an image and of its mirror image."""
_MIRROR[1, :, 1::2] = -1


@dataclass(frozen=True, kw_only=True)
class Measures:
    """grey_std: standard deviation of the grey values, 0 (one colour) to 127.5. means: 0 to 255.

    phash, phash_mirror: 64 bits each; near-duplicates differ in few. sharpness: variance of the Laplacian of the grey
    image, after its shorter side is brought down to 256 (smaller ones stay): a few for blurred ones, hundreds for
    sharp ones.
    """

    grey_std: float
    mean_red: float
    mean_green: float
    mean_blue: float
    phash: int
    phash_mirror: int
    sharpness: float


def measure(pixels: Pixels) -> Measures:
    """Everything about a picture (without its border), the same for the same pixels."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    blue, green, red = (float(mean) for mean in cv2.meanStdDev(pixels)[0][:, 0])  # ten times as fast as cv2.mean
    phash, phash_mirror = perceptual_hashes(pixels)
    return Measures(
        grey_std=round(float(cv2.meanStdDev(grey)[1][0, 0]), 4),
        mean_red=round(red, 4),
        mean_green=round(green, 4),
        mean_blue=round(blue, 4),
        phash=phash,
        phash_mirror=phash_mirror,
        sharpness=round(sharpness(grey), 3),
    )


def perceptual_hashes(pixels: Pixels) -> tuple[int, int]:
    """64-bit hashes of an image and of its mirror image."""
    if min(pixels.shape[:2]) >= DCT_SIDE:
        small = shrink_area(pixels, DCT_SIDE, DCT_SIDE)
    else:
        small = cv2.resize(pixels, (DCT_SIDE, DCT_SIDE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
    # Whole numbers (of up to 8,160): whatever differs between processors' arithmetic is far below one.
    lowest = np.rint(cv2.dct(grey)[:HASH_SIDE, :HASH_SIDE])
    values = (lowest * _MIRROR).reshape(2, -1)
    ordered = np.sort(values, axis=1)
    medians = (ordered[:, 31:32] + ordered[:, 32:33]) / 2
    bits = np.packbits(values > medians, axis=1)
    return int.from_bytes(bits[0].tobytes(), "big"), int.from_bytes(bits[1].tobytes(), "big")


def sharpness(grey: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian at a fixed size."""
    height, width = grey.shape
    scale = SHARPNESS_SIDE / min(height, width)
    if scale < 1:
        size = (round(width * scale), round(height * scale))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0]) ** 2
