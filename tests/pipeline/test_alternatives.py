"""Captions of dropped duplicates go along with the sample that is kept, through all steps, and are bounded."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from cluster.config import parse
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context
from pipeline.duplicates import captions
from pipeline.pack import PackStage, cut_shards, more_columns
from pipeline.selection import Groups


def packed(store: Store, fetched: list[Marker], *settings: str) -> dict[int, dict[str, Any]]:
    """uid -> row of the shards."""

    def run(stage: Any) -> dict[str, Marker]:
        return run_stage(stage, Journal(store), InlineExecutor(), Progress())

    config = parse(BuildConfig, ["input=list", "output=out", "dedup.alternatives=true", *settings])
    done = curate(Context(config=config, store=store, run_stage=run), {marker.unit: marker for marker in fetched})
    pack = PackStage(
        store=store,
        shards=tuple(tuple(parts) for parts in cut_shards(done.units, done.num_kept, 4)),
        drops=done.drops,
        alternatives=done.alternatives,
        samples_per_shard=4,
        more_columns=more_columns(config),
    )
    tables = [pq.read_table(store.full(marker.path_of("samples.parquet"))) for marker in run(pack).values()]
    return {int(row["uid"], 16): row for table in tables for row in table.to_pylist()}


def pair(uid: int, body: str, caption: str, url: str = "", phash: int | None = None) -> dict[str, Any]:
    return {"uid": uid, "body": body, "caption": caption, "url": url, "phash": phash, "phash_mirror": phash}


@pytest.fixture(params=[1, 1_000_000])
def groups(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Groups.of
    monkeypatch.setattr(Groups, "of", staticmethod(lambda counts: of(counts, request.param)))


LOOK = 0x0123456789ABCDEF


@pytest.mark.usefixtures("groups")
def test_captions_follow_their_samples_through_all_steps(store: Store, fetch: Any) -> None:
    fetched = fetch(
        [
            [pair(9, "a", "nine"), pair(4, "a", "four"), pair(30, "d", "alone")],
            [],
            [pair(6, "a", "four"), pair(7, "a", "seven", "u"), pair(3, "b", "three", "v")],
            [pair(2, "c", "two", "v", LOOK), pair(1, "e", "one", "w", LOOK ^ 7), pair(8, "a", "one")],
        ]
    )
    rows = packed(store, fetched, "dedup.by_url=true", "dedup.near_distance=3")
    assert {uid: row["captions"] for uid, row in rows.items()} == {
        4: ["seven", "one", "nine"],  # in the order of uids, each once, without its own
        30: [],
        1: ["two", "three"],  # 3 was a duplicate of 2, which is a near-duplicate of 1
    }


@pytest.mark.usefixtures("groups")
def test_of_many_captions_those_of_the_smallest_uids_are_kept(
    store: Store, fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captions, "MAX_CAPTIONS", 3)
    units = [[pair(10 * unit + row, "same", f"caption {10 * unit + row}") for row in (5, 1, 3)] for unit in range(5)]
    assert packed(store, fetch(units))[1]["captions"] == ["caption 3", "caption 5", "caption 11"]


def test_an_empty_caption_takes_no_ones_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_CAPTIONS", 1)
    told = ["", None, "a", "b", "c"]
    rows = {"unit": 0, "row": 0, "uid": [str(uid) for uid in range(len(told))], "caption": told}
    assert captions.best_captions(pd.DataFrame(rows))["caption"].tolist() == ["a", "b"]


def test_a_build_writes_them_into_parquet_and_json(words: Any, tmp_path: Path) -> None:
    from pipeline.__main__ import main

    folder = tmp_path / "out"
    assert main(["build", *words(folder, "dedup.alternatives=true")]) == 0
    rows = [row for path in sorted((folder / "shards").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    found = {caption: row["captions"] for row in rows for caption in (row["caption"], *row["captions"])}
    assert sum(len(row["captions"]) for row in rows) == 5
    assert {"copy of 1", "picture number 1"} <= {*found}
    told = {}
    for path in (folder / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    told[content["uid"]] = content["captions"]
    assert told == {row["uid"]: row["captions"] for row in rows}
