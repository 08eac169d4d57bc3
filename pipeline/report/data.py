"""What a dataset's report is made of: exact counts from markers, and details of a sample of rows.

The plan put the rows in random order, so the first fetch units are a random sample of all of them: histograms, hosts
and pictures are taken from those, and the report's cost does not grow with the dataset.
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.errors import RequestError
from cluster.journal import Journal
from cluster.store import Store
from pipeline.generations import all_markers, record_markers
from pipeline.manifest import Manifest
from pipeline.reasons import Reason, sentence
from pipeline.record import REPEATED_PAIR
from pipeline.selection import read_table

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 200_000
BEFORE, DOWNLOAD, IMAGES, DUPLICATES, BALANCE = PHASES = (
    "before the download",
    "download",
    "rules on images",
    "duplicates",
    "balance",
)
_COUNTED = {"decide": IMAGES, "fetch": DOWNLOAD, "plan-order": BEFORE}
_COLUMNS = (
    "uid",
    "url",
    "caption",
    "num_rows",
    "status",
    "reason",
    "rule",
    "score",
    "threshold",
    "detail",
    "duplicate_of",
    "generation",
    "key",
    "http_status",
    "attempts",
    "size_bytes",
    "original_width",
    "original_height",
    "width",
    "height",
    "sharpness",
    "is_animated",
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the way from all input rows to the kept ones."""

    reason: str
    phase: str
    meaning: str
    num_rows: int
    num_left: int


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The records of the first fetch units.

    units: their ids. starts: where the rows of each begin. is_all: whether there are no further ones.
    """

    rows: pa.Table
    units: tuple[str, ...]
    starts: tuple[int, ...]
    is_all: bool = True

    def place(self, index: int) -> tuple[int, int]:
        """(number of the fetch unit, row in it) of a row."""
        unit = bisect_right(self.starts, index) - 1
        return unit, index - self.starts[unit]

    def row(self, index: int) -> dict[str, Any]:
        """One row as Python values, with the id of its fetch unit as `unit` and its number here as `index`."""
        values: dict[str, Any] = self.rows.slice(index, 1).to_pylist()[0]
        return {**values, "unit": self.units[self.place(index)[0]], "index": index}

    def row_of(self, uid: str) -> dict[str, Any] | None:
        """The row of a uid, if it is in the sample."""
        index = self.rows.column("uid").index(uid).as_py()
        return None if index < 0 else self.row(index)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.rows.column(name).to_pylist()
        return values

    def find(self, status: str, reason: str | None = None) -> list[int]:
        """The numbers of the rows with a status and, if given, a reason."""
        wanted = pc.equal(self.rows.column("status"), status)
        if reason is not None:
            wanted = pc.and_kleene(wanted, pc.equal(self.rows.column("reason"), reason))
        places: list[int] = pc.indices_nonzero(wanted).to_pylist()
        return places

    @property
    def kept(self) -> pa.Table:
        """The rows of samples."""
        return self.rows.filter(pc.field("status") == "kept")


def steps_of(store: Store, manifest: Manifest) -> list[Step]:
    """The drops in the order in which they happen, largest first inside a phase."""
    phase_of = _phases(Journal(store))
    dropped = [
        (PHASES.index(phase_of.get(reason, DUPLICATES)), -number, reason)
        for reason, number in manifest.counts.items()
        if reason != "kept"
    ]
    left, steps = manifest.num_input_rows, []
    for _, negative, reason in sorted(dropped):
        left += negative
        steps.append(
            Step(
                reason=reason,
                phase=phase_of.get(reason, DUPLICATES),
                meaning=meaning(reason),
                num_rows=-negative,
                num_left=left,
            )
        )
    return steps


def meaning(reason: str) -> str:
    """A sentence for a reason of the manifest's counts."""
    if reason == REPEATED_PAIR:
        return "the same URL and caption stand in the lists once more"
    return sentence(reason)


def sample_rows(store: Store, max_rows: int = MAX_ROWS) -> Sampled:
    """The records of the first fetch units, at least one, up to about `max_rows` rows."""
    recorded = record_markers(Journal(store))
    if not recorded:
        raise RequestError(f"{store.url}: a report is made from journal/ and record/, and journal/record/ is not there")
    tables: list[pa.Table] = []
    starts = [0]
    for marker in recorded.values():
        if tables and starts[-1] >= max_rows:
            break
        tables.append(read_record(store, marker.path_of("record.parquet")))
        starts.append(starts[-1] + tables[-1].num_rows)
    units = tuple(recorded)[: len(tables)]
    rows = pa.concat_tables(tables)
    return Sampled(rows=rows, units=units, starts=tuple(starts[:-1]), is_all=len(units) == len(recorded))


def read_record(store: Store, path: str) -> pa.Table:
    """What a report tells of the pairs of one fetch unit."""
    return read_table(store, path, _COLUMNS)


def _phases(journal: Journal) -> dict[str, str]:
    """Which phase each reason belongs to: the first stage whose markers count it."""
    phases: dict[str, str] = {str(Reason.BALANCED_OUT): BALANCE, REPEATED_PAIR: DUPLICATES}
    for stage, phase in _COUNTED.items():
        for marker in all_markers(journal, stage):
            for name in marker.counts:
                if name.startswith("reason:"):
                    phases[name.removeprefix("reason:")] = phase
    return phases
