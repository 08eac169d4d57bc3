"""Stage decide: the rules' verdict on every downloaded row of a fetch unit. No image is read.

decisions.parquet   one row per (rule, downloaded row), see `rules.decisions.DECISIONS`
kept.npy            int32 row numbers that every rule keeps, ascending
facts.bin           `FACTS` of these rows, in their order: as many fields as the steps of curation need
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.duplicates.facts import COLUMNS, FACTS, OPTIONAL_COLUMNS, facts_of
from pipeline.mixture import without_caption
from pipeline.readers.schema import LABEL
from pipeline.rules.base import Rule
from pipeline.rules.chosen import columns_of
from pipeline.rules.decisions import Judged, judge
from pipeline.rules.measured import Measured, with_measured
from pipeline.selection import column_list, read_checked
from pipeline.workfile import WorkFile


@dataclass(frozen=True, kw_only=True)
class DecideStage:
    """`rows`: every fetch unit's rows.parquet, in unit order. `measured`: further columns that rules may read."""

    store: Store
    rows: tuple[WorkFile, ...]
    rules: tuple[Rule, ...]
    measured: tuple[Measured, ...] = ()
    priorities: Mapping[str, int] = field(default_factory=dict)
    """of sources, see `facts_of`"""
    has_labels: bool = False
    """whether there are pairs with a category and no caption, see `pipeline.mixture`"""
    facts_dtype: np.dtype[Any] = FACTS
    """the fields that the steps of curation need, see `needed_facts`"""
    name: str = "decide"
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    @staticmethod
    def of(
        store: Store,
        fetched: Sequence[Marker],
        rules: tuple[Rule, ...],
        measured: tuple[Measured, ...] = (),
        priorities: Mapping[str, int] | None = None,
        has_labels: bool = False,
        facts_dtype: np.dtype[Any] = FACTS,
    ) -> "DecideStage":
        rows = tuple(WorkFile.of(marker, "rows.parquet") for marker in fetched)
        return DecideStage(
            store=store,
            rows=rows,
            rules=rules,
            measured=measured,
            priorities=priorities or {},
            has_labels=has_labels,
            facts_dtype=facts_dtype,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a unit's files with the unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "rows": (), "measured": ()}

    def units(self) -> Sequence[Unit]:
        return [
            Unit(
                id=rows.unit,
                params={
                    "index": index,
                    "rows": rows,
                    "measured": {measured.column: measured.files[index] for measured in self.measured},
                },
            )
            for index, rows in enumerate(self.rows)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        measured = {column: read_checked(self.store, file) for column, file in unit.params["measured"].items()}
        added = {name for column in measured for name in (column, f"{column}_detail")}
        labels = [LABEL] if self.has_labels else []
        wanted = dict.fromkeys(["status", "num_rows", *COLUMNS, *columns_of(self.rules), *labels])
        names = [name for name in wanted if name not in added]
        table = read_checked(self.store, unit.params["rows"], names, OPTIONAL_COLUMNS)
        downloaded = np.flatnonzero([status == "ok" for status in column_list(table, "status")])
        rows = table.take(pa.array(downloaded, pa.int64()))
        spared = without_caption(rows) if self.has_labels else None
        judged = judge(with_measured(rows, downloaded, measured), downloaded, self.rules, spared)
        pq.write_table(judged.decisions, output.path("decisions.parquet"), compression="zstd")
        is_kept = judged.blamed < 0
        kept = downloaded[is_kept]
        np.save(output.path("kept.npy"), kept.astype(np.int32))
        facts = facts_of(rows.filter(pa.array(is_kept)), unit.params["index"], kept, self.priorities, self.facts_dtype)
        facts.tofile(output.path("facts.bin"))
        self._count(np.asarray(column_list(rows, "num_rows"), np.int64), judged, output)
        output.count("kept", len(kept))

    def _count(self, num_rows: NDArray[np.int64], judged: Judged, output: UnitOutput) -> None:
        output.count("rows", int(num_rows.sum()))
        for index, rule in enumerate(self.rules):
            if number := int(num_rows[judged.blamed == index].sum()):
                output.count(f"reason:{rule.reason}", number)
        judged.count(output)
