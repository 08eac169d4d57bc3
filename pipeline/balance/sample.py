"""MetaCLIP's balancing: of the pairs that a frequent concept is found in, about `per_concept` stay.

Algorithm 1 of the paper: a concept that is found in n captions is drawn with probability p = min(1, t / n) in each of
them, independently, and a pair stays if one of its concepts is drawn. So a pair with a rare concept stays always, and
    P(pair stays) = 1 - prod over its concepts of (1 - p)
which is the score in the record.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.identity import chances

# A concept of the caption of a row. A row without any has one record, of NO_CONCEPT.
MATCH = np.dtype([("unit", "<u4"), ("row", "<u4"), ("concept", "<u4"), ("uid_high", "<u8"), ("uid_low", "<u8")])
NO_CONCEPT = np.uint32(2**32 - 1)
Matches = NDArray[np.void]
DRAWN_AT_ONCE = 500_000
"""Matches whose draws are worked out at once: what that needs is several times what is kept of them."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn for some rows, in the order of their first match.

    first: index of each row's first match. stays: whether it is kept. probability: that it would be.
    """

    first: NDArray[np.int64]
    stays: NDArray[np.bool_]
    probability: NDArray[np.float64]


def probabilities(counts: NDArray[np.int64], per_concept: int) -> NDArray[np.float64]:
    """[concepts] of each being drawn: min(1, t / n); 1 for one that occurs nowhere."""
    return np.minimum(1.0, per_concept / np.maximum(counts, 1))


def draw(
    matches: Matches,
    probability: NDArray[np.float64],
    words: NDArray[np.uint64],
    seed: int,
    keeps_unmatched: bool,
) -> Drawn:
    """Which rows stay. A draw depends on uid, concept and seed alone, not on who makes it or on the other rows.

    matches: the matches of some rows, a row's together. probability, words: [concepts], see `concepts.concept_words`.
    """
    hits, of_match = np.empty(len(matches), bool), np.empty(len(matches))
    for begin in range(0, len(matches), DRAWN_AT_ONCE):
        piece = slice(begin, begin + DRAWN_AT_ONCE)
        some = matches[piece]
        unmatched = some["concept"] == NO_CONCEPT
        concept = np.where(unmatched, 0, some["concept"])
        of_match[piece] = np.where(unmatched, float(keeps_unmatched), probability[concept])
        uids = np.stack([some["uid_high"], some["uid_low"]], axis=1)
        hits[piece] = chances(uids, words[concept], seed) < of_match[piece]
    is_first = np.ones(len(matches), bool)
    is_first[1:] = (matches["unit"][1:] != matches["unit"][:-1]) | (matches["row"][1:] != matches["row"][:-1])
    first = np.flatnonzero(is_first)
    if not len(first):
        return Drawn(first=first, stays=np.empty(0, bool), probability=np.empty(0))
    return Drawn(
        first=first,
        stays=np.logical_or.reduceat(hits, first),
        probability=1 - np.multiply.reduceat(1 - of_match, first),
    )


def count_concepts(matches: Matches, num_concepts: int) -> NDArray[np.int64]:
    """[concepts] in how many rows each is found."""
    found = matches["concept"][matches["concept"] != NO_CONCEPT]
    return np.bincount(found, minlength=num_concepts).astype(np.int64)
