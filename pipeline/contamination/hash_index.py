"""Nearest of many 64-bit hashes, exactly, up to some distance.

Hashes that differ in at most R bits agree in one of any R + 1 blocks that they are cut into. So for each block there is
a table of the references ordered by its bits, and only those that agree in it are compared.

Legend: M references, Q queries.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
BITS = 64
MAX_COMPARED = 4_000_000
"""Comparisons at once: what bounds the memory, about 100 bytes for each."""
_NOTHING = np.uint64(2**64 - 1)


class HashIndex:
    """References to be searched within `reach` bits."""

    def __init__(self, hashes_M: Hashes, reach: int) -> None:
        edges = [BITS * block // (reach + 1) for block in range(reach + 2)]
        self._hashes, self._reach = hashes_M, reach
        self._tables = []
        for low, high in pairwise(edges):
            shift, mask = np.uint64(low), np.uint64((1 << (high - low)) - 1)
            values = hashes_M >> shift & mask
            order = np.argsort(values, kind="stable")
            self._tables.append((shift, mask, values[order], order))

    def nearest(self, queries_Q: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([Q] bits to the nearest reference, -1 where none is in reach; [Q] its number, the smallest of equals)."""
        best = np.full(len(queries_Q), _NOTHING)
        for shift, mask, values, order in self._tables:
            wanted = queries_Q >> shift & mask
            first = np.searchsorted(values, wanted, side="left")
            counts = np.searchsorted(values, wanted, side="right") - first
            for begin, end in _pieces(counts):
                found = self._compare(queries_Q[begin:end], first[begin:end], counts[begin:end], order)
                best[begin:end] = np.minimum(best[begin:end], found)
        distances = (best >> np.uint64(32)).astype(np.int64)
        is_near = distances <= self._reach
        numbers = (best & np.uint64(2**32 - 1)).astype(np.int64)
        return np.where(is_near, distances, -1), np.where(is_near, numbers, -1)

    def _compare(
        self, queries: Hashes, first: NDArray[np.int64], counts: NDArray[np.int64], order: NDArray[np.int64]
    ) -> Hashes:
        """Distance and number of the best of each query's candidates as one word; `order[first:][:counts]` are they."""
        best = np.full(len(queries), _NOTHING)
        has = np.flatnonzero(counts)
        if not len(has):
            return best
        starts = np.cumsum(counts[has]) - counts[has]
        places = np.arange(int(counts[has].sum())) + np.repeat(first[has] - starts, counts[has])
        numbers = order[places]
        bits = np.bitwise_count(self._hashes[numbers] ^ np.repeat(queries[has], counts[has])).astype(np.uint64)
        best[has] = np.minimum.reduceat(bits << np.uint64(32) | numbers.astype(np.uint64), starts)
        return best


def _pieces(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Runs of queries with at most MAX_COMPARED candidates together, or a single one."""
    total = np.cumsum(counts)
    pieces, begin = [], 0
    while begin < len(counts):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + MAX_COMPARED, side="right")))
        pieces.append((begin, end))
        begin = end
    return pieces
