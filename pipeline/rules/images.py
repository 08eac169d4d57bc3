"""Rules about the downloaded image, by what the fetch stage has measured; no image is read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.reasons import Reason
from pipeline.rules.base import ScoreRule, Scores, numbers


@dataclass(frozen=True, kw_only=True)
class MinimumSide(ScoreRule):
    """The shorter side of the image as downloaded, in pixels."""

    threshold: float
    name = "curate.min_side_px"
    reason = Reason.IMAGE_TOO_SMALL
    columns = ("original_width", "original_height")
    needs_image = True
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return np.minimum(numbers(rows, "original_width"), numbers(rows, "original_height"))


@dataclass(frozen=True, kw_only=True)
class AspectRatio(ScoreRule):
    """The longer side over the shorter one, as downloaded; 1 is a square."""

    threshold: float
    name = "curate.max_aspect_ratio"
    reason = Reason.IMAGE_TOO_ELONGATED
    columns = ("original_width", "original_height")
    needs_image = True
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        width, height = numbers(rows, "original_width"), numbers(rows, "original_height")
        return np.maximum(width, height) / np.minimum(width, height)


@dataclass(frozen=True, kw_only=True)
class Blank(ScoreRule):
    """The standard deviation of the image's grey values: 0 is one colour, 127.5 half black and half white."""

    threshold: float
    name = "curate.blank_threshold"
    reason = Reason.IMAGE_BLANK
    columns = ("grey_std",)
    needs_image = True
    keeps = "above"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, "grey_std")


@dataclass(frozen=True, kw_only=True)
class MinimumPixels(ScoreRule):
    """Width times height of the image as downloaded."""

    threshold: float
    name = "curate.min_pixels"
    reason = Reason.IMAGE_TOO_SMALL
    columns = ("original_width", "original_height")
    needs_image = True
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, "original_width") * numbers(rows, "original_height")


@dataclass(frozen=True, kw_only=True)
class MaximumPixels(ScoreRule):
    """Width times height of the image as downloaded."""

    threshold: float
    name = "curate.max_pixels"
    reason = Reason.IMAGE_TOO_LARGE
    columns = ("original_width", "original_height")
    needs_image = True
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, "original_width") * numbers(rows, "original_height")


@dataclass(frozen=True, kw_only=True)
class Information(ScoreRule):
    """Bytes of the stored image for each of its pixels: little is left of a page without content when it is packed."""

    threshold: float
    name = "curate.min_bytes_per_pixel"
    reason = Reason.IMAGE_EMPTY
    columns = ("image_size", "width", "height")
    needs_image = True
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, "image_size") / (numbers(rows, "width") * numbers(rows, "height"))


@dataclass(frozen=True, kw_only=True)
class Sharpness(ScoreRule):
    """The variance of the stored image's Laplacian: near 0 where nothing has an edge."""

    threshold: float
    name = "curate.min_sharpness"
    reason = Reason.IMAGE_BLURRED
    columns = ("sharpness",)
    needs_image = True
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, "sharpness")
