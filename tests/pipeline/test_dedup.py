"""One sample of every set of the same is kept, whatever the partitions, groups, units and order."""

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

import pipeline.duplicates.keys as keys_module
from cluster.config import parse
from cluster.errors import RequestError, RunError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.buckets import Records
from pipeline.config import BuildConfig
from pipeline.curation.chain import curate
from pipeline.curation.context import Context, Curated
from pipeline.duplicates import exact, exchange
from pipeline.duplicates.config import DedupConfig
from pipeline.duplicates.facts import FACTS, facts_of, needed_facts
from pipeline.duplicates.keys import BYTES, BYTES_AND_CAPTION, KEY, URL, find_duplicates, make_keys, partition_of, ranks
from pipeline.selection import Groups, representative_uid, survivors

# units of (uid, body, url, caption, source)
Sample = tuple[int, str, str, str, str]
UNITS: tuple[tuple[Sample, ...], ...] = (
    ((9, "a", "u1", "short", "web"), (2, "b", "u2", "words", "web"), (3, "c", "u3", "words", "web")),
    (),
    ((4, "a", "u3", "a long caption", "web"), (8, "b", "u5", "words", "best")),
    ((7, "a", "u4", "short", "web"), (1, "d", "u2", "words", "web"), (6, "c", "u6", "other", "web")),
)
PRIORITIES = {"best": 2, "web": 1}


def facts(samples: tuple[Sample, ...], unit: int = 0, priorities: Mapping[str, int] = PRIORITIES) -> Records:
    columns = list(zip(*samples, strict=True)) if samples else [()] * 5
    table = pa.table(
        {
            "uid": pa.array([f"{uid:032x}" for uid in columns[0]], pa.string()),
            "sha256": pa.array([hashlib.sha256(body.encode()).hexdigest() for body in columns[1]], pa.string()),
            "url": pa.array(columns[2], pa.string()),
            "caption": pa.array(columns[3], pa.string()),
            "source": pa.array(columns[4], pa.string()),
        }
    )
    return facts_of(table, unit, range(len(samples)), priorities)


def rows_of(sample: Sample) -> dict[str, Any]:
    return dict(zip(("uid", "body", "url", "caption"), sample, strict=False))


@pytest.fixture(params=[(1, 1), (3, 2), (1_000_000, 1), (1_000_000, 7)], ids=str)
def cut(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups, many partitions."""
    rows, partitions = request.param
    groups = Groups.of
    monkeypatch.setattr(Groups, "of", staticmethod(lambda counts: groups(counts, rows)))
    monkeypatch.setattr(exact, "num_partitions", lambda _: partitions)


def curated(store: Store, fetched: list[Marker], *dedup: str) -> Curated:
    def run(stage: Any) -> dict[str, Marker]:
        sent = pickle.loads(pickle.dumps(stage))
        here = SimpleNamespace(**{**vars(sent), "units": stage.units, "run": sent.run})
        return run_stage(cast(Any, here), Journal(store), InlineExecutor(), Progress())

    config = parse(BuildConfig, ["input=list", "output=out", *dedup])
    context = Context(config=config, store=store, run_stage=run)
    return curate(context, {marker.unit: marker for marker in fetched})


def duplicates_of(store: Store, done: Curated) -> dict[tuple[int, int], tuple[str, int]]:
    """(unit, row) -> (reason, uid of the representative)."""
    return {
        (unit.index, int(drop["row"])): (step.reason, int(representative_uid(drop) or "0", 16))
        for step in done.drops
        for unit in done.units
        for drop in step.of_unit(store, unit.index)
    }


@pytest.mark.usefixtures("cut")
def test_the_smallest_uid_represents_identical_bytes(store: Store, fetch: Any) -> None:
    done = curated(store, fetch([[rows_of(sample) for sample in unit] for unit in UNITS]))
    told = "duplicate_bytes"
    assert duplicates_of(store, done) == {
        (0, 0): (told, 4),
        (2, 1): (told, 2),
        (3, 0): (told, 4),
        (3, 2): (told, 3),
    }
    assert done.num_kept == (2, 0, 1, 1)
    assert [survivors(store, unit, done.drops).tolist() for unit in done.units] == [[1, 2], [], [0], [1]]


@pytest.mark.usefixtures("cut")
def test_criteria_are_steps_of_which_each_sees_what_those_before_have_left(store: Store, fetch: Any) -> None:
    fetched = fetch([[rows_of(sample) for sample in unit] for unit in UNITS])
    done = curated(store, fetched, "dedup.exact=false", "dedup.by_url=true", "dedup.by_bytes_and_caption=true")
    assert duplicates_of(store, done) == {
        (0, 1): ("duplicate_url", 1),
        (2, 0): ("duplicate_url", 3),
        (0, 0): ("duplicate_pair", 7),
    }
    assert done.num_kept == (1, 0, 1, 3)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("prefer", "kept"), [("uid", 1), ("caption", 3)])
def test_a_build_keeps_what_is_preferred(store: Store, fetch: Any, prefer: str, kept: int) -> None:
    captions = {1: "short", 2: "words", 3: "a long caption"}
    fetched = fetch([[{"uid": uid, "body": "same", "caption": caption}] for uid, caption in captions.items()])
    done = curated(store, fetched, f"dedup.prefer=[{prefer}]")
    assert {uid for _, uid in duplicates_of(store, done).values()} == {kept}
    assert done.num_kept == tuple(int(uid == kept) for uid in captions)


def test_only_the_facts_that_are_compared_are_written() -> None:
    always = ("unit", "row", "uid_high", "uid_low")
    same = ("bytes_high", "bytes_low")
    sources = "sources={a: {input: list, priority: 1}, b: {input: more}}"
    for given, names in (
        (["dedup.exact=false"], ("flags",)),
        ([], (*same, "flags")),
        (["dedup.near_distance=3"], (*same, "phash", "phash_mirror", "flags")),
        (["dedup.by_url=true"], (*same, "url_high", "url_low", "flags")),
        (["dedup.by_bytes_and_caption=true"], (*same, "caption_high", "caption_low", "flags")),
        (["dedup.prefer=[caption]"], (*same, "num_chars", "flags")),
        ([sources], (*same, "priority", "flags")),
    ):
        needed = needed_facts(parse(BuildConfig, ["output=out", *(["input=list"] * (given != [sources])), *given]))
        assert needed.names == (*always, *names)
        assert needed.itemsize % 8 == 0  # what is not aligned is copied three times as slowly
        table = pa.table({"uid": ["1" * 32], "sha256": ["2" * 64], "url": ["u"], "caption": ["c"]})
        some, whole = (facts_of(table, 7, [5], {}, dtype) for dtype in (needed, FACTS))
        for name in {*needed.names} - {"flags"}:
            assert some[name] == whole[name]


def test_facts_that_were_cut_short_or_changed_are_named(store: Store, fetch: Any) -> None:
    done = curated(store, fetch([[rows_of(sample) for sample in unit] for unit in UNITS]))
    num_kept = tuple(marker.counts["kept"] for marker in Journal(store).markers("decide").values())
    (task,) = exchange.facts_tasks(replace(done, num_kept=num_kept))
    assert len(exchange.read_facts(store, task.params, ())) == 8
    path = Path(store.full(done.units[2].facts.path))
    whole = path.read_bytes()
    for damaged, told in (
        (whole[:-1], "is shorter than it was"),
        (whole[:-1] + b"!", "is damaged"),
        (None, "is missing"),
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(RunError, match=told):
            exchange.read_facts(store, task.params, ())


@pytest.mark.usefixtures("cut")
def test_one_key_that_every_sample_has(store: Store, fetch: Any) -> None:
    units = [[{"uid": 100 * unit + row + 5, "body": "same"} for row in range(30)] for unit in range(5)]
    units[3][7]["uid"] = 1
    done = curated(store, fetch(units))
    assert done.num_kept == (0, 0, 0, 1, 0)
    found = duplicates_of(store, done)
    assert len(found) == 149
    assert {uid for _, uid in found.values()} == {1}


def test_no_duplicates_and_no_samples_at_all(store: Store, fetch: Any) -> None:
    done = curated(store, fetch([[{"uid": 1, "body": None}], [{"uid": 2, "body": "a"}], []]))
    assert done.num_kept == (0, 1, 0)
    assert duplicates_of(store, done) == {}
    assert curated(Store(f"{store.url}-of-nothing"), []).num_kept == ()


@pytest.mark.parametrize(
    ("prefer", "kept"),
    [
        (["uid"], {"a": 4, "b": 2, "c": 3, "d": 1}),
        (["source"], {"a": 4, "b": 8, "c": 3, "d": 1}),
        (["caption"], {"a": 4, "b": 2, "c": 3, "d": 1}),
        (["caption", "source", "uid"], {"a": 4, "b": 8, "c": 3, "d": 1}),
    ],
)
def test_preference_decides_who_represents(prefer: Any, kept: dict[str, int]) -> None:
    samples = tuple(sample for unit in UNITS for sample in unit)
    known = facts(samples)
    keys = make_keys(known, *BYTES.keys(known), ranks(known, DedupConfig(prefer=prefer).prefer))
    _, representatives = find_duplicates(keys)
    body_of = {uid: body for uid, body, *_ in samples}
    told = {body_of[int(key["uid_low"])]: int(key["uid_low"]) for key in representatives}
    assert told == {body: uid for body, uid in kept.items() if body != "d"}


def test_the_greatest_priorities_are_told_apart_and_greater_ones_refused() -> None:
    limit = 10**9
    given = facts(tuple((uid, "a", "u", "c", name) for uid, name in enumerate("abc")), 0, {"a": -limit, "c": limit})
    assert np.argsort(ranks(given, ["source", "caption"])).tolist() == [2, 1, 0]
    for priority in (-limit - 1, limit + 1):
        with pytest.raises(RequestError, match="priority"):
            parse(BuildConfig, ["output=out", f"sources={{a: {{input: list, priority: {priority}}}}}"])


@pytest.mark.parametrize("prefer", [["uid", "source"], ["source", "source"], ["name"]])
def test_preferences_that_make_no_sense_are_refused(prefer: Any) -> None:
    with pytest.raises(ValueError, match="prefer"):
        DedupConfig(prefer=prefer)


@pytest.mark.parametrize("has_ranks", [True, False])
def test_the_result_does_not_depend_on_the_order_of_the_keys(has_ranks: bool) -> None:
    draw = np.random.default_rng(0)
    bodies, uids = draw.integers(0, 50, 400), draw.permutation(400)
    known = facts(tuple((int(uid), str(body), "", "", "") for uid, body in zip(uids, bodies, strict=True)))
    expected = {body: min(uids[bodies == body]) for body in set(bodies)}
    keys = make_keys(known, *BYTES.keys(known), ranks(known, ["uid"]) if has_ranks else None)
    for _ in range(3):
        dropped, representatives = find_duplicates(keys[draw.permutation(400)])
        assert len(dropped) == 400 - len(expected)
        for row, low in zip(dropped["row"].tolist(), representatives["uid_low"].tolist(), strict=True):
            assert low == expected[bodies[row]]


def test_words_are_sorted_to_the_same_result_as_records(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    keys = np.zeros(5_000, KEY)
    for name in ("uid_high", "uid_low"):
        keys[name] = draw.integers(0, 2**64, len(keys), np.uint64)
    keys["row"], keys["rank"] = np.arange(len(keys)), draw.integers(1, 4, len(keys))
    hashes = draw.integers(0, 2**64, (2_000, 2), np.uint64)
    keys["key_high"], keys["key_low"] = hashes[draw.integers(0, len(hashes), len(keys))].T
    best: dict[Any, Any] = {}
    for key in np.sort(keys, order=["rank", "uid_high", "uid_low"])[::-1]:
        best[int(key["key_high"]), int(key["key_low"])] = int(key["row"])
    expected = {
        int(key["row"]): of
        for key in keys
        if (of := best[int(key["key_high"]), int(key["key_low"])]) != int(key["row"])
    }
    slow = keys_module._find_by_sorting
    monkeypatch.setattr(keys_module, "_find_by_sorting", None)  # uids differ at once: nobody needs it
    found = keys_module.find_places(keys)
    assert len(found[0]) == len(expected)
    assert dict(zip(*(side.tolist() for side in found), strict=True)) == expected
    assert dict(zip(*(side.tolist() for side in slow(keys, np.arange(len(keys)))), strict=True)) == expected


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_keys_have_no_duplicates(count: int) -> None:
    known = facts(((1, "a", "u", "c", "s"),) * count)
    dropped, representatives = find_duplicates(make_keys(known, *BYTES.keys(known), ranks(known, [])))
    assert len(dropped) == len(representatives) == 0


@pytest.mark.parametrize("has_ranks", [True, False])
def test_keys_and_uids_that_begin_alike_are_told_apart(has_ranks: bool) -> None:
    known = facts(tuple((uid, "a", "u", "c", "s") for uid in (3, 1, 2, 7, 8)))
    keys = make_keys(known, *BYTES.keys(known), ranks(known, []) if has_ranks else None)
    keys["key_high"] = [1, 2, 1, 2, 3]  # key_low is the same
    dropped, representatives = find_duplicates(keys)
    assert sorted(zip(dropped["row"].tolist(), representatives["row"].tolist(), strict=True)) == [(0, 2), (3, 1)]


def test_keys_of_several_facts_differ_when_one_differs() -> None:
    known = facts(((1, "a", "u", "c", "s"), (2, "a", "u", "d", "s"), (3, "b", "u", "c", "s"), (4, "a", "v", "c", "s")))
    pairs = list(zip(*(words.tolist() for words in BYTES_AND_CAPTION.keys(known)), strict=True))
    assert len(set(pairs)) == 3
    assert pairs[0] == pairs[3]
    assert len(set(URL.keys(known)[1].tolist())) == 2


def test_samples_without_a_hash_of_their_bytes_are_left_alone() -> None:
    columns = {"uid": ["0" * 32] * 2, "url": ["u"] * 2, "caption": ["c"] * 2}
    without = facts_of(pa.table(columns | {"sha256": pa.nulls(2, pa.string())}), 0, range(2), {})
    assert not BYTES.has_key(without).any()
    assert not BYTES_AND_CAPTION.has_key(facts_of(pa.table(columns), 0, range(2), {})).any()
    assert URL.has_key(without).all()


def test_samples_without_a_url_are_not_duplicates_of_one_another() -> None:
    columns = {"uid": [f"{uid:032x}" for uid in range(4)], "url": [None, None, "", "u"], "caption": ["c"] * 4}
    assert URL.has_key(facts_of(pa.table(columns), 0, range(4), {})).tolist() == [False, False, False, True]


def test_facts_of_each_unit_are_told_apart_also_of_units_without_any() -> None:
    sample = UNITS[0][0]
    several = np.concatenate([facts((sample,) * count, unit) for unit, count in ((3, 2), (5, 1))])
    parts = exchange.of_units(several, {"first_unit": 2, "end_unit": 7})
    assert [part["unit"].tolist() for part in parts] == [[], [3, 3], [], [5], []]


def test_partitions_follow_from_the_number_of_keys() -> None:
    assert [exchange.num_partitions(keys) for keys in (0, 1, 1_000_000, 1_000_001)] == [1, 1, 1, 2]


def test_partitions_cover_the_whole_hash_space_in_order() -> None:
    hashes = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    for count in (1, 3, 1000):
        partitions = partition_of(hashes, count).tolist()
        assert partitions == sorted(partitions)
        assert partitions[0] == 0
        assert partitions[-1] == count - 1


@pytest.mark.parametrize(
    ("counts", "starts"),
    [((), (0,)), ((0,), (0, 1)), ((5, 5, 1), (0, 2, 3)), ((20, 20), (0, 1, 2)), ((0, 0, 9, 2, 0), (0, 3, 5))],
)
def test_groups_have_about_as_many_rows_each(counts: tuple[int, ...], starts: tuple[int, ...]) -> None:
    groups = Groups.of(counts, 10)
    assert groups.starts == starts
    assert [groups.of_unit(unit) for unit in range(len(counts))] == [
        group for group in range(len(groups)) for _ in range(*groups.range(group))
    ]
