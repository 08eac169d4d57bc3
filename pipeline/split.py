"""A fetch unit in parts, for one that kills its workers: whatever the row is that does it, it is found and recorded.

A part is a unit with `rows`: (first, end) of the planned row group. Joined, parts have the form of the whole.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.reasons import Reason
from pipeline.selection import open_images, read_checked
from pipeline.tar import TarWriter
from pipeline.workfile import WorkFile

if TYPE_CHECKING:
    from pipeline.fetch import FetchStage


def planned_rows(store: Store, unit: Unit) -> pa.Table:
    """The planned rows of a unit, or of a part of one."""
    with store.open(unit.params["path"]) as raw, pq.ParquetFile(raw) as file:
        planned = file.read_row_group(unit.params["group"])
    first, end = unit.params.get("rows", (0, planned.num_rows))
    return planned.slice(first, end - first)


def halves(store: Store, unit: Unit) -> Sequence[Unit]:
    """Two units that together are this one; none of a single row."""
    first, end = unit.params.get("rows", (0, planned_rows(store, unit).num_rows))
    if end - first < 2:
        return []
    middle = (first + end) // 2
    return [
        replace(unit, id=f"{unit.id}{letter}", params={**unit.params, "rows": rows})
        for letter, rows in (("a", (first, middle)), ("b", (middle, end)))
    ]


def join(stage: "FetchStage", parts: Sequence[Marker], output: UnitOutput) -> None:
    """The files of the whole unit from those of its parts, in order."""
    from pipeline.fetch import count_fetched

    tables = []
    with TarWriter(output.path("images.tar")) as tar:
        for part in parts:
            table = read_checked(stage.store, WorkFile.of(part, "rows.parquet"))
            tables.append(_moved(stage.store, table, WorkFile.of(part, "images.tar"), tar))
    joined = pa.concat_tables(tables)
    pq.write_table(joined, output.path("rows.parquet"), compression="zstd")
    output.counts |= count_fetched(joined)


def give_up(stage: "FetchStage", unit: Unit, output: UnitOutput) -> None:
    """The files of a row that is not to be fetched."""
    from pipeline.fetch import count_fetched, with_outcomes

    planned = planned_rows(stage.store, unit)
    detail = "the worker that fetched it was killed each time, as a rule for want of memory"
    outcome = {"status": "dropped", "reason": Reason.WORKER_KILLED.value, "detail": detail, "attempts": 0}
    table = with_outcomes(planned, [outcome] * planned.num_rows)
    with TarWriter(output.path("images.tar")):
        pass
    pq.write_table(table, output.path("rows.parquet"), compression="zstd")
    output.counts |= count_fetched(table)


def _moved(store: Store, table: pa.Table, images: WorkFile, tar: TarWriter) -> pa.Table:
    """A part's rows with their images' places in the whole tar, to which the images are appended."""
    places = table.select(["uid", "image_format", "image_offset", "image_size"]).to_pylist()
    offsets: list[int | None] = [None] * len(places)
    stored = [row for row, place in enumerate(places) if place["image_offset"] is not None]
    with open_images(store, images) as file:
        for row in sorted(stored, key=lambda row: places[row]["image_offset"]):
            place = places[row]
            file.seek(place["image_offset"])
            offsets[row] = tar.add(f"{place['uid']}.{place['image_format']}", file.read(place["image_size"]))
    index = table.schema.get_field_index("image_offset")
    return table.set_column(index, table.schema.field(index), pa.array(offsets, pa.int64()))
