"""Semantic duplicates: the paper's rule by hand and by brute force, the same bytes for any number of workers."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline.duplicates.clusters as clusters_module
import pipeline.duplicates.vectors as vectors_module
from cluster.config import validate
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.buckets import write_buckets
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context
from pipeline.duplicates.clusters import assign, make_clusters
from pipeline.duplicates.cosines import nearest_preferred
from pipeline.duplicates.semantic import SWEEP, ClustersStage, score_cluster, sweep
from pipeline.duplicates.vectors import vector_dtype
from pipeline.manifest import read_manifest
from pipeline.models.config import ModelsConfig
from pipeline.selection import KNOWN, NONE, representative_uid

HERE = Path(__file__).parent


def unit_rows(count: int, dimension: int, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).normal(size=(count, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def brute_force(vectors: Any) -> list[tuple[float, int]]:
    """(greatest cosine with an earlier row, which) of every row but the first, one pair after the other."""
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    best = []
    for n in range(1, len(rows)):
        cosines = [float(rows[n] @ rows[m]) for m in range(n)]
        best.append((max(cosines), int(np.argmax(cosines))))
    return best


def test_a_hand_computed_cluster() -> None:
    angles = np.radians([0, 60, 10, 61, 0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = nearest_preferred(vectors)
    assert np.isnan(found.scores[0])
    assert found.of.tolist() == [-1, 0, 0, 1, 0]
    assert found.scores[1:] == pytest.approx(np.cos(np.radians([60, 10, 1, 0])), abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 150])
def test_every_row_has_its_greatest_cosine_with_a_preferred_row(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.duplicates.cosines.ENTRIES_AT_ONCE", 1_000)
    vectors = unit_rows(count, 8)
    found = nearest_preferred(vectors)
    expected = brute_force(vectors)
    assert found.of[1:].tolist() == [row for _, row in expected]
    assert found.scores[1:] == pytest.approx([cosine for cosine, _ in expected], abs=1e-6)


def test_of_equal_rows_the_most_preferred_is_named() -> None:
    vectors = np.repeat(unit_rows(1, 64), 40, axis=0)
    found = nearest_preferred(vectors)
    assert found.of.tolist() == [-1] + [0] * 39
    assert found.scores[1:] == pytest.approx(1.0, abs=1e-6)


def test_a_cluster_beyond_all_bounds_is_bounded_work() -> None:
    vectors = np.concatenate([np.repeat(unit_rows(1, 16), 500, axis=0), unit_rows(300, 16, seed=1)])
    near = (vectors[-50:].astype(np.float32) + 1e-3).astype(np.float16)
    found = nearest_preferred(np.concatenate([vectors, near]), max_together=100)
    assert found.of[1:500].tolist() == [0] * 499
    assert found.scores[1:500].tolist() == [1.0] * 499
    assert (found.scores[-50:] > 0.99).mean() > 0.9  # alike rows lie in the same run, but for those at its ends
    assert (found.of < np.arange(850)).all()


def test_known_samples_represent_and_are_never_dropped() -> None:
    records = np.zeros(4, vector_dtype(2))
    records["vector"] = [[1, 0], [0, 1], [1, 0.01], [0.6, 0.8]]
    records["unit"], records["row"], records["uid_low"] = [KNOWN, KNOWN, 0, 0], [7, 8, 5, 6], [11, 12, 13, 14]
    scored = score_cluster(records)
    assert scored["row"].tolist() == [5, 6]
    assert scored["of_unit"].tolist() == [KNOWN, KNOWN]
    assert scored["uid_low"].tolist() == [11, 12]
    alone = score_cluster(records[2:3])
    assert (alone["of_unit"][0], alone["uid_low"][0], np.isnan(alone["score"][0])) == (NONE, 0, True)


def test_clusters_are_the_same_for_the_same_sample_and_split_where_they_are_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = unit_rows(600, 8).astype(np.float32)
    one, again = (make_clusters(sample, 5, 600, seed=3, threads=1) for _ in range(2))
    assert np.array_equal(one, again)
    assert one.shape == (5, 8)
    monkeypatch.setattr(clusters_module, "MAX_ROWS_PER_CLUSTER", 5_000)
    monkeypatch.setattr(clusters_module, "ROWS_PER_CLUSTER", 2_000)
    split = make_clusters(sample, 5, 60_000, seed=3, threads=1)
    assert len(split) > 20
    assert np.bincount(assign(sample, split)).max() * 100 <= 5_000
    assert len(make_clusters(sample[:3], 100, 3, seed=0, threads=1)) == 1
    assert assign(sample[:2], make_clusters(sample[:0], 100, 0, seed=0, threads=1)).tolist() == [0, 0]


def semantic_words(*more: str) -> list[str]:
    return ["dedup.semantic_model=plugin_models:MeanColour", "dedup.semantic_clusters=3", "seed=4", *more]


Build = Callable[..., Path]


@pytest.fixture
def build(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Builds the small list, with a model that the test's own module has."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))

    def run(name: str, *more: str) -> Path:
        assert main(["build", *words(tmp_path / name, *semantic_words(*more))]) == 0
        return tmp_path / name

    yield run
    sys.modules.pop("plugin_models", None)


def records(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "record").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_a_build_drops_what_is_above_the_threshold_and_counts_every_other(build: Build) -> None:
    scored = build("scored")
    counted = sweep(Journal(Store(str(scored))))
    assert list(counted) == list(SWEEP)
    assert list(counted.values()) == sorted(counted.values(), reverse=True)
    assert counted[0.99] > 0
    assert not any(row["reason"] == "semantic_duplicate" for row in records(scored))
    dropping = build("dropping", "dedup.semantic_similarity=0.99")
    dropped = [row for row in records(dropping) if row["reason"] == "semantic_duplicate"]
    assert len(dropped) == counted[0.99]
    uids = {row["uid"] for row in records(dropping)}
    for row in dropped:
        assert row["rule"] == "dedup.semantic_similarity"
        assert row["score"] > row["threshold"] == 0.99
        assert row["duplicate_of"] in uids - {row["uid"]}


def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors_module, "TASK_BYTES", 200)


def test_two_workers_and_a_resumed_build_give_the_same_bytes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (
        "dedup.semantic_similarity=0.97",
        "curate.max_nsfw_score=0.9",
        "curate.nsfw_model=plugin_models:MeanColour",
        "balance.concepts=[picture,copy,moved]",
        "balance.per_concept=6",
    )
    small_tasks(monkeypatch)
    inline = build("inline", *settings)
    assert len(Journal(Store(str(inline))).markers("semantic-keys")) > 3
    monkeypatch.setattr(vectors_module, "TASK_BYTES", 2**28)
    two = build("two", *settings, "ray.address=", "ray.num_cpus=2")
    assert shards(inline) == shards(two)
    assert {"semantic_duplicate", "balanced_out"} <= {row["reason"] for row in records(two)}
    (inline / "manifest.json").unlink()
    for stage in ("semantic-pairs", "semantic-keys"):
        (next((inline / "journal" / stage).glob("*.json"))).unlink()
    before = shards(inline)
    small_tasks(monkeypatch)
    again = build("inline", *settings)
    assert shards(again) == before
    assert [row["reason"] for row in records(again)] == [row["reason"] for row in records(two)]


def test_no_task_asks_a_model_again_for_another_threshold(build: Build, tmp_path: Path) -> None:
    first = build("first", "dedup.semantic_similarity=0.97")
    from plugin_models import LOOKED_AT

    LOOKED_AT.clear()
    assert main(["curate", str(first), f"output={tmp_path / 'second'}", "dedup.semantic_similarity=0.99"]) == 0
    assert LOOKED_AT == []
    kept = [sum(row["status"] == "kept" for row in records(tmp_path / name)) for name in ("first", "second")]
    assert kept[0] < kept[1]


def test_the_sample_is_in_the_order_of_uids_and_its_memory_is_asked_for(store: Store, tmp_path: Path) -> None:
    records = np.zeros(200, vector_dtype(8))
    records["vector"] = unit_rows(200, 8) * np.float16(0.5)
    records["uid_low"] = np.random.default_rng(0).permutation(200)
    for number, part in enumerate((records[:90], records[:0], records[90:])):
        (tmp_path / "out").mkdir(exist_ok=True)
        write_buckets(tmp_path / "out" / f"{number}.bin", part, np.zeros(len(part), np.int64), 1)
    config = ModelsConfig(memory_mib=256)
    common: dict[str, Any] = {
        "store": store,
        "count": 1,
        "num_rows": 200,
        "seed": 0,
        "config": config,
        "name": "clusters",
    }
    stage = ClustersStage(samples=("0.bin", "1.bin", "2.bin"), dimension=8, num_sampled=200, **common)
    expected = records["vector"][np.argsort(records["uid_low"])].astype(np.float32)
    assert stage.points() == pytest.approx(expected / np.linalg.norm(expected, axis=1, keepdims=True), abs=1e-6)
    large = ClustersStage(samples=(), dimension=768, num_sampled=1_000_000, **common)
    assert 1_000_000 * 768 * 6 < large.memory_bytes < 1_000_000 * 768 * 8


@pytest.mark.parametrize("task_bytes", [1, 2**28])
def test_newcomers_are_compared_with_the_samples_of_known_shards(
    dataset: Path, store: Store, fetch: Any, monkeypatch: pytest.MonkeyPatch, task_bytes: int
) -> None:
    monkeypatch.setattr(vectors_module, "TASK_BYTES", task_bytes)
    monkeypatch.syspath_prepend(str(HERE))
    known_store, manifest = read_manifest(str(dataset))
    known = tuple(
        replace(
            shard,
            tar=replace(shard.tar, path=known_store.full(shard.tar.path)),
            parquet=replace(shard.parquet, path=known_store.full(shard.parquet.path)),
        )
        for shard in manifest.shards
    )
    plain = {"input": ["x"], "output": store.url, "dedup": {"semantic_similarity": 0.9999}}
    plain["dedup"] |= {"semantic_model": "plugin_models:MeanColour", "exact": False}

    def run(stage: Any) -> dict[str, Marker]:
        return run_stage(stage, Journal(store), InlineExecutor(), Progress())

    context = Context(
        config=validate(BuildConfig, plain), store=store, run_stage=run, known=known, num_known=manifest.num_samples
    )
    fetched = {marker.unit: marker for marker in fetch([[{"uid": 1, "body": "n3"}, {"uid": 2, "body": "new"}]])}
    curated = curate(context, fetched)
    (drops,) = curated.drops
    (drop,) = drops.of_unit(store, 0)
    rows = [row for shard in known for row in pq.read_table(shard.parquet.path, columns=["uid", "url"]).to_pylist()]
    (url,) = [row["url"] for row in rows if row["uid"] == representative_uid(drop)]
    assert (drop["row"], drop["of_unit"], url.rpartition("/")[2]) == (0, KNOWN, "n3")
    assert curated.num_kept == (1,)
