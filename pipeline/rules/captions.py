"""Rules about the caption's text."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reasons import Reason
from pipeline.rules.base import ScoreRule, Scores


def captions(rows: pa.Table) -> pa.StringArray:
    """The captions without blanks around them, "" where there is none."""
    column = rows.column("caption").combine_chunks()
    return pc.utf8_trim_whitespace(pc.fill_null(column, ""))


@dataclass(frozen=True, kw_only=True)
class MinimumCaptionChars(ScoreRule):
    """The caption's characters, without blanks around it."""

    threshold: float
    name = "curate.min_caption_chars"
    reason = Reason.CAPTION_TOO_SHORT
    columns = ("caption",)
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return num_chars(rows)


@dataclass(frozen=True, kw_only=True)
class MaximumCaptionChars(ScoreRule):
    """The caption's characters, without blanks around it."""

    threshold: float
    name = "curate.max_caption_chars"
    reason = Reason.CAPTION_TOO_LONG
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return num_chars(rows)


@dataclass(frozen=True, kw_only=True)
class MinimumCaptionWords(ScoreRule):
    """The caption's words: what stands between blanks."""

    threshold: float
    name = "curate.min_caption_words"
    reason = Reason.CAPTION_TOO_SHORT
    columns = ("caption",)
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return num_words(rows)


def num_chars(rows: pa.Table) -> Scores:
    """[N] characters (code points) of each caption."""
    lengths: Scores = pc.utf8_length(captions(rows)).to_numpy(zero_copy_only=False).astype(np.float64)
    return lengths


def num_words(rows: pa.Table) -> Scores:
    """[N] words of each caption."""
    found = pc.count_substring_regex(captions(rows), r"\S+")
    words: Scores = found.to_numpy(zero_copy_only=False).astype(np.float64)
    return words
