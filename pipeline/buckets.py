"""Files of fixed-size records grouped into numbered buckets, so that one bucket is one range read.

    int64 offsets[num_buckets + 1]   in records; bucket i is records offsets[i] .. offsets[i + 1]
    records                          in bucket order, as numpy lays them out

A stage that hands keys to another writes one such file per unit; the other reads its bucket of every file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.store import Store

Records = NDArray[Any]
_OFFSET = np.dtype("<i8")


def write_buckets(path: Path, records: Records, buckets: NDArray[np.integer[Any]], num_buckets: int) -> None:
    """Write records; `buckets[i]` is the bucket of `records[i]`, and must not decrease."""
    offsets = np.searchsorted(buckets, np.arange(num_buckets + 1)).astype(_OFFSET)
    with open(path, "wb") as file:
        file.write(offsets.tobytes())
        file.write(np.ascontiguousarray(records).tobytes())


def read_bucket(store: Store, path: str, bucket: int, num_buckets: int, dtype: np.dtype[Any]) -> Records:
    """The records of one bucket, with two small range reads."""
    start, end = np.frombuffer(store.read_range(path, bucket * _OFFSET.itemsize, 2 * _OFFSET.itemsize), _OFFSET)
    if start == end:
        return np.empty(0, dtype)
    first_byte = (num_buckets + 1) * _OFFSET.itemsize + int(start) * dtype.itemsize
    return np.frombuffer(store.read_range(path, first_byte, int(end - start) * dtype.itemsize), dtype)


def read_bucket_sizes(store: Store, path: str, num_buckets: int) -> NDArray[np.int64]:
    """How many records each bucket of a file holds."""
    offsets = np.frombuffer(store.read_range(path, 0, (num_buckets + 1) * _OFFSET.itemsize), _OFFSET)
    return np.diff(offsets).astype(np.int64)
