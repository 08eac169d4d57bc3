"""The rules that a configuration asks for, in the order in which they are blamed."""

from collections.abc import Mapping, Sequence

from cluster.store import Store
from pipeline.models.rules import model_rules
from pipeline.rules.addresses import AllowedHosts, AllowedUrls, BlockedHosts, BlockedUrls
from pipeline.rules.base import Rule
from pipeline.rules.captions import (
    AlphanumericRatio,
    CaptionFrequency,
    CharRepetition,
    MaximumCaptionChars,
    MaximumCaptionWords,
    MinimumCaptionChars,
    MinimumCaptionWords,
    PersonTag,
    WordRepetition,
)
from pipeline.rules.config import LIST_KEYS, CurateConfig
from pipeline.rules.images import (
    AspectRatio,
    Blank,
    Information,
    MaximumPixels,
    MinimumPixels,
    MinimumSide,
    Sharpness,
)
from pipeline.rules.language import Language
from pipeline.rules.lists import Entries
from pipeline.rules.user import user_rules
from pipeline.rules.words import BlockedWords
from pipeline.workfile import WorkFile


def text_rules(config: CurateConfig, lists: Mapping[str, Entries]) -> tuple[Rule, ...]:
    """Those that are applied before the download; `lists` are the copies of `lists.copy_lists`."""
    own = [rule for rule in user_rules(config) if not rule.needs_image]
    return (*_address_rules(lists), *_caption_rules(config, lists), *own)


def named_text_rules(config: CurateConfig) -> tuple[Rule, ...]:
    """The same to be named, not applied: with lists that are nowhere."""
    nowhere = Entries(store=Store("memory://"), file=WorkFile(stage="", unit="", path="", sha256=""))
    return text_rules(config, {name: nowhere for name in LIST_KEYS if getattr(config, name)})


def _address_rules(lists: Mapping[str, Entries]) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    if "blocked_urls" in lists:
        rules.append(BlockedUrls(urls=lists["blocked_urls"]))
    if "allowed_urls" in lists:
        rules.append(AllowedUrls(urls=lists["allowed_urls"]))
    if "blocked_hosts" in lists:
        rules.append(BlockedHosts(hosts=lists["blocked_hosts"]))
    if "allowed_hosts" in lists:
        rules.append(AllowedHosts(hosts=lists["allowed_hosts"]))
    return tuple(rules)


def _caption_rules(config: CurateConfig, lists: Mapping[str, Entries]) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    if config.min_caption_chars:
        rules.append(MinimumCaptionChars(threshold=config.min_caption_chars))
    if config.min_caption_words:
        rules.append(MinimumCaptionWords(threshold=config.min_caption_words))
    if config.max_caption_chars is not None:
        rules.append(MaximumCaptionChars(threshold=config.max_caption_chars))
    if config.max_caption_words is not None:
        rules.append(MaximumCaptionWords(threshold=config.max_caption_words))
    if config.min_alphanumeric_ratio is not None:
        rules.append(AlphanumericRatio(threshold=config.min_alphanumeric_ratio))
    if config.max_char_repetition is not None:
        rules.append(CharRepetition(threshold=config.max_char_repetition, size=config.char_repetition_size))
    if config.max_word_repetition is not None:
        rules.append(WordRepetition(threshold=config.max_word_repetition, size=config.word_repetition_size))
    if config.drop_person_tag:
        rules.append(PersonTag())
    if "blocked_words" in lists:
        is_whole = config.blocked_words_match == "whole"
        words = lists["blocked_words"]
        rules.append(BlockedWords(threshold=config.max_blocked_words, words=words, whole_words=is_whole))
    if config.max_caption_pairs is not None:
        rules.append(CaptionFrequency(threshold=config.max_caption_pairs))
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
    if config.min_pixels is not None:
        rules.append(MinimumPixels(threshold=config.min_pixels))
    if config.max_pixels is not None:
        rules.append(MaximumPixels(threshold=config.max_pixels))
    if config.drop_blank:
        rules.append(Blank(threshold=config.blank_threshold))
    if config.min_bytes_per_pixel is not None:
        rules.append(Information(threshold=config.min_bytes_per_pixel))
    if config.min_sharpness is not None:
        rules.append(Sharpness(threshold=config.min_sharpness))
    own = [rule for rule in user_rules(config) if rule.needs_image]
    return (*rules, *model_rules(config), *own)


def columns_of(rules: Sequence[Rule]) -> list[str]:
    """Every column that some rule reads, once each."""
    return list(dict.fromkeys(column for rule in rules for column in rule.columns))
