"""A bucket is read as it was written, whichever way; empty ones too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.store import Store
from pipeline.buckets import (
    read_all_buckets,
    read_bucket,
    read_bucket_sizes,
    read_records,
    write_all_buckets,
    write_buckets,
    write_in_buckets,
)

KIND = np.dtype([("number", "<u4"), ("word", "<u8")])
BUCKETS = np.array([0, 3, 3, 3, 4])
ORDER = np.array([3, 0, 4, 1, 2])  # in which those of a bucket stay in theirs


def write_shuffled(path: Path, records: Any, buckets: Any, num_buckets: int) -> None:
    write_in_buckets(path, records[ORDER], buckets[ORDER], num_buckets)


def write_lists(path: Path, records: Any, buckets: Any, num_buckets: int) -> None:
    write_all_buckets(path, [records[buckets == bucket] for bucket in range(num_buckets)])


@pytest.mark.parametrize(
    ("write", "numbers"),
    [(write_buckets, [0, 1, 2, 3, 4]), (write_lists, [0, 1, 2, 3, 4]), (write_shuffled, [0, 3, 1, 2, 4])],
)
def test_every_bucket_is_read_as_it_was_written(tmp_path: Path, write: Callable[..., None], numbers: list[int]) -> None:
    records = np.zeros(5, KIND)
    records["number"], records["word"] = np.arange(5), 2**63 + np.arange(5, dtype=np.uint64)
    write(tmp_path / "file.bin", records, BUCKETS, 6)
    store, expected = Store(str(tmp_path)), [numbers[:1], [], [], numbers[1:4], numbers[4:], []]
    assert [read_bucket(store, "file.bin", bucket, 6, KIND)["number"].tolist() for bucket in range(6)] == expected
    assert [bucket["number"].tolist() for bucket in read_all_buckets(store, "file.bin", 6, KIND)] == expected
    assert read_bucket_sizes(store, "file.bin", 6).tolist() == [1, 0, 0, 3, 1, 0]
    assert (read_records(store, "file.bin", 6, KIND) == records[numbers]).all()


@pytest.mark.parametrize("num_buckets", [0, 3])
def test_no_records_at_all(tmp_path: Path, num_buckets: int) -> None:
    write_in_buckets(tmp_path / "file.bin", np.empty(0, KIND), np.empty(0, np.int64), num_buckets)
    assert read_bucket_sizes(Store(str(tmp_path)), "file.bin", num_buckets).tolist() == [0] * num_buckets
    assert len(read_records(Store(str(tmp_path)), "file.bin", num_buckets, KIND)) == 0


def test_records_of_the_bucket_behind_the_last_are_left_out(tmp_path: Path) -> None:
    for num_buckets in (255, 256):  # the last number of eight bits, and the first of nine
        buckets = np.array([num_buckets, num_buckets - 1, 0])
        write_in_buckets(tmp_path / "file.bin", np.arange(3, dtype=np.uint64), buckets, num_buckets)
        found = read_all_buckets(Store(str(tmp_path)), "file.bin", num_buckets, np.dtype("<u8"))
        assert (len(found), found[0].tolist(), found[-1].tolist()) == (num_buckets, [2], [1])
        assert sum(map(len, found)) == 2
