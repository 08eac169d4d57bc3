"""All pairs of 64-bit hashes that differ in at most three bits: exact, in bounded memory, whatever the hashes are.

Six blocks of bits: hashes that differ in at most three bits agree in at least three whole blocks (Manku et al. 2007,
"Detecting near-duplicates for web crawling"). So every pair meets in one of 20 tables, one for each choice of three
blocks, among the hashes that agree in those: 32 bits, give or take one. The tables whose first block is the same
need the same hashes side by side, and of hashes that differ in d bits one of the first d + 1 blocks is the same: a
hash is sent to d + 1 places, not to twenty. Fewer bits need fewer tables (`tables`).

Legend: N hashes, P pairs.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_DISTANCE = 3
BLOCKS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))
"""(lowest bit, number of bits) of each block."""
LONG_RUN = 512
"""Hashes that agree in the blocks of a table are compared all with all up to this many; more are split first."""
MAX_PAIRS = 2_000_000
"""Pairs held before they are merged into a forest."""

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]


def block_of(hashes: Hashes, block: int) -> Hashes:
    """[N] the value of a block of each hash."""
    low, bits = BLOCKS[block]
    return (hashes >> np.uint64(low)) & np.uint64((1 << bits) - 1)


def near_pairs(hashes: Hashes, distance: int, first_block: int | None = None) -> Iterator[tuple[Places, Places]]:
    """([P], [P]) the places of pairs that differ in at most `distance` bits, in batches; a pair may come repeatedly.

    hashes: [N] distinct. first_block: only what the tables that begin with this block find: all the near pairs of which
    it is the first block that is the same. Raises ValueError for a distance above `MAX_DISTANCE`: some pairs would be
    missed.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance={distance}: has to be 0 to {MAX_DISTANCE}")
    for table in tables(distance):
        if first_block in (None, table[0]):
            rest = np.concatenate([_bits(block) for block in range(len(BLOCKS)) if block not in table])
            yield from _alike(hashes, _table_runs(hashes, table), rest, distance)


def tables(distance: int) -> Iterator[tuple[int, int, int]]:
    """Choices of three blocks of which any two near hashes agree in one: 20 for three bits, 7, 3, and none for 0 bits.

    Where the first block that is the same is number f, f bits differ before it, and at most distance - f of the later
    blocks do: more of these are the same than there are groups of them, so two of one group are (pigeonhole).
    """
    for first in range(distance + 1 if distance else 0):
        for group in np.array_split(np.arange(first + 1, len(BLOCKS)), len(BLOCKS) - 2 - distance):
            for second, third in combinations(group.tolist(), 2):
                yield first, second, third


def linked(hashes: Hashes, distance: int, first_block: int | None = None) -> Places:
    """[N] the smallest place that each hash is connected to by `near_pairs`; its own where there are none."""
    roots = np.arange(len(hashes))
    held: list[tuple[Places, Places]] = []
    for pair in near_pairs(hashes, distance, first_block):
        held.append(pair)
        if sum(len(left) for left, _ in held) > MAX_PAIRS:
            roots, held = merge(roots, held), []
    return merge(roots, held)


def merge(roots: Places, pairs: list[tuple[Places, Places]]) -> Places:
    """[N] the smallest place that each one is connected to, by `roots` (as returned) or by pairs."""
    if not pairs:
        return roots
    left = np.concatenate([roots[pair[0]] for pair in pairs])
    right = np.concatenate([roots[pair[1]] for pair in pairs])
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(roots), len(roots)))
    label = connected_components(graph, directed=False)[1][roots]
    smallest = np.full(label.max(initial=0) + 1, len(roots))
    np.minimum.at(smallest, label, np.arange(len(roots)))
    merged: Places = smallest[label]
    return merged


def _bits(block: int) -> Places:
    low, count = BLOCKS[block]
    return np.arange(low, low + count)


def _mask(bits: Places) -> np.uint64:
    return np.uint64(np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64)))


def _alike(
    hashes: Hashes, runs: tuple[Places, Places, Places], rest: Places, distance: int
) -> Iterator[tuple[Places, Places]]:
    """Near pairs of the same run, whose hashes may differ in the bits `rest` only."""
    places, first, lengths = runs
    is_long = (lengths > LONG_RUN) & (len(rest) > distance + 1)
    yield from _close(hashes, places, first[~is_long], lengths[~is_long], distance)
    for start, length in zip(first[is_long], lengths[is_long], strict=True):
        # One of distance + 1 pieces of the other bits has to be the same.
        for piece in np.array_split(rest, distance + 1):
            inside = places[start : start + length]
            runs = _runs(hashes[inside] & _mask(piece), inside)
            yield from _alike(hashes, runs, np.setdiff1d(rest, piece), distance)


def _table_runs(hashes: Hashes, table: tuple[int, ...]) -> tuple[Places, Places, Places]:
    """`_runs` of all places by the blocks of a table. Where both fit into one word, words are sorted: much faster."""
    place_bits = max(1, len(hashes) - 1).bit_length()
    if sum(BLOCKS[block][1] for block in table) + place_bits > 64:
        mask = np.bitwise_or.reduce([_mask(_bits(block)) for block in table])
        return _runs(hashes & mask, np.arange(len(hashes)))
    words = np.zeros(len(hashes), np.uint64)
    for block in table:
        words = words << np.uint64(BLOCKS[block][1]) | block_of(hashes, block)
    words = words << np.uint64(place_bits) | np.arange(len(hashes), dtype=np.uint64)
    words.sort()
    places = (words & np.uint64((1 << place_bits) - 1)).astype(np.int64)
    return places, *_several(words >> np.uint64(place_bits))


def _runs(keys: Hashes, places: Places) -> tuple[Places, Places, Places]:
    """(places in the order of their keys, and where each run of two or more equal keys begins, and its length)."""
    order = np.argsort(keys)
    return places[order], *_several(keys[order])


def _several(ordered: Hashes) -> tuple[Places, Places]:
    """(where each run of two or more equal values begins, its length)."""
    like_next = np.append(ordered[1:] == ordered[:-1], np.zeros(min(1, len(ordered)), bool))
    begins = like_next.copy()
    begins[1:] &= ~like_next[:-1]
    ends = ~like_next
    ends[1:] &= like_next[:-1]
    ends[:1] = False
    first = np.flatnonzero(begins)
    return first, np.flatnonzero(ends) - first + 1


def _close(
    hashes: Hashes, places: Places, first: Places, lengths: Places, distance: int
) -> Iterator[tuple[Places, Places]]:
    """Compare all with all inside every run: first each with its next, then with the next but one, and so on."""
    left = np.repeat(first, lengths) + _ranges(lengths)
    end = np.repeat(first + lengths, lengths)
    step = 1
    while len(left):
        inside = left + step < end
        left, end = left[inside], end[inside]
        a, b = places[left], places[left + step]
        near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
        if near.any():
            yield a[near], b[near]
        step += 1


def _ranges(lengths: Places) -> Places:
    """0 .. n-1 for each n, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
