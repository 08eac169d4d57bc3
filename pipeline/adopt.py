"""A dataset made of the downloads of another one, its base: decisions are taken anew, and nothing is fetched.

Markers of the base are adopted: copied into the new journal, with outputs named where they lie in the base, of which
nothing is ever written or removed. A repair's fetch units become further units of the new dataset, behind the others:

    00000-00003                a unit of the base's build
    later-0001-00000-00000     one of its first repair, or of pairs that `fetch_missing` fetches

Stage `revisit`, a unit per fetch unit of the base:
    rows.parquet      FETCHED rows with the new plan's verdicts over those of the base. Pairs that a later unit has are
                      not here; pairs that the base had left out before the download, and the new rules do not, have
                      the reason `not_downloaded`, or with `fetch_missing` are not here either, but in
    missing.parquet   PLANNED rows of these pairs
    counts            rows, reason:<reason> as of the fetch stage; downloaded (images), stored (images, also those of
                      pairs that the plan drops), missing (pairs), moved (pairs that are not here)

With it the new dataset's fetch markers are made: these rows, their answers, and the images of the base.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import RequestError, RunError
from cluster.executor import Unit
from cluster.journal import Journal, Marker, OutputFile, UnitOutput, marker_path
from cluster.run import require_run
from cluster.store import Store, is_elsewhere
from pipeline.fetch import count_fetched
from pipeline.generations import num_repairs, stage_name
from pipeline.identity import range_bounds
from pipeline.manifest import Manifest, read_manifest
from pipeline.reasons import Reason
from pipeline.repair import group_records
from pipeline.selection import column_list, read_checked
from pipeline.workfile import WorkFile

READ_STAGE = "plan-read"
MODEL_STAGES = re.compile(r"(score|embed)-.+")
"""Stages whose names tell the model and its settings, with a unit per fetch unit: they are good for the same rows."""
_LATER = re.compile(r"later-(\d+)-")
_VERDICT = ("reason", "rule", "score", "threshold", "detail")
_ANSWER = ("status", *_VERDICT)
_ANSWERS_FILE = "answers.parquet"
_BASE_STAGE = "base-fetch"


@dataclass(frozen=True, kw_only=True)
class BaseUnit:
    """A fetch unit of the base: its id in the new dataset, its marker, and files with later tries of its pairs."""

    id: str
    marker: Marker
    later: tuple[WorkFile, ...] = ()

    @property
    def rows(self) -> WorkFile:
        # Not of the stage `fetch`: there the new dataset has rows of its own.
        return replace(WorkFile.of(self.marker, "rows.parquet"), stage=_BASE_STAGE)

    @property
    def answers(self) -> WorkFile | None:
        """None where the rows themselves are as the download left them."""
        if all(output.name != _ANSWERS_FILE for output in self.marker.outputs):
            return None
        return replace(WorkFile.of(self.marker, _ANSWERS_FILE), stage=_BASE_STAGE)


@dataclass(frozen=True, kw_only=True)
class Base:
    """A finished dataset whose downloads are used."""

    store: Store
    manifest: Manifest
    rows_per_unit: int

    @staticmethod
    def of(dataset: str) -> "Base":
        """Open it. RequestError when it is not finished, or what it has downloaded is not there any more."""
        store, manifest = read_manifest(dataset)
        _, record = require_run(dataset, "build")
        if num_repairs(Journal(store)) > len(manifest.repairs):
            raise RequestError(
                f"{store.url}: a repair of it was interrupted; run `pairmill repair {store.url}` first, which ends it"
            )
        base = Base(store=store, manifest=manifest, rows_per_unit=int(record["config"]["plan"]["rows_per_unit"]))
        base._require_work()
        return base

    def units(self) -> list[BaseUnit]:
        """Its fetch units and those of its repairs, in the new dataset's order."""
        journal = Journal(self.store)
        units: list[BaseUnit] = []
        later: dict[str, list[tuple[int, WorkFile]]] = defaultdict(list)
        home: dict[str, list[str]] = {}
        first = self._adopted_before(journal)
        for number in range(num_repairs(journal) + 1):
            markers = self._markers(journal, stage_name(number, "fetch"))
            groups = group_records(journal, number, self.rows_per_unit) if number else []
            for name, marker in markers.items():
                unit_id = f"later-{first + number:04}-{name}" if number else name
                records = [record.unit for record in groups[int(name.partition("-")[0])]] if number else [name]
                rows = replace(WorkFile.of(marker, "rows.parquet"), stage=_BASE_STAGE, unit=unit_id)
                for record in records if number else ():
                    later[record].append((number, rows))
                home[unit_id] = records
                units.append(BaseUnit(id=unit_id, marker=replace(marker, unit=unit_id)))
        return [self._with_later(unit, home[unit.id], later) for unit in sorted(units, key=lambda unit: unit.id)]

    def columns(self) -> list[str]:
        """The columns of the planned rows."""
        first = next(iter(Journal(self.store).markers(READ_STAGE).values()))
        with self.store.open(first.path_of("rows.parquet")) as raw, pq.ParquetFile(raw) as file:
            return list(file.schema_arrow.names)

    def adopt_lists(self, journal: Journal) -> dict[str, Marker]:
        """The markers of what was read: the lists are not looked at again."""
        markers = self._markers(Journal(self.store), READ_STAGE)
        _copy(journal, READ_STAGE, markers)
        return markers

    def adopt_scores(self, journal: Journal, revisited: Mapping[str, Marker]) -> None:
        """What models said of images, for units whose rows stand where they stood and of which they saw all images.

        A base that was itself curated has not asked them about what its own rules had dropped.
        """
        theirs = Journal(self.store)
        names = {entry.path.split("/")[1] for entry in self.store.find("journal") if entry.path.count("/") == 2}
        whole = {unit: marker.counts.get("stored") for unit, marker in revisited.items() if not marker.counts["moved"]}
        for stage in sorted(name for name in names if MODEL_STAGES.fullmatch(name)):
            markers = self._markers(theirs, stage)
            seen = {unit: marker for unit, marker in markers.items() if whole.get(unit) == marker.counts["images"]}
            _copy(journal, stage, seen)

    def next_number(self) -> int:
        """The number of units of the new dataset that are neither the base's nor of its repairs."""
        journal = Journal(self.store)
        return self._adopted_before(journal) + num_repairs(journal) + 1

    def _with_later(
        self, unit: BaseUnit, records: Sequence[str], later: Mapping[str, Sequence[tuple[int, WorkFile]]]
    ) -> BaseUnit:
        own = next((n for record in records for n, rows in later.get(record, ()) if rows.unit == unit.id), 0)
        tries = {rows.path: rows for record in records for number, rows in later.get(record, ()) if number > own}
        return replace(unit, later=tuple(tries.values()))

    def _markers(self, journal: Journal, stage: str) -> dict[str, Marker]:
        """Markers whose outputs are named so that other stores of the same file system find them."""
        return {
            unit: replace(
                marker,
                outputs=tuple(replace(output, path=self.store.url_of(output.path)) for output in marker.outputs),
                inputs=None,
            )
            for unit, marker in journal.markers(stage).items()
        }

    def _adopted_before(self, journal: Journal) -> int:
        """The largest number of later units that the base itself has adopted or fetched."""
        numbers = [int(found[1]) for unit in journal.markers("fetch") if (found := _LATER.match(unit))]
        return max(numbers, default=0)

    def _is_there(self, output: OutputFile, sizes: Mapping[str, int]) -> bool:
        if is_elsewhere(output.path):  # in the base of the base
            return self.store.exists(output.path)
        return sizes.get(output.path) == output.size_bytes

    def _require_work(self) -> None:
        """RequestError unless every output that is needed is there, with its size."""
        journal = Journal(self.store)
        stages = [READ_STAGE, *(stage_name(number, "fetch") for number in range(num_repairs(journal) + 1))]
        for stage in stages:
            outputs = [output for marker in journal.markers(stage).values() for output in marker.outputs]
            folders = {"/".join(o.path.split("/")[:2]) for o in outputs if not is_elsewhere(o.path)}
            found = [entry for folder in sorted(folders) for entry in self.store.find(folder)]
            sizes = {entry.path: entry.size_bytes for entry in found}
            missing = [output.path for output in outputs if not self._is_there(output, sizes)]
            if missing or (not outputs and stage in (READ_STAGE, "fetch")):
                what = self.store.url_of(missing[0] if missing else f"work/{stage}")
                raise RequestError(
                    f"{what}: is missing or cut short: what {self.store.url} has downloaded (its work/ and journal/) "
                    "is not whole, so its decisions cannot be taken again; its samples can be imported into "
                    f"a new dataset: pairmill build input={self.store.url} output=NEW"
                )


@dataclass(frozen=True, kw_only=True)
class RevisitStage:
    """Stage `revisit`. planned: rows.parquet of every range of the new plan, in order."""

    store: Store
    units_of_base: tuple[BaseUnit, ...]
    planned: tuple[str, ...]
    fetch_missing: bool
    name: str = "revisit"
    num_cpus: float = 1.0
    memory_bytes: int = 512 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "units_of_base": ()}

    def units(self) -> list[Unit]:
        return [
            Unit(id=unit.id, params={"rows": unit.rows, "answers": unit.answers, "later": unit.later})  # no images
            for unit in self.units_of_base
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        rows = read_checked(self.store, unit.params["rows"])
        if answers := unit.params["answers"]:
            rows = _with_columns(rows, read_checked(self.store, answers, _ANSWER))
        later = {
            uid for file in unit.params["later"] for uid in column_list(read_checked(self.store, file, ["uid"]), "uid")
        }
        here = rows.filter(pa.array([uid not in later for uid in column_list(rows, "uid")], pa.bool_()))
        planned = self._planned(here)
        table = overlaid(here, planned)
        is_missing = pc.fill_null(pc.equal(table["reason"], Reason.NOT_DOWNLOADED.value), False)
        missing = planned.filter(is_missing)
        answers = here.select(_ANSWER)
        if self.fetch_missing:
            table, answers = (each.filter(pc.invert(is_missing)) for each in (table, answers))
        pq.write_table(table, output.path("rows.parquet"), compression="zstd")
        pq.write_table(answers, output.path(_ANSWERS_FILE), compression="zstd")
        pq.write_table(missing, output.path("missing.parquet"), compression="zstd")
        counts = count_fetched(table)
        for name in ("rows", *(name for name in counts if name.startswith("reason:"))):
            output.count(name, counts.get(name, 0))
        output.count("downloaded", counts.get("images", 0))  # not by us: `images` are what a command has fetched
        output.count("stored", pc.sum(pc.equal(answers["status"], "ok")).as_py() or 0)
        output.count("missing", missing.num_rows)
        output.count("moved", rows.num_rows - table.num_rows)

    def _planned(self, rows: pa.Table) -> pa.Table:
        """The new plan's rows of these pairs, in their order. RunError when it does not have one of them."""
        found = [self._of_range(index, rows) for index in self._ranges(rows)]
        table = pa.concat_tables(found) if found else self._empty()
        place = {uid: index for index, uid in enumerate(column_list(table, "uid"))}
        try:
            return table.take(pa.array([place[uid] for uid in column_list(rows, "uid")], pa.int64()))
        except KeyError as error:
            raise RunError(f"uid {error.args[0]}: the base has downloaded it, but its lists do not have it") from None

    def _ranges(self, rows: pa.Table) -> list[int]:
        """The ranges of the plan in which these pairs lie."""
        starts = np.array([first for first, _ in range_bounds(len(self.planned))], np.uint64)
        found: list[int] = np.unique(np.searchsorted(starts, rows["order"].to_numpy(), side="right") - 1).tolist()
        return found

    def _of_range(self, index: int, rows: pa.Table) -> pa.Table:
        lowest, highest = (int(value) for value in (pc.min(rows["order"]).as_py(), pc.max(rows["order"]).as_py()))
        with self.store.open(self.planned[index]) as raw, pq.ParquetFile(raw) as file:
            column = file.schema_arrow.get_field_index("order")
            groups = []
            for group in range(file.num_row_groups):
                seen = file.metadata.row_group(group).column(column).statistics
                if seen.min <= highest and seen.max >= lowest:
                    groups.append(group)
            return file.read_row_groups(groups) if groups else file.schema_arrow.empty_table()

    def _empty(self) -> pa.Table:
        with self.store.open(self.planned[0]) as raw, pq.ParquetFile(raw) as file:
            return file.schema_arrow.empty_table()


def overlaid(rows: pa.Table, planned: pa.Table) -> pa.Table:
    """FETCHED rows of the base with the verdicts of the new plan, whose rows are in the same order."""
    unasked = pc.and_(pc.equal(rows["attempts"], 0), pc.is_null(rows["received_bytes"]))
    was_tried = pc.fill_null(pc.equal(rows["reason"], Reason.WORKER_KILLED.value), False)  # nobody knows how often
    left_out = pc.and_(pc.equal(rows["status"], "dropped"), pc.and_not(unasked, was_tried))
    is_planned = pc.is_valid(planned["reason"])
    before = pc.binary_join_element_wise("left out before:", pc.fill_null(rows["reason"], ""), " ")
    instead = {"reason": pa.scalar(Reason.NOT_DOWNLOADED.value), "detail": before}
    columns = {
        name: pc.if_else(
            is_planned,
            planned[name],
            pc.if_else(left_out, instead.get(name, pa.scalar(None, rows.schema.field(name).type)), rows[name]),
        )
        for name in _VERDICT
    }
    columns["status"] = pc.if_else(pc.or_(is_planned, left_out), "dropped", rows["status"])
    return _with_columns(rows, pa.table(columns)).combine_chunks()


def _with_columns(rows: pa.Table, columns: pa.Table) -> pa.Table:
    """The rows with these in the place of their own of the same names."""
    for name in columns.column_names:
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), columns[name])
    return rows


@dataclass(frozen=True, kw_only=True)
class MissingStage:
    """Stage `plan-missing`: the pairs that are to be fetched now, in the form of `plan-order`; each group a unit."""

    store: Store
    groups: tuple[tuple[WorkFile, ...], ...]
    number: int
    name: str = "plan-missing"
    num_cpus: float = 1.0
    memory_bytes: int = 256 * 2**20

    @staticmethod
    def of(store: Store, revisited: Mapping[str, Marker], number: int, rows_per_unit: int) -> "MissingStage":
        """Group what is missing, together as many pairs as a fetch unit has."""
        groups: list[list[WorkFile]] = []
        room = 0
        for marker in revisited.values():
            if missing := marker.counts.get("missing", 0):
                if missing > room:
                    groups.append([])
                    room = rows_per_unit
                groups[-1].append(WorkFile.of(marker, "missing.parquet"))
                room -= missing
        return MissingStage(store=store, groups=tuple(tuple(group) for group in groups), number=number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "groups": ()}

    def units(self) -> list[Unit]:
        return [
            Unit(id=f"later-{self.number:04}-{index:05}", params={"files": files})
            for index, files in enumerate(self.groups)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        table = pa.concat_tables([read_checked(self.store, file) for file in unit.params["files"]])
        pq.write_table(table, output.path("rows.parquet"), row_group_size=max(1, table.num_rows), compression="zstd")
        output.count("rows", int(pc.sum(table["num_rows"]).as_py() or 0))
        output.count("pairs", table.num_rows)
        output.count("units", 1)


def fetch_markers(journal: Journal, units: Sequence[BaseUnit], revisited: Mapping[str, Marker]) -> dict[str, Marker]:
    """The new dataset's fetch markers of these units, written down: new rows, and images where they lie in the base."""
    made = {}
    for unit in units:
        marker = revisited[unit.id]
        rows = [output for output in marker.outputs if output.name in ("rows.parquet", _ANSWERS_FILE)]
        images = next(output for output in unit.marker.outputs if output.name == "images.tar")
        counts = {name: number for name, number in marker.counts.items() if name.startswith(("rows", "reason:"))}
        counts["images"] = marker.counts["downloaded"]
        made[unit.id] = replace(marker, stage="fetch", outputs=(images, *rows), counts=counts, inputs=None, seconds=0.0)
    _copy(journal, "fetch", made)
    return made


def _copy(journal: Journal, stage: str, markers: Mapping[str, Marker]) -> None:
    """Put markers of another journal, or made here, into this one; those of an older making are replaced."""
    there = journal.markers(stage)

    def put(marker: Marker) -> None:
        if marker.unit not in there or there[marker.unit].outputs != marker.outputs:
            journal.store.write_bytes(marker_path(stage, marker.unit), marker.to_json())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, markers.values()))
    if markers:
        journal.announce(stage, list(markers))
