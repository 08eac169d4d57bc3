"""Settings of the steps that remove duplicates."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator

from cluster.config import Config, key

Preference = Literal["source", "caption", "uid"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


class DedupConfig(Config):
    """Which duplicates are removed."""

    exact: bool = key(True, "of samples whose downloaded bytes are the same, keep one")
    by_url: bool = key(False, "of samples with the same URL, keep one")
    by_bytes_and_caption: bool = key(
        False, "of samples with the same downloaded bytes and the same caption, keep one; with dedup.exact=false"
    )
    prefer: Annotated[list[Preference], BeforeValidator(_one_or_many)] = key(
        ["source", "uid"],
        "which of several is kept: source: that of the source with the greatest priority; caption: with the longest "
        "caption; uid: with the smallest uid, which decides where all else is equal",
    )

    @field_validator("prefer")
    @classmethod
    def _uid_is_last(cls, prefer: list[Preference]) -> list[Preference]:
        if "uid" in prefer[:-1]:
            raise ValueError("uid decides between any two samples: name it last, or leave it out")
        if len(set(prefer)) < len(prefer):
            raise ValueError("name each once")
        return prefer
