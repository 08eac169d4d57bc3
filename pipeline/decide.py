"""Stage decide: the rules' verdict on every downloaded row of a fetch unit. No image is read.

decisions.parquet   one row per (downloaded row, rule): row, uid, rule, score, threshold, keep, reason
kept.npy            int32 row numbers that every rule keeps, ascending
keys.bin            `exact.KEY` of the kept rows in hash order, one bucket per dedup partition
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.buckets import write_buckets
from pipeline.duplicates.exact import make_keys, partition_of
from pipeline.rules import Rule, columns_of, passes
from pipeline.selection import column_list, read_checked
from pipeline.workfile import WorkFile

DECISIONS = pa.schema(
    [
        ("row", pa.int32()),
        ("uid", pa.string()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DecideStage:
    """`rows`: every fetch unit's rows.parquet, in unit order."""

    store: Store
    rows: tuple[WorkFile, ...]
    rules: tuple[Rule, ...]
    partitions: int
    name: str = "decide"
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    @staticmethod
    def of(store: Store, fetched: Sequence[Marker], rules: tuple[Rule, ...], partitions: int) -> "DecideStage":
        rows = tuple(WorkFile.of(marker, "rows.parquet") for marker in fetched)
        return DecideStage(store=store, rows=rows, rules=rules, partitions=partitions)

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a unit's file with the unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "rows": ()}

    def units(self) -> Sequence[Unit]:
        return [Unit(id=rows.unit, params={"index": index, "rows": rows}) for index, rows in enumerate(self.rows)]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        wanted = ["uid", "status", "sha256", "num_rows", *columns_of(self.rules)]
        table = read_checked(self.store, unit.params["rows"], list(dict.fromkeys(wanted)))
        downloaded = np.flatnonzero([status == "ok" for status in column_list(table, "status")])
        rows = table.take(pa.array(downloaded, pa.int64()))
        decisions, blamed = decide(rows, downloaded, self.rules)
        pq.write_table(decisions, output.path("decisions.parquet"), compression="zstd")
        is_kept = blamed < 0
        kept = downloaded[is_kept]
        np.save(output.path("kept.npy"), kept.astype(np.int32))
        hashes, uids = column_list(rows, "sha256"), column_list(rows, "uid")
        alive = np.flatnonzero(is_kept)
        keys = make_keys([hashes[i] for i in alive], [uids[i] for i in alive], unit.params["index"], kept.tolist())
        write_buckets(output.path("keys.bin"), keys, partition_of(keys, self.partitions), self.partitions)
        self._count(np.asarray(column_list(rows, "num_rows"), np.int64), blamed, output)
        output.count("kept", len(kept))

    def _count(self, num_rows: NDArray[np.int64], blamed: NDArray[np.int64], output: UnitOutput) -> None:
        output.count("rows", int(num_rows.sum()))
        for index, rule in enumerate(self.rules):
            if number := int(num_rows[blamed == index].sum()):
                output.count(f"reason:{rule.reason}", number)


def decide(rows: pa.Table, numbers: NDArray[np.int64], rules: Sequence[Rule]) -> tuple[pa.Table, NDArray[np.int64]]:
    """Apply every rule to every row.

    numbers: [N] the rows' numbers in their unit.
    Returns the `DECISIONS` table in (row, rule) order, and [N] the index of the first rule that drops each row, -1
    where none does.
    """
    count, uids = len(numbers), column_list(rows, "uid")
    blamed = np.full(count, -1, np.int64)
    tables = []
    for index, rule in enumerate(rules):
        scores = rule.scores(rows)
        keep = passes(rule, scores)
        blamed[(blamed < 0) & ~keep] = index
        columns = [
            pa.array(numbers, pa.int32()),
            pa.array(uids, pa.string()),
            pa.array([rule.name] * count, pa.string()),
            pa.array(scores, pa.float64()),
            pa.array(np.full(count, rule.threshold), pa.float64()),
            pa.array(keep, pa.bool_()),
            pa.array([None if kept else str(rule.reason) for kept in keep], pa.string()),
        ]
        tables.append(pa.table(columns, schema=DECISIONS))
    table = pa.concat_tables([DECISIONS.empty_table(), *tables])
    order = np.argsort(np.tile(np.arange(count), len(rules)), kind="stable")
    return table.take(pa.array(order, pa.int64())), blamed
