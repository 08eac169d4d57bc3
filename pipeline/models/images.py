"""The stored images of a fetch unit or a shard, in batches, each image once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import cv2
import numpy as np

from pipeline.models.protocol import Image

BATCH_PIXELS = 16 * 2**20
"""Of a batch together; a single larger image is a batch of its own."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where an image lies in its tar, its size in pixels and its caption."""

    offset: int
    size_bytes: int
    num_pixels: int
    caption: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`images`: None where one could not be decoded. first: the place of the first of them among all."""

    first: int
    images: list[Image | None]
    captions: list[str]


def batches(tar: BinaryIO, stored: Sequence[Stored], batch_size: int) -> Iterator[Batch]:
    """All images in their order. How they are cut into batches depends on nothing but the arguments."""
    first = 0
    while first < len(stored):
        end, num_pixels = first, 0
        while end < len(stored) and end - first < batch_size:
            num_pixels += stored[end].num_pixels
            if end > first and num_pixels > BATCH_PIXELS:
                break
            end += 1
        part = stored[first:end]
        yield Batch(first=first, images=[_read(tar, at) for at in part], captions=[at.caption for at in part])
        first = end


def _read(tar: BinaryIO, at: Stored) -> Image | None:
    tar.seek(at.offset)
    return decode_rgb(tar.read(at.size_bytes))


def decode_rgb(data: bytes) -> Image | None:
    """Red green blue pixels of an encoded image, None if it is none."""
    if not data:
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if pixels is None else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8)
