"""A finished dataset as numbered samples: rows of the shard parquets, image bytes by range from the tars.

Nothing is scanned: a row's parquet says where its image lies in the tar. Parquet files are read when a row of theirs
is first asked for, and a bounded number of them is kept.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.errors import RunError
from pipeline.manifest import Shard, read_manifest
from training.data.select import matching_rows, parse_conditions, require_column

MAX_SHARDS_KEPT = 512
_INDEX_COLUMNS = ("key", "uid", "image_format", "image_offset", "image_size")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one sample is, and its caption. `id` is the first 63 bits of its uid."""

    row: int
    shard: int
    key: str
    uid: str
    id: int
    caption: str
    image_format: str
    image_offset: int
    image_size: int


class Dataset:
    """The samples of a dataset that pass `select`, numbered 0 .. len - 1 in shard order. Safe to use from threads."""

    def __init__(self, dataset: str, *, select: Sequence[str] = (), caption_column: str = "caption") -> None:
        """Open a dataset folder or URL. Raises RequestError if there is none, or it lacks a column that is used."""
        self.store, self.manifest = read_manifest(dataset)
        self.url = self.store.url
        self._conditions = parse_conditions(select, self.manifest.columns, "data.select")
        self._caption_column = caption_column
        require_column(caption_column, self.manifest.columns, f"data.caption_column={caption_column}")
        self._rows_of_shard = [self._select(shard) for shard in self.manifest.shards]
        sizes = [shard.num_samples if rows is None else len(rows) for shard, rows in self._shards_and_rows()]
        self._first_row = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        table = self._table(shard)
        line = {name: table.column(name)[row - int(self._first_row[shard])].as_py() for name in table.column_names}
        caption = line.pop(self._caption_column)
        plain = {name: line.get(name, caption) for name in _INDEX_COLUMNS}
        return Sample(row=row, shard=shard, id=sample_id(plain["uid"]), caption=str(caption or ""), **plain)

    def column(self, name: str) -> list[Any]:
        """One column of every selected row, in row order. Raises RequestError if the dataset does not have it."""
        self.require(name, f"column {name}")
        values: list[Any] = []
        for shard, rows in self._shards_and_rows():
            column = self._read(shard, [name]).column(name)
            values += (column if rows is None else column.take(pa.array(rows))).to_pylist()
        return values

    def require(self, column: str, where: str) -> None:
        """Raise RequestError, naming the configuration key `where`, unless the dataset has the column."""
        require_column(column, self.manifest.columns, where)

    def image_bytes(self, sample: Sample) -> bytes:
        """The encoded image of a sample; fewer bytes than `image_size` if the tar is cut short.

        Raises RunError when the tar is missing.
        """
        path = self.manifest.shards[sample.shard].tar.path
        try:
            if self.store.is_local:
                file = self._file(sample.shard, path)  # held: evicted files close when their last reader is done
                return os.pread(file.fileno(), sample.image_size, sample.image_offset)
            return self.store.read_range(path, sample.image_offset, sample.image_size)
        except FileNotFoundError:
            raise RunError(
                f"{self.store.url_of(path)}: this shard is missing; run `pairmill verify {self.url}`"
            ) from None

    def close(self) -> None:
        """Close what is open; the dataset can still be used."""
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _shards_and_rows(self) -> list[tuple[Shard, NDArray[np.int64] | None]]:
        return list(zip(self.manifest.shards, self._rows_of_shard, strict=True))

    def _select(self, shard: Shard) -> NDArray[np.int64] | None:
        """The rows of a shard that pass, or None for all."""
        if not self._conditions:
            return None
        columns = sorted({condition.column for condition in self._conditions})
        return matching_rows(self._read(shard, columns), self._conditions)

    def _table(self, shard: int) -> pa.Table:
        """The index columns of the selected rows of a shard."""
        with self._lock:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
            info, rows = self.manifest.shards[shard], self._rows_of_shard[shard]
            table = self._read(info, list(dict.fromkeys([*_INDEX_COLUMNS, self._caption_column])))
            table = (table if rows is None else table.take(pa.array(rows))).combine_chunks()
            self._tables[shard] = table
            if len(self._tables) > MAX_SHARDS_KEPT:
                self._tables.popitem(last=False)
            return table

    def _read(self, shard: Shard, columns: list[str]) -> pa.Table:
        try:
            with self.store.open(shard.parquet.path) as file:
                table = pq.read_table(file, columns=columns)
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise RunError(
                f"{self.store.url_of(shard.parquet.path)}: missing or not readable ({error}); "
                f"run `pairmill verify {self.url}`"
            ) from None
        if table.num_rows != shard.num_samples:
            raise RunError(
                f"{self.store.url_of(shard.parquet.path)}: has {table.num_rows} rows, the manifest says "
                f"{shard.num_samples}; run `pairmill verify {self.url}`"
            )
        return table

    def _file(self, shard: int, path: str) -> FileIO:
        """A local tar, opened. A bounded number of them stays open."""
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= MAX_SHARDS_KEPT:
                    self._files.popitem(last=False)
                self._files[shard] = FileIO(self.store.full(path))
            self._files.move_to_end(shard)
            return self._files[shard]


def sample_id(uid: str) -> int:
    """The number that names a sample in random draws: the first 63 bits of its uid."""
    return int(uid[:16], 16) >> 1
