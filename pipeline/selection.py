"""From decisions and drops to the rows of a fetch unit that go into shards."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.journal import Marker
from cluster.scratch import scratch_folder
from cluster.store import Store
from pipeline.buckets import Records, read_bucket, read_bucket_sizes, read_records
from pipeline.readers.schema import RESERVED
from pipeline.workfile import WorkFile

ROWS_PER_GROUP = 1_000_000
NONE, KNOWN = np.uint32(2**32 - 1), np.uint32(2**32 - 2)
"""`of_unit` of a drop that no sample represents, and of one that a sample outside of the fetch units does."""
DROP = np.dtype(
    [
        ("unit", "<u4"),  # the dropped row
        ("row", "<u4"),
        ("of_unit", "<u4"),  # the sample that represents it
        ("of_row", "<u4"),
        ("uid_high", "<u8"),  # uid of that sample, 0 if there is none
        ("uid_low", "<u8"),
        ("score", "<f4"),  # what the step measured, or not a number
    ]
)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Consecutive fetch units that are worked on together: one file of keys, one file of drops.

    starts: the first unit of each group, and the number of units; `(0, 3, 5)` is units 0 to 2 and 3 to 4.
    """

    starts: tuple[int, ...]

    @staticmethod
    def of(num_rows: Sequence[int], rows_per_group: int = ROWS_PER_GROUP) -> "Groups":
        """As many units in each as have about this many rows together: a pure function of the units' rows."""
        starts, room = [0] if num_rows else [], rows_per_group
        for index, count in enumerate(num_rows):
            if count > room and index > starts[-1]:
                starts.append(index)
                room = rows_per_group
            room -= count
        return Groups(starts=(*starts, len(num_rows)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def range(self, group: int) -> tuple[int, int]:
        """(first unit, end) of a group."""
        return self.starts[group], self.starts[group + 1]

    def of_unit(self, unit: int) -> int:
        """The group that a unit is in."""
        return bisect_right(self.starts, unit) - 1


@dataclass(frozen=True, kw_only=True)
class DecidedUnit:
    """Where one fetch unit's rows, images and decisions lie. `index` is its place among the fetch units."""

    index: int
    id: str
    rows: WorkFile
    images: WorkFile
    kept: WorkFile
    decisions: WorkFile
    facts: WorkFile

    @staticmethod
    def of(index: int, fetched: Marker, decided: Marker) -> "DecidedUnit":
        return DecidedUnit(
            index=index,
            id=fetched.unit,
            rows=WorkFile.of(fetched, "rows.parquet"),
            images=WorkFile.of(fetched, "images.tar"),
            kept=WorkFile.of(decided, "kept.npy"),
            decisions=WorkFile.of(decided, "decisions.parquet"),
            facts=WorkFile.of(decided, "facts.bin"),
        )


@dataclass(frozen=True, kw_only=True)
class Drops:
    """What one step of curation dropped of the rows that the rules and the steps before it had kept.

    rule, reason, threshold: what the record says of these rows. paths: a file for each of `groups`, in which each
    unit of the group has a bucket of `DROP`, ordered by row.
    """

    rule: str
    reason: str
    paths: tuple[str, ...]
    groups: Groups
    threshold: float | None = None

    def of_unit(self, store: Store, index: int) -> Records:
        """Every `DROP` of one fetch unit, ordered by row."""
        group = self.groups.of_unit(index)
        first, end = self.groups.range(group)
        return read_bucket(store, self.paths[group], index - first, end - first, DROP)

    def of_group(self, store: Store, group: int) -> Records:
        """Every `DROP` of a group, ordered by unit and row."""
        first, end = self.groups.range(group)
        return read_records(store, self.paths[group], end - first, DROP)


def survivors(store: Store, unit: DecidedUnit, drops: Sequence[Drops]) -> NDArray[np.int64]:
    """Row numbers of a fetch unit that the rules and these steps kept, ascending."""
    kept: NDArray[np.int64] = np.load(io.BytesIO(unit.kept.read(store))).astype(np.int64)
    for step in drops:
        kept = kept[~np.isin(kept, step.of_unit(store, unit.index)["row"])]
    return kept


def num_dropped(store: Store, drops: Sequence[Drops], num_units: int) -> NDArray[np.int64]:
    """[units] how many rows of each fetch unit these steps dropped."""
    total = np.zeros(num_units, np.int64)
    for step in drops:
        for group, path in enumerate(step.paths):
            first, end = step.groups.range(group)
            total[first:end] += read_bucket_sizes(store, path, end - first)
    return total


def representative_uid(drop: Records) -> str | None:
    """The uid, as hex, of the sample that represents a dropped row; None where none does."""
    high, low = int(drop["uid_high"]), int(drop["uid_low"])
    return f"{high:016x}{low:016x}" if high or low else None


def read_checked(
    store: Store, file: WorkFile, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """A unit's parquet file as a table, all columns or the named ones and those of `optional` that it has.

    RunError when it is missing or damaged.
    """
    return _read(pa.BufferReader(file.read(store)), columns, optional)


def read_table(store: Store, path: str, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pa.Table:
    """A parquet object as a table; only the named columns, and those of `optional` that it has, are read."""
    with store.open(path) as file:
        return _read(file, columns, optional)


def _read(source: Any, columns: Sequence[str] | None, optional: Sequence[str]) -> pa.Table:
    with pq.ParquetFile(source) as file:
        if columns is None:
            return file.read()
        present = file.schema_arrow.names
        if missing := [name for name in columns if name not in present]:
            raise KeyError(f"no column {', '.join(missing)}")
        return file.read([*columns, *(name for name in optional if name in present and name not in columns)])


@contextmanager
def open_images(store: Store, images: WorkFile) -> Iterator[BinaryIO]:
    """A fetch unit's tar to seek in: an object store answers one large read faster than many small ones.

    RunError when it is missing or damaged.
    """
    with scratch_folder() as folder, open(images.local(store, folder), "rb") as file:
        yield file


def extra_columns(schema: pa.Schema) -> list[str]:
    """The list's own columns in a schema of the fetch stage or of a record."""
    return [name for name in schema.names if name not in RESERVED]


def column_list(table: pa.Table, name: str) -> list[Any]:
    """One column as Python values."""
    values: list[Any] = table.column(name).to_pylist()
    return values
