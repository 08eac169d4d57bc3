"""Other 64-bit hashes than the one that a build stores: what they would find at 3 bits, and what that would cost.

recall_3bit is the mean over the transformations that move few bits. effective_bits says how many independent fair bits
would scatter the distances of different pictures as much: with b of them N pictures have about
N^2 / 2 * sum(C(b, k), k <= 3) / 2^b pairs within 3 bits by chance, which is printed for a billion.

    square          the 8x8 lowest frequencies of 32x32 against their median: the hash that a build stores
    square_no_dc    the same without the mean and the lowest row and column
    radial          the 64 lowest by length of the frequency, without the mean
    windowed        square, of pixels under a Hann window (its root) so that borders matter less
    lowest_36       the 36 lowest by length
"""

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from robustness import drawings, hamming, photographs
from transforms import TRANSFORMS, encoded

SIDE, HASH_SIDE = 32, 8
NAMES = (
    *("jpeg_q50", "resize_to_quarter", "crop_2", "crop_5", "crop_10", "rotate_1", "rotate_2"),
    *("caption_band", "caption_letters", "brighter", "more_contrast", "hue_30"),
)
BILLION = 10**9

Grey = NDArray[np.float32]
Bits = NDArray[np.float32]

_ROWS, _COLUMNS = np.mgrid[:SIDE, :SIDE]
_BY_LENGTH = np.argsort((_ROWS**2 + _COLUMNS**2).ravel(), kind="stable")[1:]
_SQUARE = np.flatnonzero(((_ROWS < HASH_SIDE) & (_COLUMNS < HASH_SIDE)).ravel())
_INNER = np.flatnonzero((((_ROWS - 1) // HASH_SIDE == 0) & ((_COLUMNS - 1) // HASH_SIDE == 0)).ravel())
_HANN = np.sqrt(np.hanning(SIDE + 2)[1:-1])


def _above_median(grey: Grey, places: NDArray[np.int64]) -> Bits:
    values = cv2.dct(grey).ravel()[places]
    return (values > np.median(values)).astype(np.float32)


VARIANTS: dict[str, Callable[[Grey], Bits]] = {
    "square": lambda grey: _above_median(grey, _SQUARE),
    "square_no_dc": lambda grey: _above_median(grey, _INNER),
    "radial": lambda grey: _above_median(grey, _BY_LENGTH[:64]),
    "windowed": lambda grey: _above_median((grey - grey.mean()) * np.outer(_HANN, _HANN).astype(np.float32), _SQUARE),
    "lowest_36": lambda grey: _above_median(grey, _BY_LENGTH[:36]),
}


def small_grey(body: bytes) -> Grey:
    pixels = np.asarray(Image.open(io.BytesIO(body)).convert("L"))
    return cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)


def hashes(bodies: list[bytes]) -> dict[str, Bits]:
    """[N, bits] of every variant."""
    greys = [small_grey(body) for body in bodies]
    return {name: np.stack([variant(grey) for grey in greys]) for name, variant in VARIANTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    given = arguments.photos
    pictures = photographs(given, arguments.pictures) if given else drawings(arguments.pictures)
    originals = hashes([encoded(picture, quality=95) for picture in pictures])
    recalls: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for transform in NAMES:
        draw = np.random.default_rng(0)
        planted = hashes([TRANSFORMS[transform](picture, draw) for picture in pictures])
        for name in VARIANTS:
            recalls[name].append(float((np.abs(originals[name] - planted[name]).sum(axis=1) <= 3).mean()))
    for name, bits in originals.items():
        wrong = hamming(bits, bits)[np.triu_indices(len(bits), 1)]
        share = wrong.mean() / bits.shape[1]
        effective = bits.shape[1] ** 2 * share * (1 - share) / wrong.var()
        chance = sum(math.comb(round(effective), count) for count in range(4)) / 2**effective
        print(f"hashes.{name}.recall_3bit: {np.mean(recalls[name]):.3f}")
        print(f"hashes.{name}.effective_bits: {effective:.1f}")
        print(f"hashes.{name}.chance_pairs_of_a_billion: {BILLION**2 / 2 * chance:.2g}")


if __name__ == "__main__":
    main()
