"""A finished dataset as numbered samples: rows of the shard parquets, image bytes by range from the tars.

Nothing is scanned: a row's parquet says where its image lies in the tar. Parquet files are read when a row of theirs
is first asked for, and a bounded number of them is kept.
"""

import hashlib
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
from training.data.labels import NO_LABEL, label_ids, require_labels
from training.data.order import Ints, batch_at
from training.data.select import matching_rows, parse_conditions, require_column

MAX_SHARDS_KEPT = 512
_INDEX_COLUMNS = ("key", "uid", "image_format", "image_offset", "image_size")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where one sample is, its caption and category. `id` is the first 63 bits of its uid."""

    row: int
    shard: int
    key: str
    uid: str
    id: int
    caption: str
    """Empty if there is none."""
    label: int
    """Number of its class; NO_LABEL if there is none."""
    image_format: str
    image_offset: int
    image_size: int


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The index columns of a shard's selected rows: compact, and quick to read a single row of."""

    texts: tuple[pa.Array, ...]
    """key, uid, image_format."""
    places: NDArray[np.int64]
    """[rows, 2]: image_offset, image_size."""
    captions: pa.Array | None
    labels: NDArray[np.int64] | None


class Dataset:
    """The samples of a dataset that pass `select`, numbered 0 .. len - 1 in shard order. Safe to use from threads."""

    def __init__(
        self,
        dataset: str,
        *,
        select: Sequence[str] = (),
        caption_column: str = "caption",
        label_column: str = "",
        classes: Sequence[str] = (),
        select_key: str = "data.select",
    ) -> None:
        """Open a dataset folder or URL; select_key: what messages call `select`.

        caption_column, label_column: empty for samples without. classes: the names that labels are numbers of.

        Raises RequestError if there is no dataset, it lacks a column that is used, or a condition does not fit one.
        """
        self.store, self.manifest = read_manifest(dataset)
        self.url = self.store.url
        self._conditions = parse_conditions(select, self.manifest.columns, select_key)
        self._caption_column = caption_column
        self._label_column, self._classes = label_column, tuple(classes)
        if caption_column:
            require_column(caption_column, self.manifest.columns, f"data.caption_column={caption_column}")
        if label_column:
            require_labels(label_column, self.manifest.columns, f"data.label_column={label_column}")
        self._rows_of_shard = [self._select(shard) for shard in self.manifest.shards]
        sizes = [shard.num_samples if rows is None else len(rows) for shard, rows in self._shards_and_rows()]
        self._first_row = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._indices: OrderedDict[int, _Index] = OrderedDict()
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """sha256 of what the manifest says; it names every shard's sha256, so equal means equal samples."""
        return hashlib.sha256(self.manifest.to_json()).hexdigest()

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def sample(self, row: int) -> Sample:
        """The sample of a row. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        index, place = self._index(shard), row - int(self._first_row[shard])
        key, uid, image_format = (text[place].as_py() for text in index.texts)
        image_offset, image_size = index.places[place].tolist()
        return Sample(
            row=row,
            shard=shard,
            key=key,
            uid=uid,
            id=sample_id(uid),
            caption="" if index.captions is None else caption_text(index.captions[place].as_py()),
            label=NO_LABEL if index.labels is None else int(index.labels[place]),
            image_format=image_format,
            image_offset=image_offset,
            image_size=image_size,
        )

    def batch_at(self, seed: int, step: int, batch_size: int) -> tuple[Ints, Ints]:
        """(rows [B], epochs [B]) of the global batch of a step; see training/data/order.py."""
        return batch_at(seed, step, batch_size, len(self))

    def dataset_of(self, sample: Sample) -> "Dataset":
        """The dataset that a sample lies in: this one."""
        return self

    def next_row(self, row: int) -> int:
        """The row that stands in for a bad one."""
        return (row + 1) % len(self)

    def captions(self) -> list[str]:
        """The caption of every selected row; none if there is no caption column."""
        return [caption_text(value) for value in self.column(self._caption_column)] if self._caption_column else []

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

    def _index(self, shard: int) -> _Index:
        with self._lock:
            if shard in self._indices:
                self._indices.move_to_end(shard)
                return self._indices[shard]
            index = self._indices[shard] = self._read_index(shard)
            if len(self._indices) > MAX_SHARDS_KEPT:
                self._indices.popitem(last=False)
            return index

    def _read_index(self, shard: int) -> _Index:
        rows = self._rows_of_shard[shard]
        optional = [name for name in (self._caption_column, self._label_column) if name]
        table = self._read(self.manifest.shards[shard], list(dict.fromkeys([*_INDEX_COLUMNS, *optional])))
        table = table if rows is None else table.take(pa.array(rows))
        columns = {name: pa.concat_arrays(table.column(name).chunks) for name in table.column_names}
        return _Index(
            texts=tuple(columns[name] for name in ("key", "uid", "image_format")),
            places=np.stack([columns[name].to_numpy() for name in ("image_offset", "image_size")], axis=1),
            captions=columns[self._caption_column] if self._caption_column else None,
            labels=label_ids(columns[self._label_column], self._classes) if self._label_column else None,
        )

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


def caption_text(value: Any) -> str:
    """A caption column's value as text; an absent one is empty."""
    return "" if value is None else str(value)


def sample_id(uid: str) -> int:
    """The number that names a sample in random draws: the first 63 bits of its uid."""
    return int(uid[:16], 16) >> 1
