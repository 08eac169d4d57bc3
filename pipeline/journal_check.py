"""Is a run's journal whole: every planned unit has its marker, and every marker fits those it was made from?

Nothing here knows which stages there are: the journal says what was planned, what was written and what from what.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cluster.errors import RunError
from cluster.journal import Journal, Marker, marker_path
from cluster.lineage import WHOLE_STAGE, output_sha256, stage_digest
from cluster.store import is_elsewhere
from pipeline.damage import Damage
from pipeline.generations import generation_of
from pipeline.manifest import FileInfo


@dataclass(kw_only=True)
class StageState:
    """What the journal has of a stage. `planned`: None where it does not say which units, only how many, or nothing."""

    name: str
    is_announced: bool = False
    num_planned: int = 0
    planned: tuple[str, ...] | None = None
    markers: dict[str, Marker] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Units whose marker is damaged, and how."""

    @property
    def is_complete(self) -> bool:
        """Whether every unit has its marker, as far as is known which there are."""
        return self.planned is not None and self.markers.keys() >= set(self.planned)

    def knows(self, unit: str) -> bool:
        """Whether a unit without a marker would be told of elsewhere, or has one."""
        return self.planned is not None or unit in (WHOLE_STAGE, *self.markers, *self.unreadable)


def read_journal(journal: Journal, num_repairs: int, pool: Executor) -> dict[str, StageState]:
    """Every stage of the build and of its first `num_repairs` repairs, older generations first."""
    paths = [entry.path for entry in journal.store.find("journal") if entry.path.endswith(".json")]
    named = [(*path.removeprefix("journal/").removesuffix(".json").partition("/")[::2], path) for path in paths]
    named = [(name, unit, path) for name, unit, path in named if generation_of(name) <= num_repairs]
    names = sorted({name for name, _, _ in named}, key=lambda name: (generation_of(name), name))
    stages = {name: StageState(name=name) for name in names}
    announced = [(name, path) for name, unit, path in named if not unit]
    plans = pool.map(lambda each: journal.store.read_bytes(each[1]), announced)
    for (name, _), data in zip(announced, plans, strict=True):
        _take_announcement(stages[name], data)
    units = [(name, unit, path) for name, unit, path in named if unit]
    for (name, unit, _), found in zip(units, pool.map(lambda each: _try_read(journal, each[2]), units), strict=True):
        if isinstance(found, Marker):
            stages[name].markers[unit] = found
        else:
            stages[name].unreadable[unit] = found
    return stages


def check_markers(stages: Mapping[str, StageState]) -> Iterator[Damage]:
    """Markers that are missing, damaged, or made from something else than there is now."""
    for stage in stages.values():
        if not stage.is_announced:
            yield Damage(path=f"journal/{stage.name}.json", problem="is missing, or does not name the stage's units")
        for unit, problem in stage.unreadable.items():
            yield Damage(path=marker_path(stage.name, unit), problem=problem, unit=(stage.name, unit))
        known = {*stage.markers, *stage.unreadable}
        if stage.planned is not None:
            for unit in (unit for unit in stage.planned if unit not in known):
                yield _missing_marker(stage.name, unit)
        elif (number := stage.num_planned - len(known)) > 0:
            yield Damage(path=f"journal/{stage.name}", problem=f"has no marker for {number:,} of its units")
    yield from _check_inputs(stages)


def vouched_files(stages: Mapping[str, StageState]) -> dict[str, tuple[FileInfo, tuple[str, str]]]:
    """Every output by path, with the unit that vouches for it: of several, the one of the newest generation.

    What lies in another dataset is for that one's `verify`.
    """
    return {
        output.path: (
            FileInfo(path=output.path, size_bytes=output.size_bytes, sha256=output.sha256),
            (stage.name, marker.unit),
        )
        for stage in stages.values()  # in order of generation
        for marker in stage.markers.values()
        for output in marker.outputs
        if not is_elsewhere(output.path)
    }


def _missing_marker(stage: str, unit: str) -> Damage:
    return Damage(path=marker_path(stage, unit), problem="the unit's marker is missing", unit=(stage, unit))


def _check_inputs(stages: Mapping[str, StageState]) -> Iterator[Damage]:
    digest = cache(lambda source, file: stage_digest(stages[source].markers, file))
    unknown: set[tuple[str, str]] = set()
    for stage in stages.values():
        for marker in stage.markers.values():
            others = []
            for name, sha256 in (marker.inputs or {}).items():
                source, unit, file = name.split("/")
                if source not in stages or not stages[source].knows(unit):
                    unknown.add((source, unit))
                elif unit == WHOLE_STAGE:
                    if stages[source].is_complete and digest(source, file) != sha256:
                        others.append(name)
                elif unit in stages[source].markers and output_sha256(stages[source].markers[unit], file) != sha256:
                    others.append(name)
            if others:
                problem = f"was made from another {', '.join(others[:3])}{', ...' if others[3:] else ''}"
                yield Damage(path=marker_path(stage.name, marker.unit), problem=problem, unit=(stage.name, marker.unit))
    for source, unit in sorted(unknown):
        if unit == WHOLE_STAGE:
            yield Damage(path=f"journal/{source}", problem="is missing: others were made from it")
        else:
            yield _missing_marker(source, unit)


def _take_announcement(stage: StageState, data: bytes) -> None:
    try:
        plan: dict[str, Any] = json.loads(data)
        stage.num_planned = int(plan["num_units"])
        stage.planned = tuple(plan["units"]) if "units" in plan else None
        stage.is_announced = True
    except (ValueError, KeyError, TypeError):
        pass


def _try_read(journal: Journal, path: str) -> Marker | str:
    """A marker, or what is wrong with it."""
    try:
        return Marker.read(journal.store, path)
    except FileNotFoundError:
        return "the unit's marker is missing"
    except RunError as error:
        return f"damaged marker: {error}"
