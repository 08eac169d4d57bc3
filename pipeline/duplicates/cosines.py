"""Semantic duplicates inside one cluster (SemDeDup: Abbas et al. 2023, section 3), as pure functions.

Its rows are put into an order of preference. Every row's score is its greatest cosine with a row before it, the upper
triangle's column maximum of the paper's figure A.1; a row is dropped where it is above a threshold. So one pass serves
any threshold.

Legend: N rows of a cluster, D dimension of an embedding.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating[Any]]

MAX_TOGETHER = 50_000
"""Rows that are compared with one another: about 20 s of a core for embeddings of 512."""
ENTRIES_AT_ONCE = 16 * 2**20
"""Cosines in memory at once."""
TIE = 2e-6
"""Cosines that differ by less are equal: sums of float32 in another order do. The row that is preferred is named."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """scores: [N] float32, NaN for a row with none before it. of: [N] which row that is, -1 for none."""

    scores: NDArray[np.float32]
    of: NDArray[np.int64]


def nearest_preferred(vectors_ND: Vectors, first: int = 0, max_together: int = MAX_TOGETHER) -> Nearest:
    """For each row the row before it, in the order of preference that they come in, that is most like it.

    vectors: of any length but 0. first: the first row for which it is asked; those before it have none.
    More than `max_together` rows are bounded work: rows with the very same embedding are found first, and need no
    more; what is left is cut into runs of rows that are alike in their first principal component, and compared inside
    these.
    """
    if len(vectors_ND) <= max_together:
        return _nearest(vectors_ND, first)
    scores, of = np.full(len(vectors_ND), np.nan, np.float32), np.full(len(vectors_ND), -1, np.int64)
    first_like = _first_like(vectors_ND)
    repeats = np.flatnonzero(first_like != np.arange(len(vectors_ND)))
    repeats = repeats[repeats >= first]
    scores[repeats], of[repeats] = 1.0, first_like[repeats]
    distinct = np.flatnonzero(first_like == np.arange(len(vectors_ND)))
    for run in _runs(vectors_ND, distinct, max_together):
        found = _nearest(vectors_ND[run], int(np.searchsorted(run, first)))
        has = np.flatnonzero(found.of >= 0)
        scores[run[has]], of[run[has]] = found.scores[has], run[found.of[has]]
    return Nearest(scores=scores, of=of)


def _nearest(vectors: Vectors, first: int) -> Nearest:
    units = vectors.astype(np.float32)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    of = np.full(len(units), -1, np.int64)
    begin = max(1, first)
    while begin < len(units):
        end = min(len(units), 2 * begin, begin + max(1, ENTRIES_AT_ONCE // (2 * begin)))
        cosines = units[begin:end] @ units[:end].T
        cosines[np.arange(end) >= np.arange(begin, end)[:, None]] = -np.inf
        of[begin:end] = (cosines >= cosines.max(axis=1, keepdims=True) - TIE).argmax(axis=1)
        begin = end
    scores = np.full(len(units), np.nan, np.float32)
    has = np.flatnonzero(of >= 0)
    scores[has] = exact_cosines(vectors[has], vectors[of[has]])
    return Nearest(scores=scores, of=of)


def exact_cosines(one_ND: Vectors, other_ND: Vectors) -> NDArray[np.float32]:
    """[N] cosines of pairs, summed in one order whatever the machine's threads; in pieces."""
    pieces = [np.empty(0, np.float32)]
    for first in range(0, len(one_ND), 4_096):
        one, other = (x[first : first + 4_096].astype(np.float64) for x in (one_ND, other_ND))
        lengths = np.sqrt(np.sum(one * one, axis=1) * np.sum(other * other, axis=1))
        pieces.append((np.sum(one * other, axis=1) / lengths).astype(np.float32))
    return np.concatenate(pieces)


def _first_like(vectors: Vectors) -> NDArray[np.int64]:
    """[N] the first row with the same embedding, itself if none comes before it."""
    rows = np.ascontiguousarray(vectors)
    texts = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, which = np.unique(texts, return_index=True, return_inverse=True)
    return first[which]


def _runs(vectors: Vectors, rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Rows cut into runs of at most `size` along their first principal component; each run in the order of rows."""
    some = vectors[rows[:: max(1, len(rows) // size)]].astype(np.float64)
    centre = some.mean(axis=0)
    _, directions = np.linalg.eigh((some - centre).T @ (some - centre))
    places = np.concatenate(
        [
            (vectors[rows[n : n + size]].astype(np.float64) - centre) @ directions[:, -1]
            for n in range(0, len(rows), size)
        ]
    )
    order = np.argsort(places, kind="stable")
    return [np.sort(rows[run]) for run in np.array_split(order, -(-len(rows) // size)) if len(run)]
