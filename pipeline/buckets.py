"""Files of fixed-size records grouped into numbered buckets, so that one bucket is one range read.

    int64 offsets[num_buckets + 1]   in records; bucket i is records offsets[i] .. offsets[i + 1]
    records                          in bucket order, as numpy lays them out

A stage that hands keys to another writes one such file per unit; the other reads its bucket of every file.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from cluster.memory import MAX_KEPT_BYTES, keep_freed_memory
from cluster.store import Store

Records = NDArray[Any]
_OFFSET = np.dtype("<i8")
_RUN = 32_768
"""Records that are brought into order at a time."""


def write_buckets(path: Path, records: Records, buckets: NDArray[np.integer[Any]], num_buckets: int) -> None:
    """Write records; `buckets[i]` is the bucket of `records[i]`, and must not decrease."""
    numbers = np.arange(num_buckets + 1).astype(buckets.dtype)  # of another type, the buckets would be converted
    offsets = np.searchsorted(buckets, numbers).astype(_OFFSET)
    with open(path, "wb") as file:
        offsets.tofile(file)
        np.ascontiguousarray(records).tofile(file)


def write_all_buckets(path: Path, buckets: Sequence[Records]) -> None:
    """Write the records of every bucket."""
    with open(path, "wb") as file:
        np.cumsum([0, *map(len, buckets)], dtype=_OFFSET).tofile(file)
        for records in buckets:
            np.ascontiguousarray(records).tofile(file)


def write_in_buckets(
    path: Path,
    records: Records,
    buckets: NDArray[np.integer[Any]],
    num_buckets: int,
    make: Callable[[Records], Records] | None = None,
) -> None:
    """`write_buckets` of records in any order; those of a bucket stay in theirs.

    Records whose bucket is `num_buckets` are left out. make: what is written in the place of some records, one each.
    """
    small = buckets.astype(np.min_scalar_type(num_buckets))  # few bits are sorted by radix
    order = np.argsort(small, kind="stable")
    counts = np.bincount(small, minlength=num_buckets + 1)[:num_buckets]
    offsets = np.cumsum([0, *counts], dtype=_OFFSET)
    with open(path, "wb", buffering=0) as file:
        offsets.tofile(file)
        # `take` copies records as a whole, where an index copies them field by field: eight times as fast. A run at a
        # time stays in the processor's cache.
        for first in range(0, int(offsets[-1]), _RUN):
            some = records.take(order[first : min(first + _RUN, offsets[-1])])
            (make(some) if make else some).tofile(file)


def read_bucket(store: Store, path: str, bucket: int, num_buckets: int, dtype: np.dtype[Any]) -> Records:
    """The records of one bucket, with two small range reads."""
    return read_buckets(store, [path], bucket, num_buckets, dtype)


def read_buckets(store: Store, paths: Sequence[str], bucket: int, num_buckets: int, dtype: np.dtype[Any]) -> Records:
    """The records that several files have in one bucket, in the order of the files."""
    at = bucket * _OFFSET.itemsize
    ends = store.overlapped(lambda path: store.read_range(path, at, 2 * _OFFSET.itemsize), paths)
    ranges = np.frombuffer(b"".join(ends), _OFFSET).reshape(-1, 2)
    records, pieces = pieces_of(np.diff(ranges)[:, 0].tolist(), dtype)
    first_byte = (num_buckets + 1) * _OFFSET.itemsize
    reads = [
        (path, piece, first_byte + start * dtype.itemsize)
        for path, piece, start in zip(paths, pieces, ranges[:, 0].tolist(), strict=True)
        if len(piece)
    ]
    store.overlapped(lambda read: store.read_into(*read), reads)
    return records


def pieces_of(counts: Sequence[int], dtype: np.dtype[Any]) -> tuple[Records, list[memoryview]]:
    """(records that are not set yet, the bytes of each run of so many): what is read in pieces is never copied."""
    edges = np.cumsum([0, *counts]) * dtype.itemsize
    if edges[-1] > MAX_KEPT_BYTES:
        keep_freed_memory()
    records = np.empty(sum(counts), dtype)
    view = memoryview(cast(Any, records.view(np.uint8)))
    return records, [view[start:end] for start, end in pairwise(edges.tolist())]


def read_all_buckets(store: Store, path: str, num_buckets: int, dtype: np.dtype[Any]) -> list[Records]:
    """The records of every bucket, with one read."""
    data = store.read_bytes(path)
    offsets = np.frombuffer(data, _OFFSET, num_buckets + 1)
    return np.split(np.frombuffer(data, dtype, offset=offsets.nbytes), offsets[1:-1])


def read_records(store: Store, path: str, num_buckets: int, dtype: np.dtype[Any]) -> Records:
    """All records of a file in bucket order, with one read."""
    return np.frombuffer(store.read_bytes(path), dtype, offset=(num_buckets + 1) * _OFFSET.itemsize)


def read_bucket_sizes(store: Store, path: str, num_buckets: int) -> NDArray[np.int64]:
    """How many records each bucket of a file holds."""
    offsets = np.frombuffer(store.read_range(path, 0, (num_buckets + 1) * _OFFSET.itemsize), _OFFSET)
    return np.diff(offsets).astype(np.int64)
