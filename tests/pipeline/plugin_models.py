"""Models as users write them; tests name them by import path."""

from collections.abc import Sequence
from typing import Any

import numpy as np

GREY = 127.5
LOOKED_AT: list[int] = []
"""Number of images of each call."""


class MeanColour:
    """Embedding: the mean red, green and blue beside grey. Score: the mean red, 0 to 1."""

    dimension = 3

    def __init__(self, *, threads: int, refuses_width: int = 0, refuses_all: bool = False) -> None:
        self._refuses_width, self._refuses_all = refuses_width, refuses_all

    def embed(self, images: Sequence[Any]) -> Any:
        LOOKED_AT.append(len(images))
        if self._refuses_all or any(image.shape[1] == self._refuses_width for image in images):
            raise ValueError("an image that this model cannot do")
        return np.stack([image.reshape(-1, 3).mean(axis=0) for image in images]) - GREY

    def score(self, images: Sequence[Any], captions: Sequence[str]) -> Any:
        return (self.embed(images)[:, 0] + GREY) / 255


class WithTexts(MeanColour):
    """Compares colours with their names: has no score of its own."""

    score = None  # type: ignore[assignment]

    def embed_texts(self, captions: Sequence[str]) -> Any:
        return np.array([[float(name in caption) for name in ("red", "green", "blue")] for caption in captions]) + 1e-3


class Vague(MeanColour):
    """Does not say how long its embeddings are."""

    dimension = None  # type: ignore[assignment]


class Misshapen(MeanColour):
    """Gives one row too few."""

    def embed(self, images: Sequence[Any]) -> Any:
        return super().embed(images)[1:]
