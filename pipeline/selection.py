"""From decisions and drops to the rows of a fetch unit that go into shards."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.journal import Marker
from cluster.scratch import scratch_folder
from cluster.store import Store
from pipeline.buckets import Records, read_bucket, read_bucket_sizes, write_buckets
from pipeline.readers.schema import RESERVED
from pipeline.workfile import WorkFile

# A dropped row of a fetch unit, the uid of the sample that represents it (0: none does), and what the step measured.
DROP = np.dtype([("row", "<u4"), ("uid_high", "<u8"), ("uid_low", "<u8"), ("score", "<f4")])


@dataclass(frozen=True, kw_only=True)
class DecidedUnit:
    """Where one fetch unit's rows, images and decisions lie. `index` is its place among the fetch units."""

    index: int
    id: str
    rows: WorkFile
    images: WorkFile
    kept: WorkFile
    decisions: WorkFile
    keys: WorkFile

    @staticmethod
    def of(index: int, fetched: Marker, decided: Marker) -> "DecidedUnit":
        return DecidedUnit(
            index=index,
            id=fetched.unit,
            rows=WorkFile.of(fetched, "rows.parquet"),
            images=WorkFile.of(fetched, "images.tar"),
            kept=WorkFile.of(decided, "kept.npy"),
            decisions=WorkFile.of(decided, "decisions.parquet"),
            keys=WorkFile.of(decided, "keys.bin"),
        )


@dataclass(frozen=True, kw_only=True)
class Drops:
    """What one step of curation dropped of the rows that the rules and the steps before it had kept.

    rule, reason, threshold: what the record says of these rows. paths: the step's outputs, each of which has a bucket
    of `DROP` per fetch unit.
    """

    rule: str
    reason: str
    paths: tuple[str, ...]
    num_units: int
    threshold: float | None = None

    def of_unit(self, store: Store, index: int) -> Records:
        """Every `DROP` of one fetch unit, ordered by row."""
        parts = [read_bucket(store, path, index, self.num_units, DROP) for path in self.paths]
        found = np.concatenate(parts) if parts else np.empty(0, DROP)
        return found[np.argsort(found["row"], kind="stable")]


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
        for path in step.paths:
            total += read_bucket_sizes(store, path, num_units)
    return total


def write_drops(path: Path, dropped: Records, representatives: Records, num_units: int, score: float = np.nan) -> None:
    """One output of `Drops.paths`: what was dropped (`unit`, `row`) and whose uid represents it."""
    order = np.lexsort((dropped["row"], dropped["unit"]))
    drops = np.empty(len(dropped), DROP)
    drops["row"], drops["score"] = dropped["row"][order], score
    drops["uid_high"], drops["uid_low"] = representatives["uid_high"][order], representatives["uid_low"][order]
    write_buckets(path, drops, dropped["unit"][order].astype(np.int64), num_units)


def representative_uid(drop: Records) -> str | None:
    """The uid, as hex, of the sample that represents a dropped row; None where none does."""
    high, low = int(drop["uid_high"]), int(drop["uid_low"])
    return f"{high:016x}{low:016x}" if high or low else None


def read_checked(store: Store, file: WorkFile, columns: Sequence[str] | None = None) -> pa.Table:
    """A unit's parquet file as a table, all columns or the named ones. RunError when it is missing or damaged."""
    return pq.read_table(pa.BufferReader(file.read(store)), columns=list(columns) if columns is not None else None)


def read_table(store: Store, path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet object as a table; only the named columns are read."""
    with store.open(path) as file:
        return pq.read_table(file, columns=list(columns) if columns is not None else None)


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
