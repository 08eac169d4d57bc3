"""Keys that samples share when they are the same, who of them is kept, and the samples that are known already."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, write_buckets, write_in_buckets
from pipeline.duplicates.config import Preference
from pipeline.duplicates.exchange import GroupStage, make_drops, read_facts
from pipeline.duplicates.facts import COLUMNS, HAS_BYTES, HAS_URL, OPTIONAL_COLUMNS, facts_of
from pipeline.manifest import Shard
from pipeline.selection import KNOWN, ROWS_PER_GROUP, read_table

KEY = np.dtype(
    [
        ("key_high", "<u8"),
        ("key_low", "<u8"),
        ("uid_high", "<u8"),
        ("uid_low", "<u8"),
        ("unit", "<u4"),
        ("row", "<u4"),
        ("rank", "<u8"),  # of several samples with the same key the one with the smallest (rank, uid) is kept
    ]
)
KEY_WITHOUT_RANK = np.dtype(KEY.descr[:-1])
"""`KEY` where all have the same rank: what is written is most of what such a step costs."""
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What makes samples the same: the facts whose hashes are the key, and the `flags` without which there is none."""

    facts: tuple[str, ...]
    flags: int = 0

    def has_key(self, facts: Records) -> NDArray[np.bool_]:
        """[N] which samples have a key at all."""
        known: NDArray[np.bool_] = (facts["flags"] & self.flags) == self.flags
        return known

    def keys(self, facts: Records) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """([N], [N]) the two words of the key."""
        high, low = (facts[f"{self.facts[0]}_{half}"] for half in ("high", "low"))
        for name in self.facts[1:]:  # 128 random bits each: rotate, then exclusive or
            high, low = low * _ODD ^ facts[f"{name}_high"], high ^ facts[f"{name}_low"]
        return high, low


BYTES = Criterion(facts=("bytes",), flags=HAS_BYTES)
URL = Criterion(facts=("url",), flags=HAS_URL)
BYTES_AND_CAPTION = Criterion(facts=("bytes", "caption"), flags=HAS_BYTES)


def ranks(facts: Records, prefer: Sequence[Preference]) -> NDArray[np.uint64]:
    """[N] at least 1, the smaller the better; known samples have 0. What is preferred first weighs most."""
    rank = np.zeros(len(facts), np.uint64)
    for name in prefer:
        if name == "source":
            value = (2**31 - facts["priority"]).astype(np.uint64)
        elif name == "caption":
            value = np.uint64(2**32 - 1) - facts["num_chars"]
        else:
            continue
        rank = rank << np.uint64(32) | value
    return np.maximum(rank, np.uint64(1))


def make_keys(
    facts: Records, high: NDArray[np.uint64], low: NDArray[np.uint64], rank: NDArray[np.uint64] | None
) -> Records:
    """[N] KEY, without rank if it is None."""
    keys = np.empty(len(facts), KEY_WITHOUT_RANK if rank is None else KEY)
    keys["key_high"], keys["key_low"] = high, low
    if rank is not None:
        keys["rank"] = rank
    for name in ("uid_high", "uid_low", "unit", "row"):
        keys[name] = facts[name]
    return keys


def partition_of(hashes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """[N] the partition of each hash: their space cut into `count` equal ranges."""
    return (((hashes >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def find_duplicates(keys: Records) -> tuple[Records, Records]:
    """(dropped keys, the key that represents each of them): the smallest (rank, uid) of every key is kept."""
    dropped, representatives = find_places(keys)
    return keys.take(dropped), keys.take(representatives)


def find_places(keys: Records) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(places of the dropped keys, the place of the key that represents each of them)."""
    return _find(keys["key_low"], keys.take)


def _find(
    low: NDArray[np.uint64], pick: Callable[[NDArray[np.int64]], Records]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`find_places` of keys of which `low` is the second word; `pick` gives the keys at some places."""
    places, first = _runs(low)
    keys = pick(places)
    lengths = np.diff(first, append=len(places))
    high, uid, is_best = keys["key_high"], keys["uid_high"], np.ones(len(keys), bool)
    if "rank" in _names(keys):
        is_best = keys["rank"] == np.repeat(_minimum(keys["rank"], first), lengths)
        uid = np.where(is_best, uid, np.uint64(2**64 - 1))
    is_best &= uid == np.repeat(_minimum(uid, first), lengths)
    if (high != np.repeat(high[first], lengths)).any() or is_best.sum() != len(first):
        return _find_by_sorting(keys, places)  # a run is of two keys, or two uids begin alike
    return places[~is_best], np.repeat(places[is_best], lengths - 1)


def _runs(low: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the places of keys that begin alike, run after run; where each run of two or more begins).

    low: second words of keys. Compared are its first bits, as many as fit into a word beside a place. One sort of words
    is ten times as fast as a sort of records.
    """
    place_bits = np.uint64(max(1, len(low) - 1).bit_length())
    words = low >> place_bits
    words <<= place_bits
    words |= np.arange(len(low), dtype=np.uint64)
    words.sort()
    hashes = words >> place_bits
    like_next = np.append(hashes[1:] == hashes[:-1], np.zeros(min(1, len(low)), bool))
    like_previous = np.roll(like_next, 1)
    is_shared = like_next | like_previous
    places = (words[is_shared] & ((np.uint64(1) << place_bits) - np.uint64(1))).astype(np.int64)
    return places, np.flatnonzero(~like_previous[is_shared])


def _names(records: Records) -> tuple[str, ...]:
    return records.dtype.names or ()


def _minimum(values: NDArray[np.uint64], first: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The smallest value of each run."""
    return np.minimum.reduceat(values, first) if len(first) else values


def _find_by_sorting(keys: Records, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`find_places` for any keys, which lie at these places, at the price of a sort of records."""
    by = [name for name in ("rank", "uid_high", "uid_low", "unit", "row") if name in _names(keys)]
    order = np.lexsort([keys[name] for name in (*reversed(by), "key_low", "key_high")])
    keys, places = keys[order], places[order]
    same = (keys["key_high"][1:] == keys["key_high"][:-1]) & (keys["key_low"][1:] == keys["key_low"][:-1])
    is_first = np.concatenate([np.ones(min(1, len(keys)), bool), ~same])
    best = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    dropped = np.flatnonzero(~is_first)
    return places[dropped], places[best[dropped]]


def write_keys(
    output: UnitOutput,
    facts: Records,
    criterion: Criterion,
    rank_of: Callable[[Records], NDArray[np.uint64]] | None,
    partitions: int,
) -> None:
    """Outputs of a keys stage: the best sample of every key, and the repeats that it represents.

    rank_of: the ranks of some facts; None where all have the same.

    keys.bin      `KEY` or `KEY_WITHOUT_RANK`, one bucket per partition
    repeats.bin   `DROP`, one bucket
    """

    def keys_of(some: Records) -> Records:
        return make_keys(some, *criterion.keys(some), rank_of(some) if rank_of else None)

    high, low = criterion.keys(facts)
    dropped, representatives = _find(low, lambda places: keys_of(facts.take(places)))
    repeats = make_drops(facts.take(dropped), facts.take(representatives))
    write_buckets(output.path("repeats.bin"), repeats, np.zeros(len(repeats), np.int64), 1)
    partition = partition_of(high, partitions)
    partition[dropped] = partitions  # behind the last one: these are left out
    write_in_buckets(output.path("keys.bin"), facts, partition, partitions, keys_of)


@dataclass(frozen=True, kw_only=True)
class KeysStage(GroupStage):
    """A unit is a group of fetch units: keys of the samples that the steps before have left.

    counts: rows, without_key
    """

    criterion: Criterion
    prefer: tuple[Preference, ...] | None
    """None: all have the same rank"""
    partitions: int
    memory_bytes: int = 512 * 2**20

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts = read_facts(self.store, unit.params, self.drops)
        has_key = self.criterion.has_key(facts)
        output.count("rows", len(facts))
        output.count("without_key", len(facts) - int(has_key.sum()))
        if not has_key.all():
            facts = facts.take(np.flatnonzero(has_key))
        rank_of = None if self.prefer is None else partial(ranks, prefer=self.prefer)
        write_keys(output, facts, self.criterion, rank_of, self.partitions)


@dataclass(frozen=True, kw_only=True)
class KnownKeysStage:
    """A unit is some shards: keys of their samples, which stay whatever comes. Its rank is the best there is."""

    store: Store
    shards: tuple[Shard, ...]
    facts_dtype: np.dtype[Any]
    criterion: Criterion
    partitions: int
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 1024 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": ()}

    def units(self) -> Sequence[Unit]:
        return known_tasks(self.shards)

    def run(self, unit: Unit, output: UnitOutput) -> None:
        facts = read_known(self.store, unit.params["paths"], self.facts_dtype)
        facts = facts.take(np.flatnonzero(self.criterion.has_key(facts)))
        write_keys(output, facts, self.criterion, lambda some: np.zeros(len(some), np.uint64), self.partitions)
        output.count("rows", len(facts))


def known_tasks(shards: Iterable[Shard]) -> list[Unit]:
    """Units of stages that read known shards: about `ROWS_PER_GROUP` samples each."""
    tasks: list[list[str]] = []
    room = 0
    for shard in shards:
        if shard.num_samples > room or not tasks:
            tasks.append([])
            room = ROWS_PER_GROUP
        tasks[-1].append(shard.parquet.path)
        room -= shard.num_samples
    return [Unit(id=f"{index:05}", params={"paths": tuple(paths)}) for index, paths in enumerate(tasks)]


def read_known(store: Store, paths: Sequence[str], dtype: np.dtype[Any]) -> Records:
    """[N] facts of all samples of these shards' tables: unit KNOWN, and their places for rows."""
    priorities: Mapping[str, int] = {}
    tables = (read_table(store, path, COLUMNS, OPTIONAL_COLUMNS) for path in paths)  # one at a time
    facts = [facts_of(table, int(KNOWN), range(table.num_rows), priorities, dtype) for table in tables]
    found = np.concatenate(facts)
    found["row"] = np.arange(len(found))
    return found
