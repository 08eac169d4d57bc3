"""How keys of all samples meet: three stages, none of which reads (units x partitions) small pieces.

    <step>-keys    a group of fetch units (about a million rows) -> one file of keys, a bucket per partition
    <step>-drops   a partition: its bucket of every group's file -> `DROP` records, a bucket per group
    <step>-units   a group: its bucket of every partition's file -> one file of `DROP`, a bucket per fetch unit

Of the samples of a group that have the same key only the best one goes to a partition. The others are `repeats`: they
are dropped whatever comes, and the last stage tells who represents them. So a key that ten million samples share is
one record of each group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline.buckets import Records, pieces_of, read_buckets, write_buckets, write_in_buckets
from pipeline.curation.context import Context, Curated
from pipeline.selection import DROP, DecidedUnit, Drops, Groups
from pipeline.workfile import WorkFile

ROWS_PER_PARTITION = 1_000_000
NO_DROPS = np.empty(0, DROP)


def num_partitions(num_rows: int, rows_per_partition: int = ROWS_PER_PARTITION) -> int:
    """How many partitions to use for about this many rows."""
    return max(1, -(-num_rows // rows_per_partition))


def group_tasks(curated: Curated, pick: Callable[[DecidedUnit], WorkFile]) -> tuple[Unit, ...]:
    """The units of a stage that works on groups; `files` are what `pick` gives of each fetch unit of the group."""
    tasks = []
    for group in range(len(curated.groups)):
        first, end = curated.groups.range(group)
        files = tuple(pick(unit) for unit in curated.units[first:end])
        params = {"group": group, "first_unit": first, "end_unit": end, "files": files}
        tasks.append(Unit(id=f"{group:05}", params=params))
    return tuple(tasks)


def facts_tasks(curated: Curated) -> tuple[Unit, ...]:
    """`group_tasks` whose params `read_facts` reads."""
    tasks = []
    for task in group_tasks(curated, lambda unit: unit.facts):
        num_rows = curated.num_kept[task.params["first_unit"] : task.params["end_unit"]]
        params = {**task.params, "num_rows": num_rows, "facts_dtype": curated.facts_dtype}
        tasks.append(replace(task, params=params))
    return tuple(tasks)


@dataclass(frozen=True, kw_only=True)
class GroupStage:
    """Base of the stages whose units are groups of fetch units or parts of them, made beforehand as `tasks`."""

    store: Store
    tasks: tuple[Unit, ...]
    drops: tuple[Drops, ...]
    name: str
    memory_bytes: int
    num_cpus: float = 1.0

    def __getstate__(self) -> dict[str, Any]:
        """Workers get a group's files with its unit; the list of all of them stays with the driver."""
        return {**self.__dict__, "tasks": ()}

    def units(self) -> Sequence[Unit]:
        return self.tasks


def read_facts(store: Store, task: Mapping[str, Any], drops: Sequence[Drops]) -> Records:
    """[N] facts of a group's samples that the steps before have left. `task`: of `facts_tasks`."""
    store.prefetch([file.path for file in task["files"]])
    facts, pieces = pieces_of(task["num_rows"], task["facts_dtype"])
    store.overlapped(lambda read: read[0].read_into(store, read[1]), list(zip(task["files"], pieces, strict=True)))
    is_living = living(store, facts["unit"], facts["row"], drops, task["group"])
    return facts if is_living.all() else facts.take(np.flatnonzero(is_living))


def of_units(facts: Records, task: Mapping[str, Any]) -> list[Records]:
    """Of `read_facts` those of every fetch unit of the group, in one pass however many units there are."""
    edges = np.searchsorted(facts["unit"], np.arange(task["first_unit"], task["end_unit"] + 1))
    return [facts[first:end] for first, end in pairwise(edges.tolist())]


def living(
    store: Store, units: NDArray[Any], rows: NDArray[Any], drops: Sequence[Drops], group: int
) -> NDArray[np.bool_]:
    """[N] which rows, all of units of this group, these steps have left."""
    dropped = [_places(step.of_group(store, group)) for step in drops]
    if not sum(map(len, dropped)):
        return np.ones(len(rows), bool)
    places = units.astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)
    return ~np.isin(places, np.concatenate(dropped))


def make_drops(dropped: Records, representatives: Records, scores: NDArray[Any] | float = np.nan) -> Records:
    """[N] `DROP` of keys and of the keys that represent them; both have unit, row, uid_high, uid_low."""
    drops = np.empty(len(dropped), DROP)
    drops["unit"], drops["row"] = dropped["unit"], dropped["row"]
    drops["of_unit"], drops["of_row"] = representatives["unit"], representatives["row"]
    drops["uid_high"], drops["uid_low"] = representatives["uid_high"], representatives["uid_low"]
    drops["score"] = scores
    return drops


def write_drops(path: Path, drops: Records, groups: Groups) -> None:
    """A partition's drops, in any order, with a bucket for each group."""
    group = np.searchsorted(np.asarray(groups.starts[1:]), drops["unit"], side="right")
    write_in_buckets(path, drops, group, len(groups))


def write_unit_drops(path: Path, drops: Records, first_unit: int, end_unit: int) -> None:
    """A group's drops, in any order, as `selection.Drops` has them: a bucket for each unit, ordered by row."""
    drops = drops.take(np.argsort(_places(drops)))
    write_buckets(path, drops, drops["unit"].astype(np.int64) - first_unit, end_unit - first_unit)


def paths_of(markers: Mapping[str, Marker], name: str) -> tuple[str, ...]:
    """Where the output of this name lies of every unit, in unit order."""
    return tuple(marker.path_of(name) for marker in markers.values())


def finish(
    context: Context,
    curated: Curated,
    found: Sequence[str],
    *,
    name: str,
    rule: str,
    reason: str,
    repeats: Sequence[str] = (),
    threshold: float | None = None,
) -> Drops:
    """Run the last stage; what it leaves is the step's result.

    found: outputs of `write_drops`. repeats: of every group, see `UnitsStage`. name: of the step.
    """
    stage = UnitsStage(
        store=context.store,
        groups=curated.groups,
        found=tuple(found),
        repeats=tuple(repeats),
        name=context.name(f"{name}-units"),
    )
    paths = paths_of(context.run_stage(stage), "drops.bin")
    return Drops(rule=rule, reason=reason, paths=paths, groups=curated.groups, threshold=threshold)


@dataclass(frozen=True, kw_only=True)
class UnitsStage:
    """A unit is a group: merges what all partitions found of it.

    repeats: empty, or for every group a file of `DROP` (one bucket): samples that are dropped because another of
    their group represents them. Where that one is dropped too, the sample that represents it takes its place.

        drops.bin   `DROP`, one bucket for each fetch unit of the group
        counts      dropped
    """

    store: Store
    groups: Groups
    found: tuple[str, ...]
    repeats: tuple[str, ...]
    name: str
    num_cpus: float = 1.0
    memory_bytes: int = 512 * 2**20

    def __getstate__(self) -> dict[str, Any]:
        """A worker gets its group's repeats with its unit."""
        return {**self.__dict__, "repeats": ()}

    def units(self) -> Sequence[Unit]:
        return [
            Unit(id=f"{group:05}", params={"group": group, "repeats": self.repeats[group : group + 1]})
            for group in range(len(self.groups))
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        group: int = unit.params["group"]
        drops = read_buckets(self.store, self.found, group, len(self.groups), DROP)
        repeats = read_buckets(self.store, unit.params["repeats"], 0, 1, DROP)
        drops = np.concatenate([drops, redirect(repeats, drops)])
        write_unit_drops(output.path("drops.bin"), drops, *self.groups.range(group))
        output.count("dropped", len(drops))


def redirect(repeats: Records, drops: Records) -> Records:
    """Repeats of samples that were dropped themselves, as repeats of those that represent these."""
    if not len(repeats) or not len(drops):
        return repeats
    order = np.argsort(_places(drops))
    places = _places(drops)[order]
    wanted = _places(repeats, "of_unit", "of_row")
    at = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
    is_dropped = places[at] == wanted
    moved = repeats.copy()
    for name in ("of_unit", "of_row", "uid_high", "uid_low", "score"):
        moved[name][is_dropped] = drops[name][order[at[is_dropped]]]
    return moved


def _places(drops: Records, unit: str = "unit", row: str = "row") -> NDArray[np.uint64]:
    """[N] unit and row as one number."""
    places: NDArray[np.uint64] = drops[unit].astype(np.uint64) << np.uint64(32) | drops[row].astype(np.uint64)
    return places
