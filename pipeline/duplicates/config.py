"""Settings of the steps that remove duplicates."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, field_validator

from cluster.config import Config, key
from pipeline.models.spec import ModelName

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
    near_distance: int | None = key(
        None,
        "of samples whose perceptual hashes differ in at most so many of 64 bits, keep one; null: do not compare them",
        unit="bits",
        ge=0,
        le=3,
    )
    mirror: bool = key(True, "an image that looks like the mirror image of another is near to it, too")
    alternatives: bool = key(
        False, "keep captions of dropped duplicates with the sample that represents them, in its list `captions`"
    )
    prefer: Annotated[list[Preference], BeforeValidator(_one_or_many)] = key(
        ["source", "uid"],
        "which of several is kept: source: that of the source with the greatest priority; caption: with the longest "
        "caption; uid: with the smallest uid, which decides where all else is equal",
    )
    semantic_model: ModelName | None = key(
        None,
        "model whose embeddings tell which images show the same: pairmill:RUN, open_clip:NAME:FILE, timm:NAME:FILE, "
        "onnx:FILE, your.module:Class (docs/models.md); null: none is asked",
    )
    semantic_similarity: float | None = key(
        None,
        "of images whose embeddings have a greater cosine one is kept; null: only the cosines are stored, and how many "
        "images each threshold would drop",
        ge=-1,
        le=1,
    )
    semantic_keep: Literal["prefer", "far", "near"] = key(
        "prefer",
        "which of them: prefer: as `prefer` says; far: the one farthest from its cluster's centre, as SemDeDup does; "
        "near: the nearest to it",
    )
    semantic_clusters: int | None = key(
        None, "images are compared inside k-means clusters, this many; null: about one for 5,000 images", ge=1
    )
    semantic_sample: int = key(1_000_000, "images that the clusters are made of", unit="images", ge=1)

    @field_validator("prefer")
    @classmethod
    def _uid_is_last(cls, prefer: list[Preference]) -> list[Preference]:
        if "uid" in prefer[:-1]:
            raise ValueError("uid decides between any two samples: name it last, or leave it out")
        if len(set(prefer)) < len(prefer):
            raise ValueError("name each once")
        return prefer
