"""Stage record: one row for every distinct input pair with what became of it, in the plan's order.

    record/00000.parquet   published; the fetch stage's columns with the final status, and
        status         "kept" or "dropped"; reason, rule, score and threshold are those of the stage that dropped it
        duplicate_of   uid of the sample that represents a duplicate
        shard, key     where the sample is, for kept pairs
        generation     0, or the number of the repair that tried the pair last
    counts             rows (input rows), pairs, kept, repeated_pair, reason:<reason> (input rows)

Counts are of input rows: `kept` + `repeated_pair` (further rows of kept pairs) + the reasons = rows.
The files hold timings, so their hashes are in the journal and not in the manifest.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.pack import sample_key
from pipeline.selection import (
    DecidedUnit,
    Drops,
    column_list,
    extra_columns,
    read_checked,
    representative_uid,
    survivors,
)

REPEATED_PAIR = "repeated_pair"
_VERDICT = ("status", "reason", "rule", "score", "threshold", "detail")
_IN_TAR = ("image_offset", "image_size")


@dataclass(frozen=True, kw_only=True)
class RecordStage:
    """`num_kept`: survivors of every unit, in unit order.

    A repair's samples begin with shard `first_shard`; its rows are not published, see `pipeline.repair`.
    """

    store: Store
    decided: tuple[DecidedUnit, ...]
    num_kept: tuple[int, ...]
    drops: tuple[Drops, ...]
    samples_per_shard: int
    first_shard: int = 0
    generation: int = 0
    name: str = "record"
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """Workers get what they need with each unit."""
        return {**self.__dict__, "decided": (), "num_kept": ()}

    def units(self) -> Sequence[Unit]:
        starts = np.cumsum([self.first_shard * self.samples_per_shard, *self.num_kept]).tolist()
        return [
            Unit(id=unit.id, params={"unit": unit, "start": start})
            for unit, start in zip(self.decided, starts, strict=False)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        decided: DecidedUnit = unit.params["unit"]
        table = read_checked(self.store, decided.rows)
        verdicts = self._verdicts(table, decided, unit.params["start"])
        extra = extra_columns(table.schema)
        own = [name for name in table.schema.names if name not in (*_VERDICT, *_IN_TAR, *extra)]
        columns = (
            {name: table.column(name) for name in own[:5]}
            | verdicts
            | {name: table.column(name) for name in (*own[5:], *extra)}
        )
        path = output.path("record.parquet", publish_as=None if self.generation else record_path(decided.index))
        pq.write_table(pa.table(columns), path, compression="zstd")
        for name, number in count_rows(verdicts["reason"].to_pylist(), column_list(table, "num_rows")).items():
            output.count(name, number)

    def _verdicts(self, table: pa.Table, decided: DecidedUnit, start: int) -> dict[str, pa.Array]:
        """The columns that the fetch stage's verdict columns become."""
        values: dict[str, list[Any]] = {name: column_list(table, name) for name in _VERDICT}
        for name in ("duplicate_of", "shard", "key"):
            values[name] = [None] * table.num_rows
        fetched = column_list(table, "detail")
        failed = read_checked(self.store, decided.decisions).filter(pc.field("keep") == pc.scalar(False))
        for decision in reversed(failed.to_pylist()):  # the first rule that dropped a row is written last
            row = decision["row"]
            for name in _VERDICT[1:]:
                values[name][row] = decision[name]
            if decision["detail"] is None:
                values["detail"][row] = fetched[row]
        for step in self.drops:
            for drop in step.of_unit(self.store, decided.index):
                row, score = drop["row"], float(drop["score"])
                values["reason"][row], values["rule"][row] = str(step.reason), step.rule
                values["score"][row] = None if np.isnan(score) else score
                values["threshold"][row] = step.threshold
                values["duplicate_of"][row] = representative_uid(drop)
        for place, row in enumerate(survivors(self.store, decided, self.drops).tolist()):
            values["shard"][row], values["key"][row] = sample_key(start + place, self.samples_per_shard)
        values["status"] = ["dropped" if reason else "kept" for reason in values["reason"]]
        values["generation"] = [self.generation] * table.num_rows
        types = {"score": pa.float64(), "threshold": pa.float64(), "shard": pa.int32(), "generation": pa.int32()}
        return {name: pa.array(column, types.get(name, pa.string())) for name, column in values.items()}


def count_rows(reasons: Sequence[str | None], num_rows: Sequence[int]) -> dict[str, int]:
    """Input rows by what became of them; see the module's counts."""
    counts: Counter[str] = Counter({"rows": 0, "pairs": 0, "kept": 0, REPEATED_PAIR: 0})
    for reason, number in zip(reasons, num_rows, strict=True):
        counts["rows"] += number
        counts["pairs"] += 1
        if reason is None:
            counts["kept"] += 1
            counts[REPEATED_PAIR] += number - 1
        else:
            counts[f"reason:{reason}"] += number
    return dict(counts)


def total_counts(recorded: Mapping[str, Marker]) -> dict[str, int]:
    """The manifest's counts: {"kept": n, "repeated_pair": n, reason: n, ...}, which sum to the input rows."""
    total: Counter[str] = Counter()
    for marker in recorded.values():
        total.update(marker.counts)
    counts = {"kept": total["kept"], REPEATED_PAIR: total[REPEATED_PAIR]}
    reasons = {name.removeprefix("reason:"): number for name, number in total.items() if name.startswith("reason:")}
    return {name: number for name, number in sorted((counts | reasons).items()) if number or name == "kept"}


def record_path(index: int) -> str:
    """Public name of the record of fetch unit number `index`."""
    return f"record/{index:05}.parquet"
