"""Captions of duplicates that go along with a sample, as stages hand them on: rows of (unit, row, uid, caption)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from cluster.store import Store
from pipeline.buckets import Records, read_all_buckets, read_bucket, write_all_buckets
from pipeline.selection import Groups

MAX_CAPTIONS = 10
NO_CAPTIONS = pa.schema(
    [("unit", pa.int64()), ("row", pa.int64()), ("uid", pa.string()), ("caption", pa.string())]
).empty_table()


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """Captions of dropped duplicates, by the sample that represents them.

    paths: of each step that dropped duplicates a file for each group, with a bucket per fetch unit.
    """

    paths: tuple[tuple[str, ...], ...]
    groups: Groups

    def of_rows(self, store: Store, index: int, rows: Sequence[int], own: Sequence[str]) -> list[list[str]]:
        """[N] captions for rows of a fetch unit, in the order of their samples' uids; none is the row's own."""
        group = self.groups.of_unit(index)
        first, end = self.groups.range(group)
        kind = np.dtype(np.uint8)
        streams = [read_bucket(store, files[group], index - first, end - first, kind) for files in self.paths]
        found = best_captions(read_captions(streams))
        by_row: dict[int, list[str]] = {}
        for row, caption in zip(found["row"].tolist(), found["caption"].tolist(), strict=True):
            by_row.setdefault(row, []).append(caption)
        others = [
            [other for other in by_row.get(row, []) if other and other != caption]
            for row, caption in zip(rows, own, strict=True)
        ]
        return [captions[:MAX_CAPTIONS] for captions in others]

    def of_group(self, store: Store, group: int) -> pd.DataFrame:
        """All of a group, as (unit, row, uid, caption)."""
        first, end = self.groups.range(group)
        kind = np.dtype(np.uint8)
        files = [read_all_buckets(store, files[group], end - first, kind) for files in self.paths]
        return read_captions([stream for streams in files for stream in streams])


def read_captions(streams: Sequence[Records]) -> pd.DataFrame:
    """Arrow streams of (unit, row, uid, caption), some of which may be empty, as one table."""
    tables = [pa.ipc.open_stream(stream).read_all() for stream in streams if len(stream)]
    found: pd.DataFrame = pa.concat_tables([NO_CAPTIONS, *tables]).to_pandas()
    return found


def best_captions(captions: pd.DataFrame) -> pd.DataFrame:
    """Of each sample the captions of the smallest uids, each once: one more than are kept, as one may be its own.

    Empty ones are none.

    Doing it to parts and then to what is left of them is doing it to all.
    """
    ordered = captions[captions["caption"].fillna("") != ""].sort_values(["unit", "row", "uid"], kind="stable")
    return ordered.drop_duplicates(["unit", "row", "caption"]).groupby(["unit", "row"]).head(MAX_CAPTIONS + 1)


def write_captions(path: Path, captions: pd.DataFrame, buckets: Any, num_buckets: int) -> None:
    """Rows of (unit, row, uid, caption) by bucket, each bucket as an Arrow stream; absent where it is empty."""
    streams = [np.empty(0, np.uint8)] * num_buckets
    order = np.argsort(buckets, kind="stable")
    table = pa.Table.from_pandas(captions.iloc[order], schema=NO_CAPTIONS.schema, preserve_index=False)
    edges = np.searchsorted(np.asarray(buckets)[order], np.arange(num_buckets + 1))
    for bucket in np.flatnonzero(np.diff(edges)).tolist():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(edges[bucket], edges[bucket + 1] - edges[bucket]))
        streams[bucket] = np.frombuffer(sink.getvalue(), np.uint8)
    write_all_buckets(path, streams)
