"""What a rule is: it judges one pair alone, by columns of its row, and gives a score or a reason."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Scores = NDArray[np.float64]
Keeps = Literal["at_least", "at_most", "above", "below"]
"""Which scores are kept, compared with the threshold."""


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a rule says of [N] rows.

    scores: NaN where the thing could not be measured; None for a rule without a number. details: a few words for
    people about each row, such as the language that was found.
    """

    keep: NDArray[np.bool_]
    scores: Scores | None = None
    details: Sequence[str | None] | None = None


class Rule(ABC):
    """Judges pairs one by one; a frozen dataclass whose fields are its parameters.

    A rule reads columns and nothing else, so it may be applied again, with other parameters, to what is there.
    """

    name: str
    """The configuration key that sets it; what decisions call it."""
    reason: str
    """Why a row that fails is dropped; a name in `pipeline.reasons`."""
    columns: tuple[str, ...]
    """The columns of the rows that `judge` reads."""
    needs_image: bool = False
    """Whether some of them are known after the download only; a rule without them is applied before it."""

    @abstractmethod
    def judge(self, rows: pa.Table) -> Verdicts:
        """Verdicts on [N] rows. A rule that gives a number is a `ScoreRule`."""


class ScoreRule(Rule):
    """A rule that measures one thing and compares it with one threshold."""

    threshold: float
    keeps: Keeps
    keep_unmeasured: bool = True
    """What becomes of rows whose score is not a number."""

    @abstractmethod
    def scores(self, rows: pa.Table) -> Scores:
        """[N] one number per row."""

    def details(self, rows: pa.Table) -> Sequence[str | None] | None:
        """[N] a few words per row, beside its score; None for none."""
        return None

    def judge(self, rows: pa.Table) -> Verdicts:
        scores = self.scores(rows)
        return Verdicts(keep=self.passes(scores), scores=scores, details=self.details(rows))

    def passes(self, scores: Scores) -> NDArray[np.bool_]:
        """[N] which scores are kept."""
        kept: NDArray[np.bool_] = _COMPARE[self.keeps](scores, self.threshold)  # NaN is on no side
        return kept | np.isnan(scores) if self.keep_unmeasured else kept


_COMPARE = {"at_least": np.greater_equal, "at_most": np.less_equal, "above": np.greater, "below": np.less}


def limit_of(rule: Rule) -> tuple[Keeps | None, float | None]:
    """(which scores a rule keeps, its threshold), None each for a rule without a number."""
    keeps, threshold = getattr(rule, "keeps", None), getattr(rule, "threshold", None)
    return (keeps, float(threshold)) if keeps is not None and threshold is not None else (None, None)


def numbers(rows: pa.Table, column: str) -> Scores:
    """A column as floats, null as NaN."""
    values: Scores = rows.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
    return values
