"""Rules about the caption's text. A caption's blanks around it do not count."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reasons import Reason
from pipeline.rules import text
from pipeline.rules.base import ScoreRule, Scores, numbers

CAPTION_PAIRS = "curate.caption_pairs"
"""The column with the number of pairs that have a row's caption; see `pipeline.rules.frequency`."""
PERSON_TAGS = ("[person]", "<person>")
"""What stands in captions for names that were taken out: in MAE-CLIP's data, and in Conceptual 12M."""


@dataclass(frozen=True, kw_only=True)
class MinimumCaptionChars(ScoreRule):
    """The caption's characters."""

    threshold: float
    name = "curate.min_caption_chars"
    reason = Reason.CAPTION_TOO_SHORT
    columns = ("caption",)
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return _num_chars(rows)


@dataclass(frozen=True, kw_only=True)
class MaximumCaptionChars(ScoreRule):
    """The caption's characters."""

    threshold: float
    name = "curate.max_caption_chars"
    reason = Reason.CAPTION_TOO_LONG
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return _num_chars(rows)


@dataclass(frozen=True, kw_only=True)
class MinimumCaptionWords(ScoreRule):
    """The caption's words: what stands between blanks."""

    threshold: float
    name = "curate.min_caption_words"
    reason = Reason.CAPTION_TOO_SHORT
    columns = ("caption",)
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        return _num_words(rows)


@dataclass(frozen=True, kw_only=True)
class MaximumCaptionWords(ScoreRule):
    """The caption's words: what stands between blanks."""

    threshold: float
    name = "curate.max_caption_words"
    reason = Reason.CAPTION_TOO_LONG
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return _num_words(rows)


@dataclass(frozen=True, kw_only=True)
class AlphanumericRatio(ScoreRule):
    """The part of the caption's characters, blanks left out, that are letters or digits; 0 if it is empty."""

    threshold: float
    name = "curate.min_alphanumeric_ratio"
    reason = Reason.CAPTION_NOT_TEXT
    columns = ("caption",)
    keeps = "at_least"

    def scores(self, rows: pa.Table) -> Scores:
        chars = text.characters(text.captions(rows))
        visible = chars.sums(~text.is_kind(chars, text.blank))
        good = chars.sums(text.is_kind(chars, text.alphanumeric))
        return np.divide(good, visible, out=np.zeros(len(good)), where=visible > 0)


@dataclass(frozen=True, kw_only=True)
class CharRepetition(ScoreRule):
    """The part of the caption's runs of `size` characters that stood in it before; case and blanks are evened out."""

    threshold: float
    size: int
    name = "curate.max_char_repetition"
    reason = Reason.CAPTION_REPETITIVE
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return text.repeated_part(text.characters(text.plain(text.captions(rows))), self.size)


@dataclass(frozen=True, kw_only=True)
class WordRepetition(ScoreRule):
    """The part of the caption's runs of `size` words that stood in it before; case does not count."""

    threshold: float
    size: int
    name = "curate.max_word_repetition"
    reason = Reason.CAPTION_REPETITIVE
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return text.repeated_part(text.words(text.plain(text.captions(rows))), self.size)


@dataclass(frozen=True, kw_only=True)
class PersonTag(ScoreRule):
    """How often a tag that stands for a person's name is in the caption (MAE-CLIP drops such pairs)."""

    threshold: float = 0
    name = "curate.drop_person_tag"
    reason = Reason.CAPTION_PERSON_TAG
    columns = ("caption",)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        texts = text.captions(rows)
        found = [pc.count_substring(texts, tag, ignore_case=True) for tag in PERSON_TAGS]
        total: Scores = np.sum([count.to_numpy(zero_copy_only=False) for count in found], axis=0, dtype=np.float64)
        return total


@dataclass(frozen=True, kw_only=True)
class CaptionFrequency(ScoreRule):
    """How many pairs of the lists have this caption; case and blanks are evened out."""

    threshold: float
    name = "curate.max_caption_pairs"
    reason = Reason.CAPTION_BOILERPLATE
    columns = (CAPTION_PAIRS,)
    keeps = "at_most"

    def scores(self, rows: pa.Table) -> Scores:
        return numbers(rows, CAPTION_PAIRS)


def _num_chars(rows: pa.Table) -> Scores:
    lengths: Scores = pc.utf8_length(text.captions(rows)).to_numpy(zero_copy_only=False).astype(np.float64)
    return lengths


def _num_words(rows: pa.Table) -> Scores:
    return np.diff(text.words(text.captions(rows)).starts).astype(np.float64)
