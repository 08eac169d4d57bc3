"""Image rules: each measures one thing of every downloaded image and compares it with one threshold.

A rule only reads columns of the fetch stage's rows, so a threshold can be changed without fetching anything again.
Rules about captions and URLs work before the download; see `pipeline.plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import CurateConfig
from pipeline.reasons import Reason

Scores = NDArray[np.float64]


class Rule(Protocol):
    """What a rule is. Scores that are not a number (the thing could not be measured) are kept."""

    name: ClassVar[str]
    """The configuration key that sets the threshold."""
    reason: ClassVar[str]
    """Why a row that fails is dropped; a name in `pipeline.reasons`."""
    columns: ClassVar[tuple[str, ...]]
    """The columns of the rows that `scores` reads."""
    keeps: ClassVar[Literal["at_least", "at_most", "above"]]
    """Which scores are kept, compared with the threshold."""

    @property
    def threshold(self) -> float: ...

    def scores(self, rows: pa.Table) -> Scores:
        """[N] one number per row."""


@dataclass(frozen=True, kw_only=True)
class MinimumSide:
    """The shorter side of the image as downloaded, in pixels."""

    threshold: float
    name: ClassVar[str] = "curate.min_side_px"
    reason: ClassVar[str] = Reason.IMAGE_TOO_SMALL
    columns: ClassVar[tuple[str, ...]] = ("original_width", "original_height")
    keeps: ClassVar[Literal["at_least", "at_most", "above"]] = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return np.minimum(_numbers(rows, "original_width"), _numbers(rows, "original_height"))


@dataclass(frozen=True, kw_only=True)
class AspectRatio:
    """The longer side over the shorter one, as downloaded; 1 is a square."""

    threshold: float
    name: ClassVar[str] = "curate.max_aspect_ratio"
    reason: ClassVar[str] = Reason.IMAGE_TOO_ELONGATED
    columns: ClassVar[tuple[str, ...]] = ("original_width", "original_height")
    keeps: ClassVar[Literal["at_least", "at_most", "above"]] = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        width, height = _numbers(rows, "original_width"), _numbers(rows, "original_height")
        return np.maximum(width, height) / np.minimum(width, height)


@dataclass(frozen=True, kw_only=True)
class Blank:
    """The standard deviation of the image's grey values: 0 is one colour, 127.5 half black and half white."""

    threshold: float
    name: ClassVar[str] = "curate.blank_threshold"
    reason: ClassVar[str] = Reason.IMAGE_BLANK
    columns: ClassVar[tuple[str, ...]] = ("grey_std",)
    keeps: ClassVar[Literal["at_least", "at_most", "above"]] = "above"

    def scores(self, rows: pa.Table) -> Scores:
        return _numbers(rows, "grey_std")


def rules_of(config: CurateConfig) -> tuple[Rule, ...]:
    """The rules that a configuration asks for, in the order in which they are blamed."""
    rules: list[Rule] = []
    if config.min_side_px > 0:
        rules.append(MinimumSide(threshold=config.min_side_px))
    if config.max_aspect_ratio is not None:
        rules.append(AspectRatio(threshold=config.max_aspect_ratio))
    if config.drop_blank:
        rules.append(Blank(threshold=config.blank_threshold))
    return tuple(rules)


def passes(rule: Rule, scores: Scores) -> NDArray[np.bool_]:
    """[N] which scores a rule keeps."""
    unknown = np.isnan(scores)
    if rule.keeps == "at_least":
        return unknown | (scores >= rule.threshold)
    if rule.keeps == "at_most":
        return unknown | (scores <= rule.threshold)
    return unknown | (scores > rule.threshold)


def columns_of(rules: Sequence[Rule]) -> list[str]:
    """Every column that some rule reads, once each."""
    return list(dict.fromkeys(column for rule in rules for column in rule.columns))


def _numbers(rows: pa.Table, column: str) -> Scores:
    values: NDArray[Any] = rows.column(column).to_numpy(zero_copy_only=False)
    return values.astype(np.float64)
