"""Shards hold exactly the survivors, in order, cut at exact size, in a form that people's tools read."""

import json
import pickle
import tarfile
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
import webdataset

from cluster.config import parse
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context
from pipeline.manifest import SAMPLE_COLUMNS
from pipeline.pack import PackStage, Part, _sample_json, cut_shards, sample_key
from pipeline.plain import json_form, plain_values
from pipeline.record import RecordStage, total_counts
from pipeline.rules import ScoreRule
from pipeline.rules.images import MinimumSide
from pipeline.selection import DecidedUnit, read_table
from pipeline.tar import TarWriter
from pipeline.workfile import WorkFile


class AsSent:
    """A stage whose units are run by what a worker gets of it."""

    def __init__(self, stage: Any) -> None:
        self.name, self.num_cpus, self.memory_bytes = stage.name, stage.num_cpus, stage.memory_bytes
        self.units = stage.units
        self.run = pickle.loads(pickle.dumps(stage)).run


def run_all(store: Store, fetched: list[Marker], samples_per_shard: int) -> tuple[list[Marker], dict[str, Marker]]:
    """Everything between fetch and publish; returns the markers of pack and record."""

    def run(stage: Any) -> dict[str, Marker]:
        return run_stage(AsSent(stage), Journal(store), InlineExecutor(), Progress())

    config = parse(BuildConfig, ["input=list", "output=out", "curate.min_side_px=32"])
    context = Context(config=config, store=store, run_stage=run)
    done = curate(context, {marker.unit: marker for marker in fetched})
    units, num_kept, drops = done.units, done.num_kept, done.drops
    shards = tuple(tuple(parts) for parts in cut_shards(units, num_kept, samples_per_shard))
    pack = PackStage(store=store, shards=shards, drops=drops, samples_per_shard=samples_per_shard)
    record = RecordStage(
        store=store,
        decided=units,
        num_kept=tuple(num_kept),
        drops=drops,
        samples_per_shard=samples_per_shard,
    )
    return list(run(pack).values()), run(record)


# uid 3 repeats the bytes of uid 1, uid 4 is too small, uid 5 failed; units are ragged
UNITS = [
    [{"uid": 1, "body": "one"}, {"uid": 3, "body": "one", "num_rows": 2}, {"uid": 2, "body": "two", "num_rows": 4}],
    [{"uid": 5, "body": None, "num_rows": 3}],
    [
        {"uid": 4, "body": "four", "width": 8},
        {"uid": 6, "body": "six"},
        {"uid": 7, "body": "seven", "licence": None},
        {"uid": 8, "body": "eight"},
    ],
]
KEPT = [1, 2, 6, 7, 8]
NONE = WorkFile(stage="fetch", unit="0", path="p" * 50, sha256="0" * 64)


@dataclass(frozen=True, kw_only=True)
class Talkative(ScoreRule):
    """Drops every row, and says so."""

    threshold: float = 0
    name = "curate.talkative"
    reason = "image_blank"
    columns = ("uid",)
    keeps = "above"

    def scores(self, rows: pa.Table) -> Any:
        return np.zeros(rows.num_rows)

    def details(self, rows: pa.Table) -> list[str | None]:
        return ["said by another rule"] * rows.num_rows


def test_the_blamed_rule_alone_speaks_in_the_record(store: Store, fetch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (MinimumSide(threshold=32), Talkative())
    monkeypatch.setattr("pipeline.curation.chain.image_rules", lambda config: rules)
    _, recorded = run_all(store, fetch([UNITS[0], [{"uid": 4, "body": "four", "width": 8}]]), samples_per_shard=2)
    rows = [
        row for marker in recorded.values() for row in read_table(store, marker.path_of("record.parquet")).to_pylist()
    ]
    told = {int(row["uid"], 16): (row["rule"], row["detail"]) for row in rows}
    assert told == dict.fromkeys((1, 2, 3), ("curate.talkative", "said by another rule")) | {
        4: ("curate.min_side_px", None)
    }


def test_shards_hold_the_survivors_in_order(store: Store, fetch: Any) -> None:
    packed, _ = run_all(store, fetch(UNITS), samples_per_shard=2)
    assert [marker.counts["rows"] for marker in packed] == [2, 2, 1]
    tables = [read_table(store, marker.path_of("samples.parquet")) for marker in packed]
    assert [int(uid, 16) for table in tables for uid in table["uid"].to_pylist()] == KEPT
    assert [key for table in tables for key in table["key"].to_pylist()] == [
        "000000000",
        "000000001",
        "000010000",
        "000010001",
        "000020000",
    ]
    assert tables[0].schema.names == [*SAMPLE_COLUMNS, "licence"]
    assert all(table.schema == tables[0].schema for table in tables)


def test_offsets_of_the_parquet_lead_to_the_members_of_the_tar(store: Store, fetch: Any) -> None:
    packed, _ = run_all(store, fetch(UNITS), samples_per_shard=3)
    for index, marker in enumerate(packed):
        path = f"shards/{index:05}.tar"
        with tarfile.open(store.full(path)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        rows = read_table(store, marker.path_of("samples.parquet")).to_pylist()
        assert [name for row in rows for name in (f"{row['key']}.jpg", f"{row['key']}.txt", f"{row['key']}.json")] == [
            *members
        ]
        for row in rows:
            image = store.read_range(path, row["image_offset"], row["image_size"])
            assert image == members[f"{row['key']}.jpg"]
            assert cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR).shape == (48, 64, 3)
            caption = store.read_range(path, row["caption_offset"], row["caption_size"])
            assert caption.decode() == row["caption"] == members[f"{row['key']}.txt"].decode()
            content = json.loads(members[f"{row['key']}.json"])
            assert {name: content[name] for name in content} == {name: row[name] for name in content}
            assert content["licence"] == row["licence"]


def test_images_are_copied_byte_for_byte(store: Store, fetch: Any) -> None:
    fetched = fetch(UNITS)
    packed, _ = run_all(store, fetched, samples_per_shard=10)
    before = {}
    for marker in fetched:
        with tarfile.open(store.full(marker.path_of("images.tar"))) as tar:
            before |= {member.name[:32]: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for row in read_table(store, packed[0].path_of("samples.parquet")).to_pylist():
        assert store.read_range("shards/00000.tar", row["image_offset"], row["image_size"]) == before[row["uid"]]


def test_people_read_it_with_their_own_tools(store: Store, fetch: Any) -> None:
    run_all(store, fetch(UNITS), samples_per_shard=2)
    pattern = store.full("shards") + "/{00000..00002}.tar"
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False).decode("rgb8"))
    assert [int(sample["json"]["uid"], 16) for sample in samples] == KEPT
    assert all(sample["jpg"].shape == (48, 64, 3) for sample in samples)
    assert samples[0]["txt"] == "caption of 1 \N{SNOWMAN}"
    files = sorted(str(path) for path in Path(store.full("shards")).glob("*.parquet"))
    table = pyarrow.dataset.dataset(files).to_table(columns=["uid", "caption", "licence"])
    assert [int(uid, 16) for uid in table["uid"].to_pylist()] == KEPT


def test_the_record_accounts_for_every_row(store: Store, fetch: Any) -> None:
    _, recorded = run_all(store, fetch(UNITS), samples_per_shard=2)
    rows = [row for index in range(3) for row in read_table(store, f"record/{index:05}.parquet").to_pylist()]
    told = {int(row["uid"], 16): row for row in rows}
    assert {uid: row["reason"] for uid, row in told.items()} == {
        **dict.fromkeys(KEPT),
        3: "duplicate_bytes",
        4: "image_too_small",
        5: "http_404",
    }
    assert int(told[3]["duplicate_of"], 16) == 1
    assert (told[4]["rule"], told[4]["score"], told[4]["threshold"]) == ("curate.min_side_px", 8.0, 32.0)
    assert [(told[uid]["shard"], told[uid]["key"]) for uid in KEPT[:3]] == [
        (0, "000000000"),
        (0, "000000001"),
        (1, "000010000"),
    ]
    assert {row["status"] for row in rows} == {"kept", "dropped"}
    counts = total_counts(recorded)
    assert counts == {
        "kept": 5,
        "repeated_pair": 3,
        "duplicate_bytes": 2,
        "http_404": 3,
        "image_too_small": 1,
    }
    assert sum(counts.values()) == sum(pair.get("num_rows", 1) for unit in UNITS for pair in unit)


def test_nothing_kept_makes_no_shard(store: Store, fetch: Any) -> None:
    packed, recorded = run_all(store, fetch([[{"uid": 1, "body": None}], []]), samples_per_shard=2)
    assert packed == []
    assert total_counts(recorded) == {"kept": 0, "http_404": 1}


@pytest.mark.parametrize("sizes", [[0], [5], [4], [1, 0, 0, 7, 2], [3, 3, 3], [12]])
def test_shards_are_cut_at_exact_size(sizes: list[int]) -> None:
    units = [
        DecidedUnit(index=index, id=str(index), rows=NONE, images=NONE, kept=NONE, decisions=NONE, facts=NONE)
        for index in range(len(sizes))
    ]
    shards = cut_shards(units, sizes, 4)
    lengths = [sum(part.end - part.first for part in parts) for parts in shards]
    assert lengths == [4] * (sum(sizes) // 4) + ([sum(sizes) % 4] if sum(sizes) % 4 else [])
    told = [(part.unit.index, row) for parts in shards for part in parts for row in range(part.first, part.end)]
    assert told == [(index, row) for index, size in enumerate(sizes) for row in range(size)]


def test_workers_are_not_sent_the_list_of_all_shards(store: Store) -> None:
    unit = DecidedUnit(index=0, id="0", rows=NONE, images=NONE, kept=NONE, decisions=NONE, facts=NONE)
    stage = PackStage(
        store=store,
        shards=tuple((Part(unit=unit, first=0, end=1),) for _ in range(1000)),
        drops=(),
        samples_per_shard=1,
    )
    assert len(pickle.dumps(stage)) < 1000


def test_keys_grow_with_the_shard_and_sort_in_order() -> None:
    assert sample_key(25_017, 10_000) == (2, "000025017")
    assert sample_key(3, 100_000) == (0, "0000000003")
    keys = [sample_key(number, 7)[1] for number in range(30)]
    assert keys == sorted(keys)


def test_tar_bytes_depend_on_the_members_only(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        with TarWriter(tmp_path / name) as tar:
            offsets = [tar.add("x.txt", b""), tar.add("y.txt", b"1" * 513)]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert offsets == [512, 1024]
    with tarfile.open(tmp_path / "a.tar") as read:
        assert [(member.name, member.size, member.mtime, member.uid) for member in read] == [
            ("x.txt", 0, 0, 0),
            ("y.txt", 513, 0, 0),
        ]


def test_values_that_json_lacks_are_written_as_text() -> None:
    values = {"b": b"\x01", "n": float("nan"), "d": Decimal("1.50"), "t": date(2020, 1, 2), "i": 2**64 - 1, "o": True}
    content = json.loads(_sample_json("k", {**values, "deep": {"x": [values, (float("inf"), None)]}}), parse_constant=0)
    plain = {"b": "01", "n": None, "d": "1.50", "t": "2020-01-02", "i": 2**64 - 1, "o": True}
    assert content == {"key": "k", **plain, "deep": {"x": [plain, [None, None]]}}


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (2**31 - 1, pa.date32(), "2147483647"),
        ([10**15, 0], pa.list_(pa.timestamp("s")), ["1000000000000000", "1970-01-01T00:00:00"]),
        ({"a": 10**15}, pa.struct([("a", pa.timestamp("s"))]), {"a": "1000000000000000"}),
        ([("k", 10**15)], pa.map_(pa.string(), pa.timestamp("s")), [["k", "1000000000000000"]]),
        (2**62, pa.duration("s"), str(2**62)),
    ],
)
def test_times_beyond_those_of_python_are_told_as_numbers(value: Any, kind: pa.DataType, told: Any) -> None:
    assert json_form(plain_values(pa.chunked_array([pa.array([value, None], kind)]))) == [told, None]
