"""What a repair does beside the stages of a build: which pairs to try again, who is in the dataset, what changes.

Stage `plan`, a unit per fetch unit to be: rows.parquet, the PLANNED rows of the pairs that failed transiently, from the
    records; counts rows, pairs, units (1)
Stage `record`, a unit per record that changes: `record/00000.parquet` with the new verdicts in the place of the old
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import RunError
from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.plan import PLANNED
from pipeline.reasons import is_transient
from pipeline.record import count_rows
from pipeline.selection import column_list, extra_columns, read_checked
from pipeline.workfile import WorkFile

_VERDICT = ("reason", "rule", "score", "threshold", "detail")


@dataclass(frozen=True, kw_only=True)
class PlanStage:
    """`groups`: the records of every fetch unit to be."""

    store: Store
    groups: tuple[tuple[WorkFile, ...], ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "groups": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=f"{index:05}", params={"records": records}) for index, records in enumerate(self.groups)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        tables = [_to_try_again(read_checked(self.store, record)) for record in unit.params["records"]]
        table = pa.concat_tables(tables)
        pq.write_table(table, output.path("rows.parquet"), row_group_size=max(1, table.num_rows), compression="zstd")
        output.count("rows", int(pc.sum(table["num_rows"]).as_py() or 0))
        output.count("pairs", table.num_rows)
        output.count("units", 1)


def _to_try_again(record: pa.Table) -> pa.Table:
    """The PLANNED rows of the pairs whose reason is transient, as before their first download."""
    is_wanted = [reason is not None and is_transient(reason) for reason in column_list(record, "reason")]
    rows = record.filter(pa.array(is_wanted, pa.bool_()))
    columns = {
        field.name: pa.nulls(rows.num_rows, field.type) if field.name in _VERDICT else rows[field.name]
        for field in PLANNED
    }
    return pa.table(columns | {name: rows[name] for name in extra_columns(record.schema)})


@dataclass(frozen=True, kw_only=True)
class Change:
    """A record that changes: the marker that vouched for it so far, and the verdicts among which its new rows are."""

    before: Marker
    verdicts: WorkFile


@dataclass(frozen=True, kw_only=True)
class UpdateStage:
    """Records with their new verdicts. May be stopped anywhere: doing it to a record twice is doing it once."""

    store: Store
    changes: tuple[Change, ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "changes": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=change.before.unit, params={"change": change}) for change in self.changes]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        change: Change = unit.params["change"]
        record = WorkFile.of(change.before, "record.parquet")
        data = self.store.read_bytes(record.path)
        table = overlay(pq.read_table(pa.BufferReader(data)), read_checked(self.store, change.verdicts))
        path = output.path("record.parquet", publish_as=record.path)
        pq.write_table(table, path, compression="zstd")
        if hashlib.sha256(data).hexdigest() != record.sha256 and path.read_bytes() != data:
            raise RunError(f"{self.store.url_of(record.path)} is damaged; `pairmill verify` says what to do")
        for name, number in count_rows(column_list(table, "reason"), column_list(table, "num_rows")).items():
            output.count(name, number)


def overlay(record: pa.Table, verdicts: pa.Table) -> pa.Table:
    """The record, those of its rows that have a new verdict replaced by it."""
    newest = {uid: record.num_rows + row for row, uid in enumerate(column_list(verdicts, "uid"))}
    rows = [newest.get(uid, row) for row, uid in enumerate(column_list(record, "uid"))]
    both = pa.concat_tables([record, verdicts], promote_options="default")
    return both.take(pa.array(rows, pa.int64())).combine_chunks()
