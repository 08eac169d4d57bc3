"""The rules that a configuration asks for, in the order in which they are blamed."""

from collections.abc import Sequence

from pipeline.models.rules import model_rules
from pipeline.rules.base import Rule
from pipeline.rules.captions import MaximumCaptionChars, MinimumCaptionChars, MinimumCaptionWords
from pipeline.rules.config import CurateConfig
from pipeline.rules.images import AspectRatio, Blank, MinimumSide
from pipeline.rules.language import Language


def text_rules(config: CurateConfig) -> tuple[Rule, ...]:
    """Those that are applied before the download."""
    rules: list[Rule] = []
    if config.min_caption_chars:
        rules.append(MinimumCaptionChars(threshold=config.min_caption_chars))
    if config.min_caption_words:
        rules.append(MinimumCaptionWords(threshold=config.min_caption_words))
    if config.max_caption_chars is not None:
        rules.append(MaximumCaptionChars(threshold=config.max_caption_chars))
    if config.languages:
        rules.append(Language(threshold=config.language_confidence, languages=tuple(config.languages)))
    return tuple(rules)


def image_rules(config: CurateConfig) -> tuple[Rule, ...]:
    """Those that need what is known of the image."""
    rules: list[Rule] = []
    if config.min_side_px > 0:
        rules.append(MinimumSide(threshold=config.min_side_px))
    if config.max_aspect_ratio is not None:
        rules.append(AspectRatio(threshold=config.max_aspect_ratio))
    if config.drop_blank:
        rules.append(Blank(threshold=config.blank_threshold))
    return (*rules, *model_rules(config))


def columns_of(rules: Sequence[Rule]) -> list[str]:
    """Every column that some rule reads, once each."""
    return list(dict.fromkeys(column for rule in rules for column in rule.columns))
