"""Near-duplicates: exactly the pairs that comparing all with all finds, wherever samples lie."""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from cluster.config import parse
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker, UnitOutput
from cluster.progress import Progress
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context, Curated
from pipeline.duplicates import components, hamming, near
from pipeline.manifest import FileInfo, Shard
from pipeline.selection import KNOWN, Groups, representative_uid

Hashes = NDArray[np.uint64]
DRAW = np.random.default_rng(7)


def telling(count: int) -> Hashes:
    """Random hashes with half of the bits set, as images' have."""
    bits = np.argsort(DRAW.random((count, 64)), axis=1) < 32
    hashes: Hashes = np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()
    return hashes


def flipped(hashes: Hashes, count: int) -> Hashes:
    """The same with so many bits changed."""
    bits = np.argsort(DRAW.random((len(hashes), 64)), axis=1)[:, :count].astype(np.uint64)
    changes: Hashes = np.bitwise_or.reduce(np.uint64(1) << bits, axis=1) if count else np.zeros(len(hashes), np.uint64)
    return hashes ^ changes


def sets_of(hashes: Hashes, mirrors: Hashes | None, distance: int) -> list[set[int]]:
    """Components of two or more images, by comparing all with all."""
    both = [hashes] if mirrors is None else [hashes, mirrors]
    is_near = np.zeros((len(hashes), len(hashes)), bool)
    for left in both:
        for right in both:
            is_near |= np.bitwise_count(left[:, None] ^ right[None, :]) <= distance
    found: list[set[int]] = []
    left_over = set(range(len(hashes)))
    while left_over:
        front = {left_over.pop()}
        members = set(front)
        while front:
            front = {int(j) for i in front for j in np.flatnonzero(is_near[i])} - members
            members |= front
        left_over -= members
        found.append(members)
    return sorted((members for members in found if len(members) > 1), key=min)


def all_pairs(hashes: Hashes, distance: int) -> set[tuple[int, int]]:
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    return set(zip(*(side.tolist() for side in np.nonzero(np.triu(apart <= distance, 1))), strict=True))


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
@pytest.mark.parametrize("long_run", [50, 512])
def test_every_near_pair_is_found_and_no_other(distance: int, long_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "LONG_RUN", long_run)
    base = telling(60)
    spread = np.concatenate([base, *(flipped(base, count) for count in (1, 2, 3, 4))])
    dense = DRAW.integers(0, 2**12, 300).astype(np.uint64)  # they agree in most blocks
    for hashes in (np.unique(spread), np.unique(dense), np.unique(dense << np.uint64(52))):
        pairs = hamming.near_pairs(hashes, distance)
        found = {(min(p), max(p)) for left, right in pairs for p in zip(left.tolist(), right.tolist(), strict=True)}
        assert found == all_pairs(hashes, distance)


def test_no_more_tables_than_are_needed() -> None:
    assert [len(list(hamming.tables(distance))) for distance in range(4)] == [0, 3, 7, 20]


def test_a_larger_distance_is_refused() -> None:
    with pytest.raises(ValueError, match="distance=4"):
        next(hamming.near_pairs(telling(2), 4))


def test_links_connect_what_pairs_connect_when_they_are_merged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.unique(DRAW.integers(0, 2**12, 500).astype(np.uint64))
    at_once = hamming.linked(hashes, 2)
    monkeypatch.setattr(hamming, "MAX_PAIRS", 10)
    assert (hamming.linked(hashes, 2) == at_once).all()
    assert {frozenset(np.flatnonzero(at_once == root).tolist()) for root in set(at_once.tolist())} >= {
        frozenset(members) for members in sets_of(hashes, None, 2)
    }


@pytest.fixture(params=["one group", "many parts", "rounds"])
def cut(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the work is divided, which may not matter."""
    if request.param != "one group":
        groups: Callable[..., Groups] = Groups.of
        monkeypatch.setattr(Groups, "of", staticmethod(lambda counts: groups(counts, 40)))
        monkeypatch.setattr(near, "num_partitions", lambda _: 5)
    if request.param == "rounds":
        monkeypatch.setattr(components, "MAX_EDGES", 0)


def known_shard(path: Path, uids: list[int], hashes: list[int], mirrors: list[int]) -> Shard:
    """A shard's table with no more than steps need, elsewhere."""
    columns = {
        "uid": [f"{uid:032x}" for uid in uids],
        "url": [f"http://known.test/{uid}" for uid in uids],
        "caption": ["known"] * len(uids),
        "sha256": [hashlib.sha256(f"known {uid}".encode()).hexdigest() for uid in uids],
    }
    looks = {"phash": pa.array(hashes, pa.uint64()), "phash_mirror": pa.array(mirrors, pa.uint64())}
    pq.write_table(pa.table(columns | looks), path)
    file = FileInfo(path=str(path), size_bytes=path.stat().st_size, sha256="0" * 64)
    return Shard(index=0, num_samples=len(uids), tar=file, parquet=file)


def curated(store: Store, fetched: list[Marker], *dedup: str, known: tuple[Shard, ...] = ()) -> Curated:
    def run(stage: Any) -> dict[str, Marker]:
        sent = pickle.loads(pickle.dumps(stage))
        object.__setattr__(sent, "units", stage.units)
        return run_stage(sent, Journal(store), InlineExecutor(), Progress())

    config = parse(BuildConfig, ["input=list", "output=out", "dedup.exact=false", *dedup])
    num_known = sum(shard.num_samples for shard in known)
    context = Context(config=config, store=store, run_stage=run, known=known, num_known=num_known)
    return curate(context, {marker.unit: marker for marker in fetched})


def fetch_looks(fetch: Any, hashes: Hashes, mirrors: Hashes) -> list[Marker]:
    pairs = [
        {"uid": index + 1, "body": "b", "phash": int(own), "phash_mirror": int(mirror)}
        for index, (own, mirror) in enumerate(zip(hashes, mirrors, strict=True))
    ]
    markers: list[Marker] = fetch([pairs[first : first + 25] for first in range(0, len(pairs), 25)])
    return markers


def dropped(store: Store, done: Curated) -> dict[int, tuple[int, float]]:
    """uid -> (uid of the representative, score)."""
    return {
        25 * unit.index + int(drop["row"]) + 1: (int(representative_uid(drop) or "0", 16), float(drop["score"]))
        for step in done.drops
        for unit in done.units
        for drop in step.of_unit(store, unit.index)
    }


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("distance", "mirror"), [(0, True), (1, True), (3, False), (3, True)])
def test_components_are_those_of_comparing_all_with_all(store: Store, fetch: Any, distance: int, mirror: bool) -> None:
    base = telling(40)
    chain = flipped(base[:10], 2)
    hashes = np.concatenate([base, base[:15], chain, flipped(chain, 3), flipped(base[20:30], 1)])
    mirrors = telling(len(hashes))
    mirrors[:5] = hashes[30:35]  # 30 to 34 look like 0 to 4 in a mirror
    mirrors[55:60] = flipped(mirrors[5:10], 1)
    order = DRAW.permutation(len(hashes))
    hashes, mirrors = hashes[order], mirrors[order]
    done = curated(
        store, fetch_looks(fetch, hashes, mirrors), f"dedup.near_distance={distance}", f"dedup.mirror={mirror}"
    )
    sets = sets_of(hashes, mirrors if mirror else None, distance)
    assert sets
    expected = {other + 1: min(members) + 1 for members in sets for other in members if other != min(members)}
    found = dropped(store, done)
    assert {uid: of for uid, (of, _) in found.items()} == expected
    for uid, (of, score) in found.items():
        ways = [hashes[of - 1], mirrors[of - 1]] if mirror else [hashes[of - 1]]
        assert score == min(int(np.bitwise_count(hashes[uid - 1] ^ way)) for way in ways)
    assert done.drops[0].threshold == distance


@pytest.mark.usefixtures("cut")
def test_known_samples_represent_newcomers_and_stay(store: Store, fetch: Any, tmp_path: Path) -> None:
    old, other = telling(30), telling(30)
    new = np.concatenate([flipped(old[:4], 2), old[4:5], other[5:7], telling(3)])
    new[9] = flipped(new[8:9], 1)[0]  # two newcomers that are near to each other alone
    hashes, mirrors = [*old.tolist(), int(old[0])], [*other.tolist(), int(other[0])]
    shard = known_shard(tmp_path / "known.parquet", list(range(100, 131)), hashes, mirrors)
    done = curated(store, fetch_looks(fetch, new, telling(10)), "dedup.near_distance=3", known=(shard,))
    representatives = {uid: of for uid, (of, _) in dropped(store, done).items()}
    assert representatives == {1: 100, 2: 101, 3: 102, 4: 103, 5: 104, 6: 105, 7: 106, 10: 9}
    assert {int(drop["of_unit"]) for step in done.drops for drop in step.of_group(store, 0)} >= {int(KNOWN)}


def test_known_samples_of_which_hashes_are_absent_are_no_ones_duplicates(
    store: Store, fetch: Any, tmp_path: Path
) -> None:
    shard = known_shard(tmp_path / "known.parquet", [100], [5], [5])
    table = pq.read_table(shard.parquet.path).select(["uid", "url", "caption"])
    pq.write_table(table, shard.parquet.path)
    settings = ("dedup.exact=true", "dedup.near_distance=3")
    done = curated(store, fetch_looks(fetch, telling(3), telling(3)), *settings, known=(shard,))
    assert [str(step.reason) for step in done.drops] == ["duplicate_bytes", "near_duplicate"]
    assert set(dropped(store, done)) == {2, 3}  # all have the same bytes


@pytest.mark.usefixtures("cut")
def test_a_hash_that_all_share_is_one_node(store: Store, fetch: Any) -> None:
    hashes = np.full(120, telling(1)[0])
    done = curated(store, fetch_looks(fetch, hashes, telling(120)), "dedup.near_distance=3")
    assert dropped(store, done) == dict.fromkeys(range(2, 121), (1, 0.0))
    assert sum(done.num_kept) == 1


def test_images_without_a_hash_and_flat_ones_are_left_alone_and_counted(store: Store, fetch: Any) -> None:
    flat = 1 << 63
    pairs = [{"uid": 1, "phash": flat, "phash_mirror": flat}, {"uid": 2, "phash": flat, "phash_mirror": flat}]
    done = curated(
        store, fetch([[*pairs, {"uid": 3}, {"uid": 4}], [], [{"uid": 5, "body": None}]]), "dedup.near_distance=3"
    )
    assert done.num_kept == (4, 0, 0)
    (marker,) = Journal(store).markers("near-keys").values()
    assert marker.counts == {"rows": 4, "without_hash": 2, "flat": 2, "largest_place": 0}


@pytest.mark.usefixtures("cut")
def test_memory_is_asked_for_what_the_largest_place_gets(
    store: Store, fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = telling(110) >> np.uint64(11) << np.uint64(11)  # the first block is the same
    alike = alike[np.bitwise_count(alike) >= near.MIN_BITS]
    asked, links = list[int](), near.find_links

    def find(points: Any, *how: int) -> Any:
        asked.append(len(points))
        return links(points, *how)

    monkeypatch.setattr(near, "find_links", find)
    curated(store, fetch_looks(fetch, alike, alike ^ np.uint64(1 << 63)), "dedup.near_distance=3")
    declared = sum(marker.counts["largest_place"] for marker in Journal(store).markers("near-keys").values())
    assert max(asked) == declared == 2 * len(alike)


def test_all_edges_at_once_are_one_read_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, paths = Store(str(tmp_path)), []
    nodes = np.arange(1, 41, dtype=np.uint64)
    for number in range(4):
        output = UnitOutput(tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        components.write_edges(output, nodes[number + 1 :: 4], nodes[number:-1:4][: len(nodes[number + 1 :: 4])], 7)
        paths.append(f"{number}/edges.bin")
    stage = components.WholeStage(store=store, edges=tuple(paths), parts=7, name="join")
    output = UnitOutput(tmp_path)
    reads: list[str] = []
    whole = Store.read_bytes

    def read(self: Store, path: str) -> bytes:
        reads.append(path)
        return whole(self, path)

    monkeypatch.setattr(Store, "read_range", None)
    monkeypatch.setattr(Store, "read_bytes", read)
    stage.run(stage.units()[0], output)
    assert reads == paths
    assert output.counts["edges"] == 39  # all but the smallest


def test_a_path_is_one_component_after_few_rounds() -> None:
    nodes = DRAW.permutation(np.arange(1000, 3000).astype(np.uint64))  # along the path
    left, right = nodes[1:], nodes[:-1]
    num_rounds, new = 0, 1
    while new and num_rounds < 15:
        num_rounds, new = num_rounds + 1, 0
        for star in (components.large_star, components.small_star):
            edges = np.empty(2 * len(left), components.EDGE)
            edges["node"], edges["neighbour"] = np.concatenate([left, right]), np.concatenate([right, left])
            left, right, count = star(edges)
            new += count
    assert not new
    assert set(right.tolist()) == {1000}
    assert sorted(left.tolist()) == list(range(1001, 3000))
