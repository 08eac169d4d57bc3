"""Rules that compare what models and evaluation sets have measured of an image with a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.reasons import Reason
from pipeline.rules.base import ScoreRule, Scores, numbers
from pipeline.rules.config import CurateConfig

NSFW, IMAGE_TEXT = "nsfw_score", "image_text_score"
DISTANCE, SIMILARITY = "evaluation_distance", "evaluation_similarity"
"""Columns that stages of models measure. Those about evaluation sets say what they matched in `<column>_detail`."""


@dataclass(frozen=True, kw_only=True)
class NsfwScore(ScoreRule):
    """How sure `curate.nsfw_model` is that the image is not safe for work."""

    threshold: float
    name = "curate.max_nsfw_score"
    reason = Reason.IMAGE_UNSAFE
    columns = (NSFW,)
    needs_image = True
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, NSFW)


@dataclass(frozen=True, kw_only=True)
class ImageTextScore(ScoreRule):
    """How well the caption fits its image, as `curate.image_text_model` sees it: the cosine of their embeddings."""

    threshold: float
    name = "curate.min_image_text_score"
    reason = Reason.CAPTION_MISMATCH
    columns = (IMAGE_TEXT, "caption")  # of pairs that need none it says nothing
    needs_image = True
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, IMAGE_TEXT)


@dataclass(frozen=True, kw_only=True)
class Unscored(ScoreRule):
    """How many of the models that were asked could not score the image."""

    columns: tuple[str, ...]
    threshold: float = 0.0
    name = "curate.unscored"
    reason = Reason.NOT_SCORED
    needs_image = True
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        counts: Scores = np.sum([np.isnan(numbers(rows, column)) for column in self.columns], axis=0, dtype=np.float64)
        return counts


@dataclass(frozen=True, kw_only=True)
class EvaluationDistance(ScoreRule):
    """Bits in which the image's perceptual hash, or its mirror image's, differs from the nearest evaluation image's.

    Not a number, and kept, where none is near.
    """

    threshold: float
    name = "curate.evaluation_distance"
    reason = Reason.EVALUATION_SET
    columns = (DISTANCE, f"{DISTANCE}_detail")
    needs_image = True
    keeps = "above"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, DISTANCE)

    def details(self, rows: pa.Table) -> Sequence[str | None]:
        return _texts(rows, f"{DISTANCE}_detail")


@dataclass(frozen=True, kw_only=True)
class EvaluationSimilarity(ScoreRule):
    """The cosine of the image's embedding and that of the evaluation image most like it."""

    threshold: float
    name = "curate.evaluation_similarity"
    reason = Reason.EVALUATION_SET
    columns = (SIMILARITY, f"{SIMILARITY}_detail")
    needs_image = True
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, SIMILARITY)

    def details(self, rows: pa.Table) -> Sequence[str | None]:
        return _texts(rows, f"{SIMILARITY}_detail")


def model_rules(config: CurateConfig) -> tuple[ScoreRule, ...]:
    """Those that a configuration asks for, in the order in which they are blamed."""
    rules: list[ScoreRule] = []
    if config.max_nsfw_score is not None:
        rules.append(NsfwScore(threshold=config.max_nsfw_score))
    if config.min_image_text_score is not None:
        rules.append(ImageTextScore(threshold=config.min_image_text_score))
    if config.unscored == "drop" and rules:
        rules.append(Unscored(columns=tuple(rule.columns[0] for rule in rules)))
    if config.evaluation_sets and config.evaluation_distance is not None:
        rules.append(EvaluationDistance(threshold=config.evaluation_distance))
    if config.evaluation_sets and config.evaluation_similarity is not None:
        rules.append(EvaluationSimilarity(threshold=config.evaluation_similarity))
    return tuple(rules)


def _texts(rows: pa.Table, column: str) -> list[str | None]:
    texts: list[str | None] = rows.column(column).to_pylist()
    return texts
