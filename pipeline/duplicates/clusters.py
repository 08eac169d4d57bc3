"""k-means clusters of embeddings, by faiss: of a sample, and of what is too much for one cluster again.

Legend: S rows of the sample, K clusters, D dimension of an embedding.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]

ROWS_PER_CLUSTER = 5_000
MAX_ROWS_PER_CLUSTER = 50_000
"""A cluster that is expected to have more rows is split."""
MIN_SAMPLE_PER_CLUSTER = 10
ROUNDS = 20
SPLITS = 3
"""How often a cluster is split again. What is still too large is compared in runs (pipeline.duplicates.cosines)."""
ASSIGNED_AT_ONCE = 16 * 2**20
"""Cosines in memory at once."""


def num_clusters(num_rows: int, asked: int | None) -> int:
    """How many clusters are made of so many rows."""
    return asked or max(1, round(num_rows / ROWS_PER_CLUSTER))


def make_clusters(sample_SD: Points, count: int, num_rows: int, *, seed: int, threads: int) -> Points:
    """[K, D] centres of length 1, of `count` clusters or more: those of more than MAX_ROWS_PER_CLUSTER of all rows,
    as their part of the sample says, are split. Fewer where the sample is too small for so many.

    The same for the same sample in the same order, and the same number of threads.
    """
    centres = _kmeans(sample_SD, count, seed, threads)
    for split in range(SPLITS):
        shares = np.bincount(assign(sample_SD, centres), minlength=len(centres)) * (num_rows / max(1, len(sample_SD)))
        too_large = np.flatnonzero(shares > MAX_ROWS_PER_CLUSTER)
        if not len(too_large):
            break
        of = assign(sample_SD, centres)
        parts = [
            _kmeans(sample_SD[of == cluster], -(-int(shares[cluster]) // ROWS_PER_CLUSTER), seed + split + 1, threads)
            for cluster in too_large
        ]
        centres = np.concatenate([np.delete(centres, too_large, axis=0), *parts])
    return centres


def assign(points_ND: NDArray[np.floating[Any]], centres_KD: Points) -> NDArray[np.int64]:
    """[N] the centre with the greatest cosine; 0 where there is no centre."""
    if not len(centres_KD):
        return np.zeros(len(points_ND), np.int64)
    step = max(1, ASSIGNED_AT_ONCE // max(1, len(centres_KD)))
    pieces = (points_ND[first : first + step].astype(np.float32) for first in range(0, len(points_ND), step))
    return np.concatenate([np.empty(0, np.int64), *((piece @ centres_KD.T).argmax(axis=1) for piece in pieces)])


def _kmeans(points: Points, count: int, seed: int, threads: int) -> Points:
    import faiss

    count = max(1, min(count, len(points) // MIN_SAMPLE_PER_CLUSTER))
    if not len(points):
        return np.empty((0, points.shape[1]), np.float32)
    faiss.omp_set_num_threads(threads)
    kmeans: Any = faiss.Kmeans(
        points.shape[1],
        count,
        niter=ROUNDS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    kmeans.train(np.ascontiguousarray(points, np.float32))
    centres: Points = np.asarray(kmeans.centroids, np.float32)
    return centres
