"""The plan: every input row in a seeded random order, identical pairs collapsed, cut into fetch units.

Stage `plan-read`, one unit per source file (unit id `00000-<hash of name and size>`, ... in source order):
    rows.parquet   sorted runs of PLANNED rows (below, with `order`), a bounded number of rows in memory
    source.json    {"path", "size_bytes", "sha256", "num_rows"}: the entry of `Manifest.sources`
    stamp.txt      the file's stamp when it was listed: tells whether its content has to be compared on resume
    images.tar     images that an imported table holds itself, each where `import_offset` says; else not there
    counts         rows (input rows), pairs (rows written), text_bytes (of all text in the input rows),
                   hash_of_stored (imported rows without the sha256 of the download)
Stage `plan-order`, one unit per range of the 64-bit order (unit id `00000`, ...):
    rows.parquet   PLANNED rows of the range in (order, uid) order; each row group is one fetch unit
    decisions.parquet   the verdicts of the rules that need no image (`rules.decisions.DECISIONS`), a row group a unit
    counts         rows (input rows), pairs (distinct pairs = rows in the file), units (row groups),
                   reason:<reason> (input rows that are dropped before any download), those of `Judged.count`,
                   pairs:<reason> (pairs dropped by no rule of the group curate)

PLANNED columns
    uid        string   32 hex digits, 128-bit hash of (url, caption)
    order      uint64   hash of (uid, seed); the whole dataset is in (order, uid) order, unit after unit
    url        string   as in the list, stripped; null when there is none
    caption    string   never null, "" when there is none
    num_rows   int64    input rows that this pair stands for, >= 1; sums to the number of input rows
    reason     string   why it will not be downloaded (`missing_url`, `invalid_url`, `unsupported_scheme`,
                        `unreadable_row`, `caption_too_short`, ...: see pipeline.reasons); null: to be fetched
    rule       string   the configuration key that decided (`curate.min_caption_chars`), null if none did
    score      double   what the rule measured
    threshold  double   what it was compared with
    detail     string   a few words for people, such as the language detected
    then the list's extra columns with their types; those that bear a name of ours are renamed `source_<name>`

The plan depends on the rows, the seed and the plan.* settings only: not on how rows are spread over files, their
order, or the number of workers. (Extra columns of identical pairs are those of the first row of the first source.)
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import RequestError
from cluster.executor import Unit
from cluster.journal import Journal, Marker, UnitOutput
from cluster.store import Store
from pipeline.against import num_known, runs_of
from pipeline.config import PLAIN_SOURCE, BuildConfig
from pipeline.identity import keys_of_text, order_of, range_bounds, uid_keys, uid_text
from pipeline.mixture import has_labels, source_weights, with_shares, without_caption, without_earlier
from pipeline.readers import (
    IMPORT,
    Group,
    ListSchema,
    Source,
    list_schemas,
    list_sources,
    local_copy,
    read_imported,
    read_rows,
)
from pipeline.readers.schema import HASH_OF_STORED
from pipeline.reasons import Reason
from pipeline.rules.base import Rule
from pipeline.rules.captions import CAPTION_PAIRS
from pipeline.rules.chosen import columns_of, text_rules
from pipeline.rules.config import CurateConfig
from pipeline.rules.decisions import DECISIONS
from pipeline.rules.frequency import Frequencies, count_captions, with_pairs
from pipeline.rules.lists import copy_lists
from pipeline.rules.screen import screen
from pipeline.runs import read_range
from pipeline.tar import TarWriter
from pipeline.urls import url_problems

RUN_ROWS = 262_144
RUN_BYTES = 256 * 2**20
RANGE_TEXT_BYTES = 2**30
"""A range holds about this much text at most: Arrow's strings end at 2 GiB a column."""
READ_GROUP_ROWS = 8_192
"""Rows in a row group of a sorted run: a range task reads little beyond its range."""
BYTES_PER_ROW = 2_048
"""Memory declared for a row that is sorted: about 0.3 KB of data, held up to four times."""

PLANNED = pa.schema(
    [
        pa.field("uid", pa.string()),
        pa.field("order", pa.uint64()),
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("num_rows", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("rule", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("detail", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ReadStage:
    """Stage `plan-read`: a source file's rows, with identity and place, in sorted runs."""

    sources: tuple[Source, ...]
    schemas: tuple[ListSchema, ...]
    seed: int
    name: str = "plan-read"
    num_cpus: float = 1.0
    memory_bytes: int = RUN_BYTES * 4

    @staticmethod
    def of(config: BuildConfig) -> "ReadStage":
        """Look at the lists. Raises RequestError when one is missing, unreadable or lacks a column."""
        sources, groups = list_groups(config)
        return ReadStage(sources=sources, schemas=list_schemas(sources, groups, config.read), seed=config.seed)

    def units(self) -> list[Unit]:
        return [
            Unit(id=f"{index:05d}-{_fingerprint(source)}", params={"source": index})
            for index, source in enumerate(self.sources)
        ]

    def columns(self) -> list[str]:
        """The columns of the planned rows."""
        return list(self._planned().names)

    def refuse_changed(self, journal: Journal) -> None:
        """Raise RequestError when an earlier run of the same build read other files than there are now.

        A file of the same name and size is read again only if it may have been written to since.
        """
        markers = journal.markers(self.name)
        _refuse_others(markers, [unit.id for unit in self.units()])
        with ThreadPoolExecutor(16) as pool:
            done = [
                (source, markers[unit.id])
                for source, unit in zip(self.sources, self.units(), strict=True)
                if unit.id in markers
            ]
            for source, is_same in pool.map(lambda item: (item[0], _is_same(journal.store, *item)), done):
                if not is_same:
                    raise RequestError(
                        f"{source.name}: its content is not what this run began with (same size, other sha256); "
                        "put the file back, or choose another output"
                    )

    def run(self, unit: Unit, output: UnitOutput) -> None:
        source = self.sources[unit.params["source"]]
        num_rows = num_pairs = text_bytes = 0
        with (
            local_copy(source) as (path, sha256),
            _writer(output.path("rows.parquet"), self._planned()) as writer,
            contextlib.ExitStack() as stack,
        ):
            images = None
            if source.format == "images":
                images = stack.enter_context(TarWriter(output.path("images.tar")))
            for run in _runs(self._plan(batch) for batch in self._rows(path, source, sha256, images)):
                ordered = collapse(run)
                writer.write_table(ordered, row_group_size=READ_GROUP_ROWS)
                output.count("hash_of_stored", _num_without_hash(run))
                num_rows += run.num_rows
                num_pairs += ordered.num_rows
                text_bytes += _text_bytes(run)
        entry = {"path": source.name, "size_bytes": source.size_bytes, "sha256": sha256, "num_rows": num_rows}
        output.path("source.json").write_text(json.dumps(entry, indent=1, sort_keys=True))
        output.path("stamp.txt").write_text(source.stamp)
        output.count("rows", num_rows)
        output.count("pairs", num_pairs)
        output.count("text_bytes", text_bytes)

    def _rows(self, path: Path, source: Source, sha256: str, images: TarWriter | None) -> Iterator[pa.RecordBatch]:
        schema = self.schemas[source.group]
        if source.is_import:
            return read_imported(path, source, schema, sha256, images)
        return read_rows(path, source, schema)

    def _planned(self) -> pa.Schema:
        has_imports = any(source.is_import for source in self.sources)
        return pa.schema([*PLANNED, *self.schemas[0].fields(), *(IMPORT if has_imports else ())])

    def _plan(self, batch: pa.RecordBatch) -> pa.Table:
        """Rows as they were read -> PLANNED rows, one for each."""
        urls = pc.utf8_trim_whitespace(batch.column("url"))
        urls = pc.if_else(pc.equal(urls, ""), pa.scalar(None, pa.string()), urls)
        is_import = "import_file" in batch.schema.names
        none = len(urls)
        if is_import:
            keys = keys_of_text(batch.column("uid"))
            reasons = details = pa.nulls(none, pa.string())
        else:
            is_unreadable = batch.column("reason").is_valid()
            keys = uid_keys(pc.if_else(is_unreadable, Reason.UNREADABLE_ROW.value, urls), batch.column("caption"))
            reasons, details = (pa.array(each, pa.string()) for each in url_problems(urls))
        columns = {
            "uid": uid_text(keys),
            "order": pa.array(order_of(keys, self.seed)),
            "url": urls,
            "caption": batch.column("caption"),
            "num_rows": pa.array(np.ones(none, np.int64)),
            "reason": pc.coalesce(batch.column("reason"), reasons),
            "rule": pa.nulls(none, pa.string()),
            "score": pa.nulls(none, pa.float64()),
            "threshold": pa.nulls(none, pa.float64()),
            "detail": pc.coalesce(batch.column("detail"), details),
        }
        schema = self._planned()
        for each in schema:
            if each.name not in columns:
                is_there = is_import or each.name not in IMPORT.names
                columns[each.name] = batch.column(each.name) if is_there else pa.nulls(none, each.type)
        return pa.table(columns, schema=schema)


@dataclass(frozen=True, kw_only=True)
class OrderStage:
    """Stage `plan-order`: one range of the order from all sources, collapsed, screened and cut into units."""

    store: Store
    runs: tuple[str, ...]
    num_ranges: int
    rows_per_unit: int
    memory_bytes: int
    rules: tuple[Rule, ...] = ()
    frequencies: Frequencies | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    """of sources that are taken in part, see `pipeline.mixture`"""
    has_labels: bool = False
    earlier: tuple[str, ...] = ()
    """what `plan-against` has written"""
    name: str = "plan-order"
    num_cpus: float = 1.0

    @staticmethod
    def of(
        config: BuildConfig, store: Store, sources: Mapping[str, Marker], earlier: Mapping[str, Marker] | None = None
    ) -> "OrderStage":
        """Plan from the markers of `plan-read` and `plan-against`.

        Raises RequestError when the lists are empty or were changed.
        """
        _refuse_others(Journal(store).markers("plan-read"), list(sources))
        num_rows = sum(marker.counts["rows"] for marker in sources.values())
        if num_rows == 0:
            raise RequestError(f"input={', '.join(config.input)}: the lists have no rows")
        per_range = config.plan.rows_per_range
        text_bytes = sum(marker.counts["text_bytes"] for marker in sources.values())
        known = num_known(earlier or {})
        return OrderStage(
            store=store,
            runs=tuple(marker.path_of("rows.parquet") for marker in sources.values()),
            num_ranges=max(-(-num_rows // per_range), -(-text_bytes // RANGE_TEXT_BYTES), -(-known // per_range)),
            rows_per_unit=config.plan.rows_per_unit,
            memory_bytes=min(num_rows, per_range) * BYTES_PER_ROW + RUN_BYTES,
            weights=source_weights(config),
            has_labels=has_labels(config),
            earlier=runs_of(earlier or {}),
        )

    def with_rules(self, config: CurateConfig, run_stage: Callable[[Any], Mapping[str, Marker]]) -> "OrderStage":
        """The same with the rules that need no image; what they have to know beforehand is gathered by `run_stage`."""
        rules = text_rules(config, copy_lists(config, self.store, run_stage))
        if CAPTION_PAIRS not in columns_of(rules):
            return replace(self, rules=rules)
        frequencies = count_captions(self.store, self.runs, self.units(), self.memory_bytes, run_stage)
        return replace(self, rules=rules, frequencies=frequencies)

    def units(self) -> list[Unit]:
        return [
            Unit(id=f"{index:05d}", params={"index": index, "first": first, "last": last})
            for index, (first, last) in enumerate(range_bounds(self.num_ranges))
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        first, last = unit.params["first"], unit.params["last"]
        parts = [
            _with_own_images(part, path) for path in self.runs for part in read_range(self.store, path, first, last)
        ]
        table = with_shares(self._without_earlier(collapse(pa.concat_tables(parts)), first, last), self.weights)
        known = self.frequencies.of_range(self.store, unit.params["index"]) if self.frequencies else None
        for name in ("rows", "pairs", "units"):
            output.count(name, 0)
        with (
            _writer(output.path("rows.parquet"), table.schema) as writer,
            _writer(output.path("decisions.parquet"), DECISIONS) as decisions,
        ):
            for start in range(0, table.num_rows, self.rows_per_unit):
                rows = table.slice(start, self.rows_per_unit)
                spared = without_caption(rows) if self.has_labels else None
                rows, judged = screen(rows if known is None else with_pairs(rows, known), self.rules, spared)
                rows = rows.select(table.column_names)
                writer.write_table(rows, row_group_size=rows.num_rows)
                decisions.write_table(judged.decisions, row_group_size=max(1, judged.decisions.num_rows))
                _count(rows, output)
                judged.count(output)

    def _without_earlier(self, table: pa.Table, first: int, last: int) -> pa.Table:
        if not self.earlier:
            return table
        found = [part for path in self.earlier for part in read_range(self.store, path, first, last)]
        return without_earlier(table, pa.concat_tables(found))


def _count(rows: pa.Table, output: UnitOutput) -> None:
    """One fetch unit's rows into the counts of its range."""
    output.count("units")
    output.count("pairs", rows.num_rows)
    output.count("rows", int(pc.sum(rows["num_rows"]).as_py()))
    for reason, rule, number in zip(*(rows[name].to_pylist() for name in ("reason", "rule", "num_rows")), strict=True):
        if reason is not None:
            output.count(f"reason:{reason}", number)
            if rule is None or not rule.startswith("curate."):
                output.count(f"pairs:{reason}")


def collapse(table: pa.Table) -> pa.Table:
    """PLANNED rows in (order, uid) order, equal uids made one: `num_rows` summed, the rest from the first of them.

    Before others are those that come with their image, first where the hash of its download is known; last are those
    that an import has not got.
    """
    if table.num_rows == 0:
        return table
    keys = keys_of_text(table["uid"].combine_chunks())
    rank = np.zeros(table.num_rows, np.int8)
    if "import_size" in table.schema.names:
        lacks = ("import_sha256", "import_size")
        rank = sum(table[name].is_null().to_numpy() * 2**place for place, name in enumerate(lacks))
        rank = rank + 4 * table["reason"].is_valid().to_numpy()
    by_place = np.lexsort((rank, keys[:, 1], keys[:, 0], table["order"].to_numpy()))
    keys = keys[by_place]
    is_first = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    firsts = np.flatnonzero(is_first)
    num_rows = np.add.reduceat(table["num_rows"].to_numpy()[by_place], firsts)
    kept = table.take(pa.array(by_place[firsts]))
    return kept.set_column(kept.schema.get_field_index("num_rows"), "num_rows", pa.array(num_rows, pa.int64()))


def _num_without_hash(run: pa.Table) -> int:
    """Imported rows whose downloaded bytes have no known hash."""
    if HASH_OF_STORED not in run.schema.names or "import_size" not in run.schema.names:
        return 0
    return int(pc.sum(pc.and_(run[HASH_OF_STORED], pc.is_valid(run["import_size"]))).as_py() or 0)


def _with_own_images(table: pa.Table, rows_path: str) -> pa.Table:
    """Rows with the path of images that lie in the output of the unit that read them."""
    if "import_file" not in table.schema.names:
        return table
    own = rows_path.removesuffix("rows.parquet") + "images.tar"
    files = pc.if_else(pc.equal(table["import_file"], ""), own, table["import_file"])
    return table.set_column(table.schema.get_field_index("import_file"), "import_file", files)


def list_groups(config: BuildConfig) -> tuple[tuple[Source, ...], list[Group]]:
    """Every file of every source, sources of the highest priority first, and how each group of them is read.

    Raises RequestError when a file or folder is missing.
    """
    named = [(name, config.sources[name].priority) for name in config.sources]
    places = [(PLAIN_SOURCE, 0)] * bool(config.input) + named
    sources: list[Source] = []
    groups: list[Group] = []
    for name, _ in sorted(places, key=lambda place: -place[1]):
        source = config.sources.get(name)
        key = "input" if source is None else f"sources.{name}.input"
        found = list_sources(config.input if source is None else source.input, config.read.format, key)
        columns = config.columns if source is None else source.columns
        for is_import in sorted({each.is_import for each in found}):
            sources += [replace(each, group=len(groups)) for each in found if each.is_import == is_import]
            label = None if source is None else source.label
            groups.append(Group(columns=columns, name=name if config.sources else "", label=label))
    return tuple(sources), groups


def _runs(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables gathered up to what may be held in memory."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= RUN_ROWS or sum(part.nbytes for part in held) >= RUN_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _writer(path: Path, schema: pa.Schema) -> Any:
    return pq.ParquetWriter(path, schema, compression="zstd")


def _fingerprint(source: Source) -> str:
    return hashlib.sha256(f"{source.name}\n{source.size_bytes}".encode()).hexdigest()[:8]


def _text_bytes(table: pa.Table) -> int:
    columns = (column for column in table.columns if pa.types.is_string(column.type))
    return sum(int(pc.sum(pc.binary_length(column)).as_py() or 0) for column in columns)


def _is_same(store: Store, source: Source, marker: Marker) -> bool:
    if store.read_bytes(marker.path_of("stamp.txt")).decode() == source.stamp:
        return True
    with local_copy(source) as (_, sha256):
        return bool(json.loads(store.read_bytes(marker.path_of("source.json")))["sha256"] == sha256)


def _refuse_others(markers: Mapping[str, Marker], units: Sequence[str]) -> None:
    if others := sorted({*markers} - {*units}):
        raise RequestError(
            f"input: the lists are not those that this run began with (list {int(others[0][:5]) + 1} was another file "
            "or had another size); put them back, or choose another output"
        )
