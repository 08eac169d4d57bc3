"""Captions are counted over all lists: exactly, however the work is spread, stopped or repeated."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import parse
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.plan import OrderStage, ReadStage
from pipeline.rules.frequency import KEY, hashes_of, pairs_of, with_pairs

STAGES = ("caption-keys", "caption-counts", "plan-order")
# A caption in other case and with other blanks is the same; so are two rows of one pair.
ROWS = [
    *((f"http://a/{number}", "Buy  NOW" if number % 2 else "buy now ") for number in range(30)),
    ("http://a/1", "Buy  NOW"),
    *((f"http://b/{number}", f"caption {number % 40}") for number in range(80)),
    *((f"http://c/{number}", "") for number in range(20)),
    ("not a url", "buy now"),
]


class Backwards:
    """Two threads, the last unit first."""

    def map_unordered(self, function: Callable[[Any], Any], items: Sequence[Any], **resources: Any) -> Iterator[Any]:
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(function, list(reversed(items)))


class Killed:
    """Ends after so many units of all stages."""

    def __init__(self, left: int) -> None:
        self.left = left

    def map_unordered(self, function: Callable[[Any], Any], items: Sequence[Any], **resources: Any) -> Iterator[Any]:
        for item in items:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield function(item)


def write(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    path.write_text("\n".join(["url,caption", *(f'"{url}","{caption}"' for url, caption in rows)]) + "\n")
    return str(path)


def plan(folder: Path, inputs: list[str], executor: Any, *settings: str) -> None:
    words = [f"input={json.dumps(inputs)}", f"output={folder}", "plan.rows_per_range=20", "plan.rows_per_unit=7"]
    config = parse(BuildConfig, [*words, "curate.max_caption_pairs=2", *settings])
    journal = Journal(Store(str(folder)))

    def run(stage: Any) -> Any:
        return run_stage(stage, journal, executor, Progress())

    order = OrderStage.of(config, journal.store, run(ReadStage.of(config)))
    run(order.with_rules(config.curate, run))


def contents(folder: Path) -> dict[tuple[str, str, str], str]:
    """sha256 of every output of the stages."""
    journal = Journal(Store(str(folder)))
    return {
        (stage, unit, output.name): output.sha256
        for stage in STAGES
        for unit, marker in journal.markers(stage).items()
        for output in marker.outputs
    }


def scores(folder: Path) -> dict[str, float | None]:
    """What the rule measured of every pair, by caption as written; the last one of each."""
    found = {}
    for marker in Journal(Store(str(folder))).markers("plan-order").values():
        rows = pq.read_table(folder / marker.path_of("rows.parquet")).to_pylist()
        said = {row["uid"]: row for row in pq.read_table(folder / marker.path_of("decisions.parquet")).to_pylist()}
        for row in rows:
            if row["uid"] in said:
                found[row["caption"]] = said[row["uid"]]["score"]
                assert said[row["uid"]]["keep"] == (said[row["uid"]]["score"] <= 2) == (row["reason"] is None)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    plan(folder / "out", [write(folder / "all.csv", ROWS)], InlineExecutor())
    return folder


def test_pairs_are_counted_over_all_ranges(undisturbed: Path) -> None:
    assert len(Journal(Store(str(undisturbed / "out"))).markers("caption-keys")) > 4
    found = scores(undisturbed / "out")
    assert (found["buy now "], found["Buy  NOW"], found[""]) == (30, 30, 0)
    assert {found[f"caption {number}"] for number in range(40)} == {2}


def test_how_rows_are_spread_over_lists_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    lists = [write(tmp_path / f"{part}.csv", list(reversed(ROWS[part::3]))) for part in range(3)]
    plan(tmp_path / "out", lists, InlineExecutor())
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_two_workers_in_another_order_write_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    plan(tmp_path / "out", [str(undisturbed / "all.csv")], Backwards())
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_stopped_after_any_unit_it_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    for left in (2, 5, 9, 13, 17):
        with contextlib.suppress(KeyboardInterrupt):
            plan(tmp_path / "out", [str(undisturbed / "all.csv")], Killed(left))
    plan(tmp_path / "out", [str(undisturbed / "all.csv")], InlineExecutor())
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_without_the_rule_nothing_is_counted(undisturbed: Path, tmp_path: Path) -> None:
    plan(tmp_path / "out", [str(undisturbed / "all.csv")], InlineExecutor(), "curate.max_caption_pairs=null")
    assert not (tmp_path / "out" / "journal" / "caption-keys").exists()


def test_captions_that_nobody_shares_are_of_one_pair() -> None:
    rows = pa.table({"caption": ["a", "A ", "b", "", None]})
    hashes = hashes_of(rows)
    assert hashes[0] == hashes[1]
    assert pairs_of(hashes, np.empty(0, KEY)).tolist() == [1, 1, 1, 0, 0]
    assert with_pairs(rows, np.empty(0, KEY)).num_columns == 2
