"""A model over batches: one image that it cannot do costs one row, a model that can do none ends the run."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import RunError
from pipeline.models.protocol import Image
from pipeline.models.spec import Ability, Model

logger = logging.getLogger(__name__)

Values = NDArray[np.float32]
PROBE_SIDE = 64
PROBE_CAPTION = "a photo"


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A loaded model and what is asked of it. Results are [N, width] float32, rows of NaN where it failed."""

    model: Model
    ability: Ability
    threads: int

    @property
    def width(self) -> int:
        """How many numbers an image has: the dimension of an embedding, or one."""
        return self._dimension if self.ability == "embed" else 1

    @property
    def _dimension(self) -> int:
        dimension = getattr(self._loaded, "dimension", None)
        if not isinstance(dimension, int | np.integer) or dimension < 1:
            raise RunError(
                f"{self.model.key}={self.model.text}: its `dimension` is {dimension}; it has to say how many numbers "
                "an embedding has"
            )
        return int(dimension)

    @property
    def _loaded(self) -> Any:
        return self.model.load(self.threads)

    def __call__(self, images: Sequence[Image], captions: Sequence[str]) -> Values:
        """One row an image. RunError for results of a wrong shape: that is an error of the model's code."""
        try:
            return self._call(images, captions)
        except (RunError, KeyboardInterrupt):
            raise
        except Exception as error:  # a model may fail on one image, in any way: the others are tried without it
            if len(images) == 1:
                logger.warning("model %s failed on an image: %s: %s", self.model.text, type(error).__name__, error)
                return np.full((1, self.width), np.nan, np.float32)
        alone = [self([image], [caption]) for image, caption in zip(images, captions, strict=True)]
        return np.concatenate(alone)

    def require_alive(self) -> None:
        """RunError when the model fails on a plain picture too: call it when it has failed on all there were."""
        ramp = np.linspace(0, 255, PROBE_SIDE).astype(np.uint8)
        probe = np.stack([np.tile(ramp, (PROBE_SIDE, 1)), np.tile(ramp[:, None], (1, PROBE_SIDE))] * 2, axis=2)[..., :3]
        try:
            values = self._call([np.ascontiguousarray(probe)], [PROBE_CAPTION])
            problem = "" if np.isfinite(values).all() else "it gives numbers that are none"
        except RunError:
            raise
        except Exception as error:  # a model's code may raise anything
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise RunError(
                f"{self.model.key}={self.model.text}: fails on every image, and on a plain test picture: {problem}"
            )

    def _call(self, images: Sequence[Image], captions: Sequence[str]) -> Values:
        if self.ability == "embed":
            return unit_length(self._checked("embed", self._loaded.embed(images), len(images)))
        if self.ability == "score_pairs" and not callable(getattr(self._loaded, "score", None)):
            pictures = unit_length(self._checked("embed", self._loaded.embed(images), len(images)))
            texts = unit_length(self._checked("embed_texts", self._loaded.embed_texts(captions), len(images)))
            cosines: Values = np.sum(pictures * texts, axis=1, dtype=np.float64).astype(np.float32).reshape(-1, 1)
            return cosines
        scores: Values = np.asarray(self._loaded.score(images, captions), np.float32)
        if scores.shape not in ((len(images),), (len(images), 1)):
            raise self._misshapen("score", scores.shape, len(images), "a number for each")
        return scores.reshape(-1, 1)

    def _checked(self, method: str, values: Any, count: int) -> Values:
        rows: Values = np.asarray(values, np.float32)
        if rows.shape != (count, self._dimension):
            wanted = f"a row of {self._dimension} (its `dimension`) for each"
            raise self._misshapen(method, rows.shape, count, wanted)
        return rows

    def _misshapen(self, method: str, shape: tuple[int, ...], count: int, wanted: str) -> RunError:
        return RunError(
            f"{self.model.key}={self.model.text}: `{method}` gave an array of shape {list(shape)} for {count} images; "
            f"it has to give {wanted}"
        )


def unit_length(rows: Values) -> Values:
    """Rows divided by their lengths; a row without a direction (all 0, or not finite) is not a number."""
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.sum(rows.astype(np.float64) ** 2, axis=1, keepdims=True))
        units: Values = (rows / np.where(np.isfinite(lengths) & (lengths > 0), lengths, np.nan)).astype(np.float32)
    return units


def in_batches(
    call: Callable[[list[Image], list[str]], Values],
    images: Sequence[Image | None],
    captions: Sequence[str],
    width: int,
) -> Values:
    """`call` on the images that are there; a row of NaN for each that is None."""
    values = np.full((len(images), width), np.nan, np.float32)
    places = [place for place, image in enumerate(images) if image is not None]
    if places:
        given = [image for image in images if image is not None]
        values[places] = call(given, [captions[place] for place in places])
    return values
