"""What a unit is made from: the chain between markers, so that one that was made from something else is noticed.

A marker's `inputs` name outputs of earlier units by content:

    fetch/00000-00003/rows.parquet   sha256 of that unit's output
    decide/*/keys.bin                of a stage as a whole: sha256 over the sha256 of every unit, in unit order

They are found in what a worker is sent (its stage as pickled, its unit): a unit cannot depend on more of the journal
than that. Outputs that are made again with the same bytes are the same input.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from cluster.journal import Journal, Marker
from cluster.store import is_elsewhere

WHOLE_STAGE = "*"
WHOLE_STAGE_FROM = 65
"""References to all units of a stage are named one by one if they are fewer."""
Reference = tuple[str, str, str, str]
"""(stage, unit, file name, sha256)"""


_VOUCHED_FILE = {"stage", "unit", "path", "sha256"}
"""Fields of a dataclass that is an output of a unit, with what its marker says of it."""


def lineage(journal: Journal, stage: Any) -> Callable[[Any], dict[str, str]]:
    """A function that tells the inputs of a stage's units. The stages before it must be finished."""
    known = _Known(journal)
    sent = stage.__getstate__() if hasattr(stage, "__getstate__") else vars(stage)
    common = _named(set(_references(sent, known)), known)

    def inputs(unit: Any) -> dict[str, str]:
        return common | _named(set(_references(unit.params, known)), known)

    return inputs


def is_stale(marker: Marker, inputs: Mapping[str, str]) -> bool:
    """Whether a unit was made from something else than these inputs, which are those that there are now."""
    return any(inputs.get(name, sha256) != sha256 for name, sha256 in (marker.inputs or {}).items())


def stage_digest(markers: Mapping[str, Marker], name: str) -> str:
    """The one digest of the outputs called `name` (their last path component) of a stage's units."""
    digest = hashlib.sha256()
    for unit in sorted(markers):
        digest.update((output_sha256(markers[unit], name) or "").encode())
    return digest.hexdigest()


def output_sha256(marker: Marker, name: str) -> str | None:
    """sha256 of the output whose last path component is `name`, None if there is none."""
    return next((output.sha256 for output in marker.outputs if _base(output.path) == name), None)


class _Known:
    """sha256 of outputs by path, of the stages that were asked for."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._stages: dict[str, dict[str, str]] = {}

    def markers(self, stage: str) -> Mapping[str, Marker]:
        if stage not in self._journal.seen:
            self._journal.seen[stage] = self._journal.markers(stage)
        return self._journal.seen[stage]

    def resolve(self, path: str) -> Reference | None:
        """The output that lies at `work/<stage>/<unit>.<attempt>/<name>`."""
        parts = path.split("/")
        if len(parts) != 4:
            return None
        _, stage, attempt, name = parts
        if stage not in self._stages:
            self._stages[stage] = {o.path: o.sha256 for marker in self.markers(stage).values() for o in marker.outputs}
        sha256 = self._stages[stage].get(path)
        return (stage, attempt.rpartition(".")[0], name, sha256) if sha256 else None


def _references(value: Any, known: _Known) -> Iterator[Reference]:
    """Every output of this run that a value refers to: vouched files, markers, and paths into work/."""
    if isinstance(value, str):
        if value.startswith("work/") and (found := known.resolve(value)):
            yield found
    elif isinstance(value, Marker):
        for output in value.outputs:
            if not is_elsewhere(output.path):
                yield value.stage, value.unit, _base(output.path), output.sha256
    elif names := _field_names(value.__class__):
        if names >= _VOUCHED_FILE:
            if not is_elsewhere(value.path):
                yield value.stage, value.unit, _base(value.path), value.sha256
        else:
            for name in names:
                yield from _references(getattr(value, name), known)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _references(each, known)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for each in value:
            yield from _references(each, known)


@cache
def _field_names(kind: Any) -> frozenset[str]:
    """Of a dataclass, else none. Kept, as a unit may name thousands of files."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return frozenset(field.name for field in fields)


def _named(references: set[Reference], known: _Known) -> dict[str, str]:
    """References as a marker has them: whole stages as one."""
    by_stage: dict[tuple[str, str], dict[str, str]] = {}
    for stage, unit, name, sha256 in references:
        by_stage.setdefault((stage, name), {})[unit] = sha256
    inputs = {}
    for (stage, name), units in sorted(by_stage.items()):
        if len(units) >= WHOLE_STAGE_FROM and units.keys() == known.markers(stage).keys():
            inputs[f"{stage}/{WHOLE_STAGE}/{name}"] = stage_digest(known.markers(stage), name)
        else:
            inputs |= {f"{stage}/{unit}/{name}": sha256 for unit, sha256 in sorted(units.items())}
    return inputs


def _base(path: str) -> str:
    return path.rpartition("/")[2]
