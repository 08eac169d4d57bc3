import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import parse
from cluster.errors import RequestError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline import plan
from pipeline.config import BuildConfig
from pipeline.identity import keys_of_text, order_of, range_bounds, uid_digest, uid_keys, uid_text
from pipeline.plan import OrderStage, ReadStage

Row = dict[str, Any]
ROWS: list[Row] = [{"url": f"http://h{i % 7}.example/{i}.jpg", "caption": f"caption {i}"} for i in range(500)]


def write_csv(path: Path, rows: list[Row]) -> str:
    path.write_text("\n".join(["url,caption", *(f"{row['url']},{row['caption']}" for row in rows)]) + "\n")
    return str(path)


def make_plan(folder: Path, inputs: list[str], *settings: str) -> tuple[list[list[Row]], dict[str, int]]:
    """The planned rows of every fetch unit, in order, and the summed counts of plan-order."""
    config = parse(BuildConfig, [f"input={json.dumps(inputs)}", f"output={folder}", *settings])
    store = Store(str(folder))
    journal, progress = Journal(store), Progress()
    read = run_stage(ReadStage.of(config), journal, InlineExecutor(), progress)
    order = OrderStage.of(config, store, read).with_rules(
        config.curate, lambda stage: run_stage(stage, journal, InlineExecutor(), progress)
    )
    ordered = run_stage(order, journal, InlineExecutor(), progress)
    units: list[list[Row]] = []
    counts: dict[str, int] = {}
    for marker in ordered.values():
        with store.open(marker.path_of("rows.parquet")) as raw, pq.ParquetFile(raw) as file:
            assert file.num_row_groups == marker.counts["units"]
            units += [file.read_row_group(group).to_pylist() for group in range(file.num_row_groups)]
        for name, number in marker.counts.items():
            counts[name] = counts.get(name, 0) + number
    return units, counts


def flat(units: list[list[Row]]) -> list[Row]:
    return [row for unit in units for row in unit]


def test_every_row_is_planned_once_in_seeded_order(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    units, counts = make_plan(tmp_path / "out", [source], "plan.rows_per_unit=30", "plan.rows_per_range=200", "seed=3")
    rows = flat(units)
    assert sorted((row["url"], row["caption"]) for row in rows) == sorted(tuple(row.values()) for row in ROWS)
    assert [row["order"] for row in rows] == sorted(row["order"] for row in rows)
    assert all(len(unit) <= 30 for unit in units)
    assert counts == {"rows": 500, "pairs": 500, "units": len(units)}
    assert all(row["uid"] == uid_digest(row["url"], row["caption"]).hex() for row in rows)
    other, _ = make_plan(tmp_path / "other", [source], "seed=4")
    assert [row["uid"] for row in flat(other)] != [row["uid"] for row in rows]


def test_plan_does_not_depend_on_files_or_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("plan.rows_per_unit=40", "plan.rows_per_range=150")
    one, _ = make_plan(tmp_path / "one", [write_csv(tmp_path / "a.csv", ROWS)], *settings)
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    parts = [write_csv(tmp_path / f"part{i}.csv", shuffled[i::3]) for i in range(3)]
    monkeypatch.setattr(plan, "RUN_ROWS", 50)
    monkeypatch.setattr(plan, "READ_GROUP_ROWS", 16)
    many, _ = make_plan(tmp_path / "many", parts[::-1], *settings)
    assert many == one


def test_identical_pairs_are_one_row_that_counts_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RUN_ROWS", 8)
    first = pa.table({"url": ["http://a/1", "http://a/2"] * 10, "caption": ["x"] * 20, "n": range(20)})
    second = pa.table({"url": [" http://a/1 ", "http://a/1"], "caption": ["x", "y"], "n": [100, 101]})
    pq.write_table(first, tmp_path / "a.parquet")
    pq.write_table(second, tmp_path / "b.parquet")
    units, counts = make_plan(tmp_path / "out", [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")])
    found = {(row["url"], row["caption"]): (row["num_rows"], row["n"]) for row in flat(units)}
    assert found == {
        ("http://a/1", "x"): (11, 0),
        ("http://a/2", "x"): (10, 1),
        ("http://a/1", "y"): (1, 101),
    }
    assert (counts["rows"], counts["pairs"]) == (22, 3)


def test_rows_that_cannot_be_fetched_are_planned_with_their_reason(tmp_path: Path) -> None:
    bad: list[Row] = [
        {"url": None, "caption": "no url"},
        {"url": "  ", "caption": "blank url"},
        {"url": "ftp://a/1", "caption": "ftp"},
        {"url": "javascript:alert(1)", "caption": "script"},
        {"url": "http:///path", "caption": "no host"},
        {"url": "http://a/\x00", "caption": "control"},
        {"url": "http://a/" + "x" * 100_000, "caption": "endless"},
        {"url": "http://[::1", "caption": "bracket"},
        {"url": "http://bücher.example/ü x.jpg", "caption": "fine"},
        {"url": "http://a/1", "caption": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, bad)) + "\n{broken\n")
    units, counts = make_plan(tmp_path / "out", [str(tmp_path / "a.jsonl")])
    reasons = {row["caption"]: row["reason"] for row in flat(units)}
    assert reasons == {
        "no url": "missing_url",
        "blank url": "missing_url",
        "ftp": "unsupported_scheme",
        "script": "unsupported_scheme",
        "no host": "invalid_url",
        "control": "invalid_url",
        "endless": "invalid_url",
        "bracket": "invalid_url",
        "fine": None,
        "": None,
        "{broken\n": "unreadable_row",
    }
    assert (counts["rows"], counts["reason:invalid_url"], counts["reason:missing_url"]) == (11, 4, 2)


def test_caption_rules_drop_before_the_download_with_score_and_threshold(tmp_path: Path) -> None:
    captions = [
        "a",
        "a red bicycle in front of the house",
        "ein rotes Fahrrad mit Korb",
        "oneword",
        "z" * 300,
    ]
    rows = [{"url": f"http://a/{i}", "caption": caption} for i, caption in enumerate(captions)]
    units, counts = make_plan(
        tmp_path / "out",
        [write_csv(tmp_path / "a.csv", rows)],
        *("curate.min_caption_chars=3", "curate.min_caption_words=2", "curate.max_caption_chars=200"),
        "curate.languages=[en]",
    )
    verdicts = {
        row["caption"][:30]: (row["reason"], row["rule"], row["score"], row["threshold"]) for row in flat(units)
    }
    assert verdicts["a"] == ("caption_too_short", "curate.min_caption_chars", 1.0, 3.0)
    assert verdicts["oneword"] == ("caption_too_short", "curate.min_caption_words", 1.0, 2.0)
    assert verdicts["a red bicycle in front of the "] == (None, None, None, None)
    german = verdicts["ein rotes Fahrrad mit Korb"]
    assert german[:2] == ("caption_language", "curate.languages")
    assert german[2] is not None
    assert german[2] > 0.5
    assert counts["reason:caption_too_short"] == 3


def test_sources_are_recorded_with_their_hash_and_rows(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    config = parse(BuildConfig, [f"input={source}", f"output={tmp_path / 'out'}"])
    journal = Journal(Store(str(tmp_path / "out")))
    markers = run_stage(ReadStage.of(config), journal, InlineExecutor(), Progress())
    (marker,) = markers.values()
    entry = json.loads(journal.store.read_bytes(marker.path_of("source.json")))
    assert (entry["path"], entry["num_rows"]) == ("a.csv", 500)
    assert (entry["size_bytes"], len(entry["sha256"])) == (Path(source).stat().st_size, 64)


def test_list_that_changed_since_the_run_began_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    make_plan(tmp_path / "out", [source])
    write_csv(tmp_path / "a.csv", ROWS[:-1])
    config = parse(BuildConfig, [f"input={source}", f"output={tmp_path / 'out'}"])
    with pytest.raises(RequestError, match="not those that this run began with"):
        ReadStage.of(config).refuse_changed(Journal(Store(str(tmp_path / "out"))))


def test_list_edited_in_place_to_the_same_size_is_refused(tmp_path: Path) -> None:
    source = Path(write_csv(tmp_path / "a.csv", ROWS))
    make_plan(tmp_path / "out", [str(source)])
    config = parse(BuildConfig, [f"input={source}", f"output={tmp_path / 'out'}"])
    journal = Journal(Store(str(tmp_path / "out")))
    os.utime(source, (1, 1))  # another time, the same content: not another list
    ReadStage.of(config).refuse_changed(journal)
    source.write_text(source.read_text().replace("caption 7\n", "caption 8\n"))
    with pytest.raises(RequestError, match=r"a\.csv: its content is not what this run began with"):
        ReadStage.of(config).refuse_changed(journal)


def test_long_texts_make_more_ranges_and_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(tmp_path / "a.csv", ROWS)
    rows = flat(make_plan(tmp_path / "one", [source])[0])
    monkeypatch.setattr(plan, "RANGE_TEXT_BYTES", 10_000)
    assert flat(make_plan(tmp_path / "many", [source])[0]) == rows
    assert len(Journal(Store(str(tmp_path / "many"))).markers("plan-order")) > 3


def test_list_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no rows"):
        make_plan(tmp_path / "out", [write_csv(tmp_path / "a.csv", [])])


def test_uids_are_their_text_and_tell_url_from_caption() -> None:
    keys = uid_keys(pa.array(["http://a", None, "http://ab"]), pa.array(["bc", "http://abc", "c"]))
    assert len(np.unique(keys, axis=0)) == 3
    text = uid_text(keys)
    assert text.to_pylist()[0] == uid_digest("http://a", "bc").hex()
    assert (keys_of_text(text) == keys).all()
    assert sorted(range(3), key=lambda i: tuple(keys[i])) == sorted(range(3), key=lambda i: text[i].as_py())


def test_order_is_uniform_over_ranges_and_seeds_are_unrelated() -> None:
    keys = uid_keys(pa.array([f"http://a/{i}" for i in range(20_000)]), pa.array([""] * 20_000))
    places = order_of(keys, seed=0)
    counts = [int(((places >= first) & (places <= last)).sum()) for first, last in range_bounds(10)]
    assert sum(counts) == 20_000
    assert max(abs(count - 2_000) for count in counts) < 5 * 2_000**0.5  # five standard deviations
    assert abs(np.corrcoef(places.astype(float), order_of(keys, seed=1).astype(float))[0, 1]) < 0.03
