"""Image-text retrieval, Recall@K in both directions.

Captions may repeat. The texts that are searched and asked for are the distinct captions, and any picture that has the
same caption is right: to a picture, its caption; to a caption, every picture that has it.

Legend: N pictures, T distinct captions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.evaluate.zeroshot import ranked

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries with a right answer among the first K, and what random answers would get, by K."""

    at: dict[int, float]
    chance: dict[int, float]
    num_queries: int
    num_candidates: int


def distinct(captions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return the T distinct captions in order of first appearance, and for each picture the index of its own [N]."""
    index: dict[str, int] = {}
    owners = [index.setdefault(caption, len(index)) for caption in captions]
    return list(index), torch.tensor(owners, dtype=torch.int64)


def image_to_text(images_NE: Tensor, texts_TE: Tensor, owner_N: Tensor) -> Recall:
    """Search the distinct captions for each picture; right is the picture's own caption, `owner_N`."""
    num_images, num_texts = len(images_NE), len(texts_TE)
    nearest = _nearest(images_NE, texts_TE)
    right = nearest == owner_N[:, None]
    chance = {k: min(k, num_texts) / num_texts for k in KS}
    return Recall(at=_at(right), chance=chance, num_queries=num_images, num_candidates=num_texts)


def text_to_image(texts_TE: Tensor, images_NE: Tensor, owner_N: Tensor) -> Recall:
    """Search the pictures for each distinct caption; right is every picture with that caption."""
    num_images, num_texts = len(images_NE), len(texts_TE)
    nearest = _nearest(texts_TE, images_NE)
    right = owner_N[nearest] == torch.arange(num_texts)[:, None]
    copies = torch.bincount(owner_N, minlength=num_texts).tolist()
    chance = {k: sum(_random_hit(num_images, m, min(k, num_images)) for m in copies) / num_texts for k in KS}
    return Recall(at=_at(right), chance=chance, num_queries=num_texts, num_candidates=num_images)


def _nearest(queries: Tensor, candidates: Tensor) -> Tensor:
    return ranked(queries, candidates, min(max(KS), len(candidates)))


def _at(right: Tensor) -> dict[int, float]:
    return {k: float(right[:, :k].any(dim=1).float().mean()) for k in KS}


def _random_hit(total: int, right: int, drawn: int) -> float:
    """Probability that `drawn` of `total` items, without replacement, hold one of the `right` ones."""
    return 1 - math.comb(total - right, drawn) / math.comb(total, drawn)
