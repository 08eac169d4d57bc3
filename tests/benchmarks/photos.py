"""Photo-like JPEGs to measure with: smooth scenes with shapes, texture at every scale, and a camera's grain.

No photos ship with the project; these cost a decoder what photos of the web do: 500 to 1,280 pixels wide, quality 85,
4:2:0, 75 to 175 KB. The same seed gives the same pictures.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

SIZES = ((500, 375), (640, 480), (720, 960), (800, 600), (1024, 683), (1024, 768), (1280, 720), (1280, 853))
"""Width and height: a third are near the smallest and a third near the largest, as on the web."""
QUALITY = 85
SIZE_BYTES = (70_000, 185_000)

Pixels = NDArray[np.uint8]


def make_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """Write `count` distinct pictures, about 15 a second; returns their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(make_photo(seed, number))
    return paths


def make_photo(seed: int, number: int) -> bytes:
    """Picture `number` as a JPEG whose size is inside SIZE_BYTES."""
    draw = np.random.default_rng((seed, number))
    width, height = SIZES[number % len(SIZES)]
    scene = _scene(draw, width, height)
    grain = cv2.GaussianBlur(draw.normal(size=(height, width)).astype(np.float32), (0, 0), 0.7)[:, :, None]
    target = draw.uniform(0.8, 1.1) * np.interp(width * height, (500 * 375, 1280 * 853), (95_000, 155_000))
    low, high = 0.0, 120.0
    for _ in range(12):  # more grain, more bytes: halve the interval until the size is near
        strength = (low + high) / 2
        data = _encode(np.clip(scene + strength * grain, 0, 255).astype(np.uint8))
        if abs(len(data) - target) < 0.05 * target:
            break
        low, high = (strength, high) if len(data) < target else (low, strength)
    assert SIZE_BYTES[0] <= len(data) <= SIZE_BYTES[1], f"picture {number}: {len(data)} bytes"
    return data


def _scene(draw: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """[height, width, 3] values about 0 to 255: noise of every scale, its strength falling with its fineness."""
    scene = np.zeros((height, width, 3), np.float32)
    cells = 3
    while cells < min(width, height) // 2:
        coarse = draw.normal(size=(cells, cells * width // height, 3)).astype(np.float32)
        coarse = 0.3 * coarse + 0.7 * coarse.mean(axis=2, keepdims=True)  # fine detail of photos is mostly grey
        scene += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * (120 / cells**0.6)
        cells *= 2
    for _ in range(12):
        colour = draw.uniform(-60, 60, 3).tolist()
        centre = (int(draw.integers(width)), int(draw.integers(height)))
        axes = (int(draw.integers(10, width // 5)), int(draw.integers(10, height // 5)))
        shape = np.zeros_like(scene)
        cv2.ellipse(shape, centre, axes, float(draw.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
        scene += shape
    return scene + 128


def _encode(pixels: Pixels) -> bytes:
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert done
    return bytes(data)
