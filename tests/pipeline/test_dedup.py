"""One sample of every set of identical downloads is kept, whatever the partitions, units and order."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.buckets import write_buckets
from pipeline.duplicates.exact import DedupStage, find_duplicates, make_keys, num_partitions, partition_of
from pipeline.selection import Drops, num_dropped, representative_uid

# (unit, row) -> (body, uid); bodies a and b repeat inside a unit and across units
PAIRS = {
    (0, 0): ("a", 9),
    (0, 1): ("b", 2),
    (0, 2): ("c", 3),
    (1, 0): ("a", 4),
    (1, 3): ("b", 8),
    (2, 1): ("a", 7),
    (2, 5): ("d", 1),
}
DROPPED = {(0, 0): 4, (2, 1): 4, (1, 3): 2}


def write_keys(store: Store, partitions: int) -> tuple[str, ...]:
    paths = []
    for unit in range(3):
        mine = [(row, *value) for (owner, row), value in PAIRS.items() if owner == unit]
        hashes = [hashlib.sha256(body.encode()).hexdigest() for _, body, _ in mine]
        keys = make_keys(hashes, [f"{uid:032x}" for _, _, uid in mine], unit, [row for row, _, _ in mine])
        path = Path(store.full(f"keys/{partitions}/{unit}.bin"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_buckets(path, keys, partition_of(keys, partitions), partitions)
        paths.append(f"keys/{partitions}/{unit}.bin")
    return tuple(paths)


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_the_smallest_uid_represents_identical_bytes(store: Store, partitions: int) -> None:
    stage = DedupStage(store=store, keys=write_keys(store, partitions), partitions=partitions)
    markers = run_stage(stage, Journal(store), InlineExecutor(), Progress())
    paths = tuple(marker.path_of("duplicates.bin") for marker in markers.values())
    drops = Drops(rule="dedup.exact", reason="duplicate_bytes", paths=paths, num_units=3)
    found = {
        (unit, int(drop["row"])): int(representative_uid(drop) or "0", 16)
        for unit in range(3)
        for drop in drops.of_unit(store, unit)
    }
    assert found == DROPPED
    assert num_dropped(store, (drops,), 3).tolist() == [1, 1, 1]
    assert sum(marker.counts["dropped"] for marker in markers.values()) == 3


def test_the_result_does_not_depend_on_the_order_of_the_keys() -> None:
    draw = np.random.default_rng(0)
    hashes = [hashlib.sha256(bytes([number])).hexdigest() for number in draw.integers(0, 50, 400)]
    uids = [f"{uid:032x}" for uid in draw.permutation(400)]
    keys = make_keys(hashes, uids, 0, range(400))
    expected = {}
    for uid, digest in sorted(zip(uids, hashes, strict=True)):
        expected.setdefault(digest, uid)
    for _ in range(3):
        dropped, representatives = find_duplicates(keys[draw.permutation(400)])
        assert len(dropped) == 400 - len(expected)
        for row, low in zip(dropped["row"].tolist(), representatives["uid_low"].tolist(), strict=True):
            assert f"{low:032x}" == expected[hashes[row]]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_keys_have_no_duplicates(count: int) -> None:
    keys = make_keys(["ab" * 32] * count, ["0" * 32] * count, 0, range(count))
    dropped, representatives = find_duplicates(keys)
    assert len(dropped) == len(representatives) == 0


def test_hashes_that_differ_in_their_second_half_only_are_different() -> None:
    keys = make_keys(["ab" * 8 + "00" * 24, "ab" * 8 + "01" * 24], ["0" * 32, "1" * 32], 0, [0, 1])
    assert len(find_duplicates(keys)[0]) == 0


def test_partitions_follow_from_the_number_of_keys() -> None:
    assert [num_partitions(keys) for keys in (0, 1, 1_000_000, 1_000_001)] == [1, 1, 1, 2]


def test_partitions_cover_the_whole_hash_space_in_order() -> None:
    keys = make_keys(["00" * 32, "7f" + "ff" * 31, "80" + "00" * 31, "ff" * 32], ["0" * 32] * 4, 0, range(4))
    for count in (1, 3, 1000):
        partitions = partition_of(keys, count).tolist()
        assert partitions == sorted(partitions)
        assert partitions[0] == 0
        assert partitions[-1] == count - 1
