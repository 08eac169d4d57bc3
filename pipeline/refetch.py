"""A fetch unit once more, though the web may answer otherwise by now: what is known of it is not asked for again.

1. Without a marker, but with its files: they are looked at, and vouched for anew.
2. What became of each row is known from rows.parquet, or else from the record. Rows that had no image get none.
3. Images of samples are copied out of the dataset's shards. Only the others (duplicates, those that a rule dropped)
   are downloaded, and taken if they are byte for byte what was downloaded then.
"""

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.executor import Unit
from cluster.journal import Journal, Marker, OutputFile, UnitOutput, file_sha256, marker_path
from cluster.scratch import scratch_folder
from cluster.store import Store
from pipeline.damage import file_problem
from pipeline.fetch import FETCHED, FetchStage, count_fetched
from pipeline.generations import generation_of
from pipeline.manifest import FileInfo
from pipeline.selection import extra_columns, read_table
from pipeline.split import planned_rows
from pipeline.tar import TarWriter

ROWS, IMAGES = "rows.parquet", "images.tar"


class CannotRestoreError(Exception):
    """The unit cannot be made as it was; the text says why and what to do."""


def refetch(
    stage: FetchStage,
    unit: Unit,
    old: Marker | None,
    output: UnitOutput,
    journal: Journal,
    record: str | None,
    shards: Collection[str],
) -> Marker | None:
    """Write the unit's files to `output`; or vouch for files that are there, and return their new marker.

    record: path of the unit's record if that is whole. shards: paths of shards that are whole. Raises
    CannotRestoreError where images are not to be had as they were.
    """
    planned = planned_rows(journal.store, unit)
    if old is None and (adopted := _adopt(stage.name, unit, planned, journal)):
        return adopted
    judged = _read_record(journal.store, record, planned)
    rows = _own_rows(journal.store, old, planned)
    if rows is not None:
        output.path(ROWS).write_bytes(journal.store.read_bytes(old.path_of(ROWS)))  # type: ignore[union-attr]
        _write_images(stage, planned, rows, judged, shards, output.path(IMAGES))
        output.counts |= old.counts  # type: ignore[union-attr]
    elif judged is not None:
        rows = _rows_of_record(judged, generation_of(stage.name))
        offsets = _write_images(stage, planned, rows, judged, shards, output.path(IMAGES))
        rows = _with_offsets(rows, offsets)
        pq.write_table(rows, output.path(ROWS), compression="zstd")
        output.counts |= count_fetched(rows)
    else:
        stage.run(unit, output)
    return None


def _adopt(stage: str, unit: Unit, planned: pa.Table, journal: Journal) -> Marker | None:
    """A new marker for files that an attempt has left, if they are whole and of these rows."""
    store, prefix = journal.store, f"work/{stage}/{unit.id}."
    folders: dict[str, list[str]] = {}
    for entry in store.find(f"work/{stage}"):
        if entry.path.startswith(prefix) and not entry.path.split("/")[2].endswith(".tmp"):
            folder, _, name = entry.path.rpartition("/")
            folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if not {ROWS, IMAGES} <= set(names):
            continue
        with scratch_folder() as here:
            for name in names:
                store.get_file(f"{folder}/{name}", here / name)
            if (rows := _whole_rows(here, planned)) is None:
                continue
            outputs = tuple(
                OutputFile(
                    name=name,
                    path=f"{folder}/{name}",
                    size_bytes=(here / name).stat().st_size,
                    sha256=file_sha256(here / name),
                )
                for name in sorted(names)
            )
        marker = Marker(
            stage=stage,
            unit=unit.id,
            attempt=folder.removeprefix(prefix),
            outputs=outputs,
            counts=count_fetched(rows),
            inputs=unit.inputs,
        )
        store.write_bytes(marker_path(stage, unit.id), marker.to_json())
        return marker
    return None


def _whole_rows(folder: Path, planned: pa.Table) -> pa.Table | None:
    """The rows of a fetch unit's files, if they are those of the plan and every image is where they say."""
    try:
        rows = pq.read_table(folder / ROWS)
        if rows["uid"].to_pylist() != planned["uid"].to_pylist():
            return None
        with tarfile.open(folder / IMAGES, "r:") as tar:
            members = {member.name: (member.offset_data, member.size) for member in tar}
    except (OSError, KeyError, pa.ArrowException, tarfile.TarError):
        return None
    found = [
        members.get(f"{row['uid']}.{row['image_format']}") == (row["image_offset"], row["image_size"])
        for row in rows.select(["uid", "image_format", "image_offset", "image_size"]).to_pylist()
        if row["image_format"] is not None
    ]
    return rows if all(found) and len(found) == len(members) else None


def _own_rows(store: Store, old: Marker | None, planned: pa.Table) -> pa.Table | None:
    """The unit's rows.parquet, if it is what its marker says and the plan is the same."""
    file = next((file for file in old.outputs if file.name == ROWS), None) if old else None
    if file is None or file_problem(store, FileInfo(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)):
        return None
    rows = read_table(store, file.path)
    return rows if rows["uid"].to_pylist() == planned["uid"].to_pylist() else None


def _read_record(store: Store, path: str | None, planned: pa.Table) -> pa.Table | None:
    if path is None:
        return None
    record = read_table(store, path)
    return record if record["uid"].to_pylist() == planned["uid"].to_pylist() else None


def _rows_of_record(record: pa.Table, generation: int) -> pa.Table:
    """FETCHED rows, but for the places in the tar: what later stages decided is taken from them again."""
    if pc.any(pc.not_equal(record["generation"], generation)).as_py():
        raise CannotRestoreError(
            "some of its pairs were tried again by a repair, and how they had failed first is not known any more; "
            "put back a copy of its files, or build into a new output"
        )
    is_ok = pc.is_valid(record["image_format"])
    columns: dict[str, Any] = {}
    for field in FETCHED:
        if field.name == "status":
            columns[field.name] = pc.if_else(is_ok, "ok", "dropped")
        elif field.name in ("reason", "rule", "score", "threshold"):
            columns[field.name] = pc.if_else(is_ok, pa.scalar(None, field.type), record[field.name])
        elif field.name in ("image_offset", "image_size"):
            columns[field.name] = pa.nulls(record.num_rows, field.type)
        else:
            columns[field.name] = record[field.name].cast(field.type)
    extra = extra_columns(record.schema)
    schema = pa.schema([*FETCHED, *(record.schema.field(name) for name in extra)])
    return pa.table(columns | {name: record[name] for name in extra}, schema=schema)


Places = dict[int, tuple[int, int]]
"""row -> (offset, size) in images.tar"""


def _write_images(
    stage: FetchStage,
    planned: pa.Table,
    rows: pa.Table,
    judged: pa.Table | None,
    shards: Collection[str],
    path: Path,
) -> Places:
    """images.tar with the image of every row that had one, in the order that it had if that is known."""
    wanted = [row for row, status in enumerate(rows["status"].to_pylist()) if status == "ok"]
    if rows["image_offset"].null_count < rows.num_rows:
        offsets = rows["image_offset"].to_pylist()
        wanted.sort(key=lambda row: offsets[row])
    uids, suffixes = rows["uid"].to_pylist(), rows["image_format"].to_pylist()
    images = dict(_from_shards(stage.store, judged, wanted, shards)) if judged is not None else {}
    images |= _from_web(stage, planned, rows, [row for row in wanted if row not in images])
    places: Places = {}
    with TarWriter(path) as tar:
        for row in wanted:
            places[row] = tar.add(f"{uids[row]}.{suffixes[row]}", images[row]), len(images[row])
    return places


def _from_shards(
    store: Store, judged: pa.Table, wanted: list[int], shards: Collection[str]
) -> Iterator[tuple[int, bytes]]:
    """(row, image) of those that are samples of whole shards."""
    keys, numbers = judged["key"].to_pylist(), judged["shard"].to_pylist()
    for number in sorted({numbers[row] for row in wanted if numbers[row] is not None}):
        tar, table = f"shards/{number:05}.tar", f"shards/{number:05}.parquet"
        if not {tar, table} <= set(shards):
            continue
        places = read_table(store, table, ["key", "image_offset", "image_size"]).to_pylist()
        place_of = {place["key"]: (place["image_offset"], place["image_size"]) for place in places}
        for row in wanted:
            if numbers[row] == number:
                yield row, store.read_range(tar, *place_of[keys[row]])


def _from_web(stage: FetchStage, planned: pa.Table, rows: pa.Table, wanted: list[int]) -> dict[int, bytes]:
    """Images downloaded again. CannotRestoreError unless every body is what it was."""
    if not wanted:
        return {}
    expected = rows["sha256"].to_pylist()
    images: dict[int, bytes] = {}
    lost: Counter[str] = Counter()
    with scratch_folder() as folder:
        with TarWriter(folder / IMAGES) as tar:
            outcomes = stage.fetch_rows(planned.take(pa.array(wanted)), tar)
        with open(folder / IMAGES, "rb") as file:
            for row, outcome in zip(wanted, outcomes, strict=True):
                if outcome["status"] != "ok":
                    lost[outcome["reason"]] += 1
                elif outcome["sha256"] != expected[row]:
                    lost["other bytes"] += 1
                else:
                    file.seek(outcome["image_offset"])
                    images[row] = file.read(outcome["image_size"])
    if lost:
        told = ", ".join(f"{reason} {number:,}" for reason, number in lost.most_common())
        raise CannotRestoreError(
            f"{lost.total():,} of its {rows.num_rows:,} pairs are not to be had as they were ({told}); "
            "put back a copy of its files; the shards that are whole stay what they are"
        )
    return images


def _with_offsets(rows: pa.Table, places: Places) -> pa.Table:
    for index, name in enumerate(("image_offset", "image_size")):
        column = pa.array([places[row][index] if row in places else None for row in range(rows.num_rows)], pa.int64())
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows
