"""Decisions are rows; the first rule that fails is blamed; nothing but columns is read."""

import hashlib
import io
from typing import Any

import numpy as np
import pytest

from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal, Marker
from cluster.progress import Progress
from cluster.store import Store
from pipeline.buckets import Records
from pipeline.decide import DecideStage
from pipeline.duplicates.facts import FACTS, HAS_BYTES, HAS_LOOK, HAS_URL
from pipeline.rules.chosen import image_rules
from pipeline.rules.config import CurateConfig
from pipeline.rules.images import AspectRatio, Blank, MinimumSide
from pipeline.selection import read_table


def run_decide(store: Store, fetched: list[Marker], rules: Any) -> list[Marker]:
    stage = DecideStage.of(store, fetched, rules)
    return list(run_stage(stage, Journal(store), InlineExecutor(), Progress()).values())


def kept_rows(store: Store, marker: Marker) -> list[int]:
    rows: list[int] = np.load(io.BytesIO(store.read_bytes(marker.path_of("kept.npy")))).tolist()
    return rows


def facts(store: Store, marker: Marker) -> Records:
    return np.frombuffer(store.read_bytes(marker.path_of("facts.bin")), FACTS)


def test_every_rule_writes_a_row_for_every_downloaded_pair(store: Store, fetch: Any) -> None:
    fetched = fetch([[{"uid": 1}, {"uid": 2, "body": None}, {"uid": 3, "width": 20, "grey_std": 0.0}]])
    rules = (MinimumSide(threshold=32), Blank(threshold=1.0))
    (marker,) = run_decide(store, fetched, rules)
    table = read_table(store, marker.path_of("decisions.parquet")).to_pylist()
    assert [(row["row"], row["rule"], row["score"], row["keep"]) for row in table] == [
        (0, "curate.min_side_px", 48.0, True),
        (2, "curate.min_side_px", 20.0, False),
        (0, "curate.blank_threshold", 40.0, True),
        (2, "curate.blank_threshold", 0.0, False),
    ]
    assert [row["threshold"] for row in table] == [32.0, 32.0, 1.0, 1.0]
    assert kept_rows(store, marker) == [0]
    assert marker.counts == {
        "rows": 2,
        "reason:image_too_small": 1,
        "kept": 1,
        "drops:curate.min_side_px": 1,
        "first:curate.min_side_px": 1,
        "drops:curate.blank_threshold": 1,
        "both:curate.min_side_px+curate.blank_threshold": 1,
    }


def test_counts_are_of_input_rows(store: Store, fetch: Any) -> None:
    fetched = fetch([[{"uid": 1, "num_rows": 5, "width": 10}, {"uid": 2, "num_rows": 2}]])
    (marker,) = run_decide(store, fetched, (MinimumSide(threshold=32),))
    assert {name: number for name, number in marker.counts.items() if "curate" not in name} == {
        "rows": 7,
        "reason:image_too_small": 5,
        "kept": 1,
    }
    assert marker.counts["drops:curate.min_side_px"] == marker.counts["alone:curate.min_side_px"] == 1


@pytest.mark.parametrize(
    ("rule", "row", "keep"),
    [
        (MinimumSide(threshold=48), {"width": 64, "height": 48}, True),
        (MinimumSide(threshold=49), {"width": 64, "height": 48}, False),
        (AspectRatio(threshold=2.0), {"width": 64, "height": 32}, True),
        (AspectRatio(threshold=2.0), {"width": 32, "height": 65}, False),
        (Blank(threshold=1.0), {"grey_std": 1.0}, False),
        (Blank(threshold=1.0), {"grey_std": 1.01}, True),
    ],
)
def test_thresholds_are_inclusive_as_documented(
    store: Store, fetch: Any, rule: Any, row: dict[str, Any], keep: bool
) -> None:
    (marker,) = run_decide(store, fetch([[{"uid": 1, **row}]]), (rule,))
    assert kept_rows(store, marker) == ([0] if keep else [])


def test_no_rules_keep_every_download(store: Store, fetch: Any) -> None:
    (marker,) = run_decide(store, fetch([[{"uid": 1}, {"uid": 2, "body": None}, {"uid": 3}]]), ())
    assert kept_rows(store, marker) == [0, 2]
    assert read_table(store, marker.path_of("decisions.parquet")).num_rows == 0


def test_a_unit_without_a_download_decides_nothing(store: Store, fetch: Any) -> None:
    (marker,) = run_decide(store, fetch([[{"uid": 1, "body": None}]]), image_rules(CurateConfig()))
    assert kept_rows(store, marker) == []
    assert len(facts(store, marker)) == 0


def test_what_is_compared_is_there_for_every_kept_row(store: Store, fetch: Any) -> None:
    pairs = [{"uid": uid, "body": "same", "width": 10 if uid == 7 else 64, "phash": 5} for uid in range(10)]
    pairs[3] |= {"phash_mirror": 6, "caption": "four\N{SNOWMAN}"}
    found = facts(store, run_decide(store, fetch([[], pairs]), (MinimumSide(threshold=32),))[1])
    kept = [row for row in range(10) if row != 7]
    assert found["row"].tolist() == kept
    assert set(found["unit"].tolist()) == {1}
    assert found["uid_low"].tolist() == kept
    assert set(found["bytes_high"].tolist()) == {int(hashlib.sha256(b"same").hexdigest()[:16], 16)}
    assert len(set(found["url_low"].tolist())) == len(set(found["caption_low"].tolist())) == 9
    assert found["num_chars"][3] == 5
    assert found["flags"].tolist() == [HAS_BYTES | HAS_URL | (HAS_LOOK if row == 3 else 0) for row in kept]
    assert (found["phash"][3], found["phash_mirror"][3]) == (5, 6)


def test_rules_come_from_the_configuration() -> None:
    assert image_rules(CurateConfig(drop_blank=False)) == ()
    assert image_rules(CurateConfig(min_side_px=32, max_aspect_ratio=3, blank_threshold=2)) == (
        MinimumSide(threshold=32),
        AspectRatio(threshold=3),
        Blank(threshold=2),
    )
