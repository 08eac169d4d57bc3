"""Step exact: of all pairs whose downloaded bytes are identical, keep the one with the smallest uid.

The unit is a range of the keys' hash space. Every decide unit wrote its keys in hash order, one bucket a partition, so
a partition is one range read per unit and its result does not depend on who computes it or when.

    duplicates.bin   the dropped rows as `selection.DROP`, one bucket per fetch unit
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, read_bucket, write_buckets
from pipeline.curation.context import Context, Curated
from pipeline.manifest import Shard
from pipeline.reasons import Reason
from pipeline.selection import Drops, column_list, read_table, write_drops

KEYS_PER_PARTITION = 1_000_000
IN_DATASET = np.uint32(2**32 - 1)
"""The unit of keys whose samples are in the dataset already."""
# 128 bits of the hash: two different images of a billion share them with probability 1.5e-21.
KEY = np.dtype(
    [
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("uid_high", "<u8"),
        ("uid_low", "<u8"),
        ("unit", "<u4"),
        ("row", "<u4"),
    ]
)


def num_partitions(num_keys: int) -> int:
    """How many partitions to use for about this many keys; part of the stage's identity, so a pure function."""
    return max(1, -(-num_keys // KEYS_PER_PARTITION))


def make_keys(sha256: Sequence[str], uids: Sequence[str], unit: int, rows: Sequence[int]) -> Records:
    """Keys of some rows of fetch unit number `unit`, in hash order. Hashes and uids are hex."""
    keys = np.empty(len(rows), KEY)
    for name, texts in (("hash", sha256), ("uid", uids)):
        words = np.frombuffer(bytes.fromhex("".join(text[:32] for text in texts)), ">u8").reshape(-1, 2)
        keys[f"{name}_high"], keys[f"{name}_low"] = words[:, 0], words[:, 1]
    keys["unit"], keys["row"] = unit, rows
    return _in_hash_order(keys)


def partition_of(keys: Records, count: int) -> Records:
    """The partition of each key: the hash space cut into `count` equal ranges."""
    partitions: Records = ((keys["hash_high"] >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)
    return partitions.astype(np.int64)


def find_duplicates(keys: Records) -> tuple[Records, Records]:
    """(dropped keys, the key that represents each of them): the smallest uid of every hash is kept."""
    places, first = _runs(keys)
    lengths = np.diff(first, append=len(places))
    hash_high, uid_high = keys["hash_high"][places], keys["uid_high"][places]
    is_smallest = uid_high == np.repeat(_minimum(uid_high, first), lengths)
    if (hash_high != np.repeat(hash_high[first], lengths)).any() or is_smallest.sum() != len(first):
        return _find_by_sorting(keys[places])  # a run is of two hashes, or two uids begin alike
    return keys[places[~is_smallest]], keys[np.repeat(places[is_smallest], lengths - 1)]


def _runs(keys: Records) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the places of keys whose hashes begin alike, run after run; where each run of two or more begins).

    What is compared is the first bits of `hash_low`, as many as fit into a word beside a place. One sort of words is
    ten times as fast as a sort of records.
    """
    place_bits = np.uint64(max(1, len(keys) - 1).bit_length())
    words = (keys["hash_low"] >> place_bits << place_bits) | np.arange(len(keys), dtype=np.uint64)
    words.sort()
    hashes = words >> place_bits
    like_next = np.append(hashes[1:] == hashes[:-1], np.zeros(min(1, len(keys)), bool))
    like_previous = np.roll(like_next, 1)
    is_shared = like_next | like_previous
    places = (words[is_shared] & ((np.uint64(1) << place_bits) - np.uint64(1))).astype(np.int64)
    return places, np.flatnonzero(~like_previous[is_shared])


def _minimum(values: NDArray[np.uint64], first: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The smallest value of each run."""
    return np.minimum.reduceat(values, first) if len(first) else values


def _find_by_sorting(keys: Records) -> tuple[Records, Records]:
    """`find_duplicates` for any keys, at the price of a sort of records."""
    keys = _in_hash_order(keys)
    same = (keys["hash_high"][1:] == keys["hash_high"][:-1]) & (keys["hash_low"][1:] == keys["hash_low"][:-1])
    is_first = np.concatenate([np.ones(min(1, len(keys)), bool), ~same])
    representative = np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))
    dropped = np.flatnonzero(~is_first)
    return keys[dropped], keys[representative[dropped]]


def drop_exact(context: Context, curated: Curated) -> Drops | None:
    """Step of curation: of equal bytes one sample stays, one of the known ones before any newcomer."""
    if not context.config.dedup.exact:
        return None
    keys, stage = tuple(unit.keys.path for unit in curated.units), context.name("dedup")
    if context.known:
        known = KeysStage(
            store=context.store, shards=context.known, partitions=curated.num_partitions, name=context.name("keys")
        )
        known_keys = tuple(marker.path_of("keys.bin") for marker in context.run_stage(known).values())
        done = context.run_stage(
            NewDuplicatesStage(
                store=context.store, old_keys=known_keys, new_keys=keys, partitions=curated.num_partitions, name=stage
            )
        )
    else:
        done = context.run_stage(
            DedupStage(store=context.store, keys=keys, partitions=curated.num_partitions, name=stage)
        )
    return Drops(
        rule="dedup.exact",
        reason=Reason.DUPLICATE_BYTES,
        paths=tuple(marker.path_of("duplicates.bin") for marker in done.values()),
        num_units=len(curated.units),
    )


@dataclass(frozen=True, kw_only=True)
class DedupStage:
    """Exact duplicates over all fetch units. `keys` are the decide units' key files, in unit order."""

    store: Store
    keys: tuple[str, ...]
    partitions: int
    name: str = "dedup"
    num_cpus: float = 1.0
    memory_bytes: int = KEYS_PER_PARTITION * KEY.itemsize * 8

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{index:05}", params={"partition": index}) for index in range(self.partitions)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        dropped, representatives = find_duplicates(self._read(unit.params["partition"]))
        write_drops(output.path("duplicates.bin"), dropped, representatives, len(self.keys))
        output.count("dropped", len(dropped))

    def _read(self, partition: int) -> Records:
        """The partition's keys of all units; reads overlap, an object store answers each in tens of milliseconds."""

        def read(path: str) -> Records:
            return read_bucket(self.store, path, partition, self.partitions, KEY)

        parts: Iterator[Records] | list[Records]
        if self.store.is_local or len(self.keys) < 8:
            parts = map(read, self.keys)
        else:
            with ThreadPoolExecutor(16) as pool:
                parts = list(pool.map(read, self.keys))
        return np.concatenate([np.empty(0, KEY), *parts])


@dataclass(frozen=True, kw_only=True)
class KeysStage:
    """The samples that are in the dataset."""

    store: Store
    shards: tuple[Shard, ...]
    partitions: int
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "shards": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{shard.index:05}", params={"path": shard.parquet.path}) for shard in self.shards]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        table = read_table(self.store, unit.params["path"], ["sha256", "uid"])
        hashes, uids = column_list(table, "sha256"), column_list(table, "uid")
        keys = make_keys(hashes, uids, int(IN_DATASET), range(table.num_rows))
        write_buckets(output.path("keys.bin"), keys, partition_of(keys, self.partitions), self.partitions)
        output.count("rows", table.num_rows)


@dataclass(frozen=True, kw_only=True)
class NewDuplicatesStage:
    """Duplicates among newcomers, and of samples in the dataset, which always stay.

    old_keys, new_keys: key files of the shards and of the repair's decide units, in unit order.
    """

    store: Store
    old_keys: tuple[str, ...]
    new_keys: tuple[str, ...]
    partitions: int
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = KEYS_PER_PARTITION * KEY.itemsize * 8

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{index:05}", params={"partition": index}) for index in range(self.partitions)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        partition = unit.params["partition"]
        dropped, representatives = find_newcomers(
            self._read(self.old_keys, partition), self._read(self.new_keys, partition)
        )
        write_drops(output.path("duplicates.bin"), dropped, representatives, len(self.new_keys))
        output.count("dropped", len(dropped))

    def _read(self, paths: Sequence[str], partition: int) -> Records:
        parts = [read_bucket(self.store, path, partition, self.partitions, KEY) for path in paths]
        return np.concatenate([np.empty(0, KEY), *parts])


def find_newcomers(old: Records, new: Records) -> tuple[Records, Records]:
    """(dropped newcomers, the key that represents each): one that is in the dataset, else the smallest uid.

    For `find_duplicates` an old key's uid is its place, which is smaller than any uid: the old one represents.
    """
    places = old.copy()
    places["uid_high"], places["uid_low"] = 0, np.arange(len(old), dtype=np.uint64)
    dropped, representatives = find_duplicates(np.concatenate([places, new]))
    is_new = dropped["unit"] != IN_DATASET
    dropped, representatives = dropped[is_new], representatives[is_new].copy()
    is_old = representatives["unit"] == IN_DATASET
    representatives[is_old] = old[representatives["uid_low"][is_old].astype(np.int64)]
    return dropped, representatives


def _in_hash_order(keys: Records) -> Records:
    order = np.lexsort((keys["uid_low"], keys["uid_high"], keys["hash_low"], keys["hash_high"]))
    return keys[order]
