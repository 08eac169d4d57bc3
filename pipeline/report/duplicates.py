"""Duplicates side by side with the sample that represents them, wherever in the dataset that one is."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cluster.journal import Journal
from cluster.store import Store
from pipeline.generations import record_markers
from pipeline.reasons import Reason
from pipeline.report.data import Sampled, read_record
from pipeline.report.pictures import Album, Picture
from pipeline.selection import KNOWN, NONE, Drops, Groups

NUM_GROUPS = 6
NUM_DUPLICATES = 4
STEP_OF_RULE = {
    "dedup.exact": "exact",
    "dedup.by_url": "url",
    "dedup.by_bytes_and_caption": "pair",
    "dedup.near_distance": "near",
    "dedup.semantic_similarity": "semantic",
}


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Finds representatives by what the steps wrote: one small read a duplicate, whatever the dataset's size."""

    store: Store
    sampled: Sampled

    def of(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row of the sample that represents a duplicate; None if it cannot be found any more."""
        if found := self.sampled.row_of(row["duplicate_of"]):
            return found
        step = STEP_OF_RULE.get(row["rule"])
        if step is None or row["generation"]:
            return None
        try:
            twin = self._by_place(step, row)
        except (FileNotFoundError, KeyError):  # work/ of a finished build may be removed
            return None
        return twin if twin and twin["uid"] == row["duplicate_of"] else None

    def _by_place(self, step: str, row: dict[str, Any]) -> dict[str, Any] | None:
        paths = tuple(marker.path_of("drops.bin") for marker in self._journal.markers(f"{step}-units").values())
        if len(paths) != len(self._groups):
            return None
        drops = Drops(rule=row["rule"], reason=row["reason"], paths=paths, groups=self._groups)
        unit, number = self.sampled.place(row["index"])
        mine = drops.of_unit(self.store, unit)
        mine = mine[mine["row"] == number]
        if not len(mine) or mine[0]["of_unit"] in (NONE, KNOWN):
            return None
        name = self._units[int(mine[0]["of_unit"])]
        record = read_record(self.store, self._recorded[name].path_of("record.parquet"))
        found: dict[str, Any] = record.slice(int(mine[0]["of_row"]), 1).to_pylist()[0]
        return {**found, "unit": name}

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.store)

    @cached_property
    def _groups(self) -> Groups:
        return Groups.of([marker.counts["kept"] for marker in self._journal.markers("decide").values()])

    @cached_property
    def _recorded(self) -> dict[str, Any]:
        return record_markers(self._journal)

    @cached_property
    def _units(self) -> list[str]:
        return list(self._recorded)


def groups_of(album: Album, twins: Twins, reason: str) -> tuple[tuple[Picture, ...], ...]:
    """Some groups of duplicates: the sample that represents them first. Only those whose pictures are there."""
    sampled, members = twins.sampled, dict[str, list[int]]()
    for index in sampled.find("dropped", reason):
        of = sampled.rows.column("duplicate_of")[index].as_py()
        if of is not None and (of in members or len(members) < 4 * NUM_GROUPS):
            members.setdefault(of, []).append(index)
    groups = []
    for indices in members.values():
        rows = [sampled.row(index) for index in indices[:NUM_DUPLICATES]]
        first = twins.of(rows[0])
        if first is None:
            continue
        tag = "kept" if first["status"] == "kept" else "dropped later"
        further = f"and {len(indices) - NUM_DUPLICATES:,} more" if len(indices) > NUM_DUPLICATES else ""
        pictures = [album.picture(first, " ".join(filter(None, [first["url"] or "", further])), tag)]
        pictures += [album.picture(row, _distance(row), "dropped") for row in rows]
        if all(picture.image for picture in pictures):
            groups.append(tuple(pictures))
        if len(groups) == NUM_GROUPS:
            break
    return tuple(groups)


def _distance(row: dict[str, Any]) -> str:
    """How far a duplicate is from the sample that represents it, and where it is from."""
    if row["score"] is None:
        return row["url"] or ""
    if row["reason"] == Reason.NEAR_DUPLICATE:
        return f"{row['score']:.0f} bits; {row['url'] or ''}"
    if row["reason"] == Reason.SEMANTIC_DUPLICATE:
        return f"cosine {row['score']:.3f}; {row['url'] or ''}"
    return row["url"] or ""
