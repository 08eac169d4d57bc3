"""Rules: which pairs are kept, each judged alone. `Rule` and `ScoreRule` are what users' own rules derive from."""

from pipeline.rules.base import Rule, ScoreRule, Scores, Verdicts, numbers

__all__ = ["Rule", "ScoreRule", "Scores", "Verdicts", "numbers"]
