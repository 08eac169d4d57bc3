"""What every rule and step of curation said of one pair, in the order in which they were asked."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import validate
from cluster.errors import RequestError
from cluster.journal import Journal, Marker
from cluster.run import read_run
from cluster.store import Store
from pipeline.config import BuildConfig
from pipeline.curation.replay import replayed
from pipeline.generations import stage_name
from pipeline.identity import range_bounds
from pipeline.selection import Drops, read_checked, representative_uid, survivors

_SIDES = {"at_least": "at least", "at_most": "at most", "above": "above", "below": "below"}


@dataclass(frozen=True, kw_only=True)
class Said:
    """One verdict. keep: None of a step's, which only names what it drops."""

    rule: str
    score: float | None
    keeps: str | None
    threshold: float | None
    keep: bool
    reason: str | None
    detail: str | None = None

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Said":
        """From a row of DECISIONS, or what is left of it in a record: the name tells there which scores are kept."""
        key = row["rule"].rpartition(".")[2]
        side = "at_least" if key.startswith("min_") else "at_most" if key.startswith("max_") else None
        return Said(
            rule=row["rule"],
            score=row["score"],
            keeps=row.get("keeps", side),
            threshold=row["threshold"],
            keep=bool(row.get("keep", False)),
            reason=row["reason"],
            detail=row.get("detail"),
        )

    def __str__(self) -> str:
        """`curate.min_side_px: 48 (keeps at least 16), kept`"""
        score = "" if self.score is None else "could not be measured" if np.isnan(self.score) else f"{self.score:.6g}"
        side = "threshold" if self.keeps is None else f"keeps {_SIDES[self.keeps]}"
        limit = "" if self.threshold is None else f"({side} {self.threshold:.6g})"
        outcome = "kept" if self.keep else f"dropped: {self.reason}"
        told = [" ".join(filter(None, (score, limit))), f"[{self.detail}]" if self.detail else ""]
        return f"{self.rule}: {' '.join(filter(None, told))}".rstrip(": ") + f", {outcome}"


def before_download(store: Store, row: Mapping[str, Any]) -> list[Said]:
    """What the rules that need no image said; empty when their decisions are gone, or nobody asked them."""
    ranges = list(Journal(store).markers("plan-order").values())
    if not ranges:
        return []
    starts = np.array([first for first, _ in range_bounds(len(ranges))], np.uint64)
    marker = ranges[int(np.searchsorted(starts, np.uint64(row["order"]), side="right")) - 1]
    with contextlib.suppress(FileNotFoundError, KeyError):  # work/ may be removed
        for group in _groups_with(store, marker.path_of("rows.parquet"), row["order"]):
            if found := _of_uid(store, marker.path_of("decisions.parquet"), row["uid"], group):
                return found
    return []


def after_download(store: Store, row: Mapping[str, Any], unit: str) -> list[Said]:
    """What the rules about images said; of the repair that tried the pair last, if one did."""
    journal = Journal(store)
    if number := row.get("generation"):
        decided: list[Marker | None] = [*journal.markers(stage_name(number, "decide")).values()]
    else:
        decided = [journal.marker("decide", unit)]
    with contextlib.suppress(FileNotFoundError):
        return [
            said
            for marker in decided
            if marker
            for said in _of_uid(store, marker.path_of("decisions.parquet"), row["uid"])
        ]
    return []


def undone_steps(store: Store, uid: str, unit: str) -> tuple[Said | None, str | None] | None:
    """(the step that drops a pair of a build that is not packed yet, the uid of what represents it).

    (None, None) when it is kept; None when it is not decided.
    """
    record = read_run(store) or {}
    try:
        curated = replayed(store, validate(BuildConfig, record["config"]))
    except (RequestError, KeyError):
        return None
    if curated is None:
        return None
    place = next((decided for decided in curated.units if decided.id == unit), None)
    if place is None:
        return None
    row = read_checked(store, place.rows, ["uid"]).column("uid").index(uid).as_py()
    for step in curated.drops:
        for drop in step.of_unit(store, place.index):
            if drop["row"] == row:
                return _said_by(step, float(drop["score"])), representative_uid(drop)
    return (None, None) if row in survivors(store, place, curated.drops) else None


def _said_by(step: Drops, score: float) -> Said:
    number = None if np.isnan(score) else score
    return Said(rule=step.rule, score=number, keeps=None, threshold=step.threshold, keep=False, reason=str(step.reason))


def _groups_with(store: Store, path: str, order: int) -> Iterator[int]:
    """The row groups in which a place of the order may lie."""
    with store.open(path) as raw, pq.ParquetFile(raw) as file:
        column = file.schema_arrow.get_field_index("order")
        for group in range(file.num_row_groups):
            seen = file.metadata.row_group(group).column(column).statistics
            if seen.min <= order <= seen.max:
                yield group


def _of_uid(store: Store, path: str, uid: str, group: int | None = None) -> list[Said]:
    with store.open(path) as raw, pq.ParquetFile(raw) as file:
        if group is not None and group >= file.num_row_groups:
            return []
        table = file.read() if group is None else file.read_row_group(group)
    return [Said.of(row) for row in table.filter(pc.equal(table["uid"].cast("string"), uid)).to_pylist()]
