"""Stage pack: the surviving samples of consecutive fetch units, concatenated and cut at exactly the shard's size.

The plan has put the rows in random order, so cutting is all that is left to do. Encoded images are copied as they
are. Every byte of a shard is a function of the kept rows: two attempts at a shard write the same files.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.executor import Unit
from cluster.journal import UnitOutput
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.manifest import IMG2DATASET_COLUMNS, SAMPLE_COLUMNS
from pipeline.plain import json_form, plain_values
from pipeline.selection import DecidedUnit, Drops, extra_columns, open_images, read_checked, survivors
from pipeline.tar import TarWriter

if TYPE_CHECKING:  # it needs pandas, which few runs do
    from pipeline.duplicates.captions import Alternatives

_OFFSETS = ("image_offset", "image_size", "caption_offset", "caption_size")
_COPIED = tuple(name for name in SAMPLE_COLUMNS if name not in ("key", *_OFFSETS))
_JSON = ("uid", "url", "caption", "width", "height", "original_width", "original_height", "sha256")
_SUCCESS = {"status": "success", "error_message": None}
"""img2dataset's columns that say the same of every sample here; what was dropped is in record/."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Survivors number `first` to `end` (exclusive) of one fetch unit."""

    unit: DecidedUnit
    first: int
    end: int


def more_columns(config: BuildConfig) -> tuple[str, ...]:
    """The columns of the record that shards have because they were asked for."""
    hashed = config.fetch.compute_hash
    named = IMG2DATASET_COLUMNS if config.pack.columns == "img2dataset" else ()
    alternatives = ("captions",) if config.dedup.alternatives else ()
    return (*(() if hashed == "sha256" else (hashed,)), *named, *alternatives)


def cut_shards(units: Sequence[DecidedUnit], num_kept: Sequence[int], samples_per_shard: int) -> list[list[Part]]:
    """The parts of every shard: all have `samples_per_shard` samples but the last, which has what is left."""
    shards: list[list[Part]] = []
    room = 0
    for unit, count in zip(units, num_kept, strict=True):
        first = 0
        while first < count:
            if room == 0:
                shards.append([])
                room = samples_per_shard
            end = min(count, first + room)
            shards[-1].append(Part(unit=unit, first=first, end=end))
            room -= end - first
            first = end
    return shards


def sample_key(number: int, samples_per_shard: int) -> tuple[int, str]:
    """(shard, key) of a dataset's sample number: five digits of shard, then at least four inside it."""
    shard, index = divmod(number, samples_per_shard)
    return shard, f"{shard:05}{index:0{max(4, len(str(samples_per_shard - 1)))}}"


@dataclass(frozen=True, kw_only=True)
class PackStage:
    """`shards`: the parts of every shard, the first being shard number `first_shard`.

    more_columns: what parquet and json hold beside our own and the list's columns, see `more_columns`.
    """

    store: Store
    shards: tuple[tuple[Part, ...], ...]
    drops: tuple[Drops, ...]
    samples_per_shard: int
    more_columns: tuple[str, ...] = ()
    alternatives: "Alternatives | None" = None
    first_shard: int = 0
    name: str = "pack"
    num_cpus: float = 1.0
    memory_bytes: int = 512 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a shard's parts with its unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "shards": ()}

    def units(self) -> Sequence[Unit]:
        return [
            Unit(id=f"{index:05}", params={"index": index, "parts": parts})
            for index, parts in enumerate(self.shards, self.first_shard)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        index, tables = unit.params["index"], []
        tar_path = output.path("samples.tar", publish_as=f"shards/{index:05}.tar")
        number = index * self.samples_per_shard
        with TarWriter(tar_path) as tar:
            for part in unit.params["parts"]:
                tables.append(self._pack_part(part, number, tar))
                number += part.end - part.first
        table = pa.concat_tables(tables)
        path = output.path("samples.parquet", publish_as=f"shards/{index:05}.parquet")
        pq.write_table(table, path, compression="zstd")
        output.count("rows", table.num_rows)

    def _pack_part(self, part: Part, number: int, tar: TarWriter) -> pa.Table:
        """Append a part's samples to the tar, the first one being sample `number`; returns their table."""
        rows = survivors(self.store, part.unit, self.drops)[part.first : part.end]
        table = read_checked(self.store, part.unit.rows).take(pa.array(rows, pa.int64()))
        if self.alternatives is not None:
            own = table["caption"].to_pylist()
            others = self.alternatives.of_rows(self.store, part.unit.index, rows.tolist(), own)
            table = table.append_column("captions", pa.array(others, pa.list_(pa.string())))
        extra = extra_columns(table.schema)
        added: dict[str, list[Any]] = {name: [] for name in ("key", *_OFFSETS)}
        more = (*self.more_columns, *extra)
        if "status" in more:
            table = _with_constants(table, _SUCCESS)
        in_json = (*_JSON, *more)
        told = [dict(zip(in_json, row, strict=True)) for row in _rows(table, in_json)]
        places = _rows(table, ("image_offset", "image_size", "image_format"))
        with open_images(self.store, part.unit.images) as images:
            for place, (row, (offset, size, suffix)) in enumerate(zip(told, places, strict=True)):
                key = sample_key(number + place, self.samples_per_shard)[1]
                images.seek(offset)
                image, caption = images.read(size), row["caption"].encode()
                added["key"].append(key)
                added["image_offset"].append(tar.add(f"{key}.{suffix}", image))
                added["image_size"].append(len(image))
                added["caption_offset"].append(tar.add(f"{key}.txt", caption))
                added["caption_size"].append(len(caption))
                tar.add(f"{key}.json", _sample_json(key, row))
        columns = {name: table.column(name) for name in (*_COPIED, *more)}
        columns["key"] = pa.array(added["key"], pa.string())
        columns |= {name: pa.array(added[name], pa.int64()) for name in _OFFSETS}
        return pa.table({name: columns[name] for name in (*SAMPLE_COLUMNS, *more)}).replace_schema_metadata(None)


def _with_constants(table: pa.Table, constants: Mapping[str, str | None]) -> pa.Table:
    """The table with a column of strings for each constant, in the place of one of that name."""
    for name, value in constants.items():
        column = pa.array([value] * table.num_rows, pa.string())
        place = table.schema.get_field_index(name)
        table = table.append_column(name, column) if place < 0 else table.set_column(place, name, column)
    return table


def _sample_json(key: str, row: dict[str, Any]) -> bytes:
    content = {"key": key} | {name: json_form(value) for name, value in row.items()}
    return json.dumps(content, ensure_ascii=False).encode()


def _rows(table: pa.Table, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of some columns as Python values."""
    return zip(*(plain_values(table.column(name)) for name in names), strict=True)
