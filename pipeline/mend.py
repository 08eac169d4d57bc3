"""`pairmill verify OUT --repair`: makes again what is damaged, from what is whole, and nothing else.

The stages are walked in the order of a build, planned from the same markers. A unit whose marker is missing, whose
output is damaged, or that was made from something else than there is now, is done again under a name of its own and
compared before anything is replaced:

    the bytes that its marker vouches for      damaged files are replaced by them, the marker stays
    other bytes, of an intermediate file       a new marker; what was made from it follows
    other bytes of a file that manifest.json names, or other images from the web
                                               refused: what is there stays, and so do the markers before it

A fetch unit is not downloaded blindly: see `pipeline.refetch`. Killed at any moment, the same command goes on.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import PairmillError, RequestError, RunError
from cluster.executor import Executor, Lost, Unit, failed
from cluster.journal import Journal, Marker, UnitOutput, file_sha256, marker_path
from cluster.lineage import is_stale, lineage
from cluster.progress import Progress
from cluster.run import require_run
from cluster.session import ray_session, require_reachable
from cluster.store import Store
from pipeline.build import Build, open_inputs
from pipeline.config import BuildConfig
from pipeline.damage import Damage
from pipeline.fetch import FetchStage
from pipeline.generations import generation_of, stage_name
from pipeline.journal_check import read_journal
from pipeline.manifest import FileInfo, Manifest
from pipeline.plan import ReadStage
from pipeline.refetch import CannotRestoreError, refetch
from pipeline.repair import settings_of

_REPAIR_PLAN = re.compile(r"(journal|work)/repair-\d+-plan/")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A unit to do again: its marker if there is one, and which of its files are damaged."""

    unit: Unit
    old: Marker | None
    damaged: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A unit that was left as it is, and why. is_other: because what it is made from now gives another dataset."""

    unit: str
    reason: str
    is_other: bool = False


def mend(store: Store, manifest: Manifest, damages: Sequence[Damage], config: Any) -> list[str]:
    """Make again what these damages concern; returns what could not be, in words for people."""
    if not store.find("work"):
        return []  # the remedy says that nothing can be done
    settings = settings_of(require_run(store.url, "build")[1]["config"], config)
    require_reachable(settings.ray)
    with ray_session(settings.ray) as executor, Progress(title=f"verify --repair {store.url}") as progress:
        mending = Mending(settings, store, executor, progress, manifest, damages)
        mending.mend()
    return mending.refusals


class Mending(Build):
    """A build's stages, of which only what is damaged is done again."""

    def __init__(
        self,
        config: BuildConfig,
        store: Store,
        executor: Executor,
        progress: Progress,
        manifest: Manifest,
        damages: Sequence[Damage],
    ) -> None:
        super().__init__(config, store, executor, progress)
        self.refusals: list[str] = []
        self._manifest = manifest
        self._damaged = {damage.path for damage in damages}
        if any(_REPAIR_PLAN.match(path) for path in self._damaged):  # it is made from the records as they were before
            self._damaged |= {entry.path for entry in store.find("record")}
        self._pinned = {file.path: file for shard in manifest.shards for file in (shard.tar, shard.parquet)}
        self._replaced: list[Marker] = []

    def mend(self) -> None:
        """Walk all stages of all generations. What was replaced is put back if the dataset would not be the same."""
        try:
            base = self._config.base
            manifest = self.first(self._lists() if base is None else open_inputs(self._config))
            while len(manifest.repairs) < len(self._manifest.repairs):
                manifest = self.repair(manifest)
            if not self.refusals and manifest != self._manifest:
                self.refusals.append("manifest.json: what was made again does not come to the counts that it has")
        except PairmillError as error:
            self.refusals.append(str(error))
        if self.refusals:
            for marker in self._replaced:
                self._store.write_bytes(marker_path(marker.stage, marker.unit), marker.to_json())
        else:
            for stage in self._stages:
                self._journal.sweep(stage)

    def _stage(self, stage: Any) -> dict[str, Marker]:
        self._stages.append(stage.name)
        units, inputs_of = stage.units(), lineage(self._journal, stage)
        markers = self._readable_markers(stage.name)
        if f"journal/{stage.name}.json" in self._damaged:
            self._journal.announce(stage.name, [unit.id for unit in units])
        tasks = list(filter(None, (self._task(unit, inputs_of(unit), markers.get(unit.id)) for unit in units)))
        old = {task.unit.id: task.old for task in tasks}
        whole = [marker for unit, marker in markers.items() if unit not in old]
        self._progress.start(stage.name, num_units=len(units), done=whole)
        do = mend_task(stage, self._journal, self._pinned, *self._known(stage))
        is_other = False
        for done in self._executor.map_unordered(do, tasks, num_cpus=stage.num_cpus, memory_bytes=stage.memory_bytes):
            self._take(stage.name, done, old, markers)
            is_other |= isinstance(done, Refusal) and done.is_other
        self._progress.finish()
        if is_other:
            raise RunError(
                "other images than the dataset was made from are in work/: put back copies of those files, or build "
                "into a new output; what is whole of the dataset stays as it is"
            )
        if lost := [unit.id for unit in units if unit.id not in markers]:
            raise RunError(
                f"stage {stage.name} cannot be made whole, so what follows was left: no {', '.join(lost[:5])}"
            )
        self._journal.seen[stage.name] = {unit.id: markers[unit.id] for unit in units}
        return dict(self._journal.seen[stage.name])

    def _task(self, unit: Unit, inputs: Mapping[str, str], old: Marker | None) -> Task | None:
        """What there is to do for a unit; None if it is whole."""
        unit = replace(unit, inputs=inputs)
        if old is None:
            return Task(unit=unit, old=None)
        damaged = frozenset(output.path for output in old.outputs) & self._damaged
        return Task(unit=unit, old=old, damaged=damaged) if damaged or is_stale(old, inputs) else None

    def _take(self, stage: str, done: Any, old: Mapping[str, Marker | None], markers: dict[str, Marker]) -> None:
        """Note what a task came to."""
        if isinstance(done, Exception):
            raise done
        if isinstance(done, Lost):
            done = Refusal(unit=done.item.unit.id, reason=str(failed(done.error)))
        if isinstance(done, Refusal):
            self.refusals.append(f"stage {stage}, unit {done.unit}: {done.reason}")
            return
        before = old[done.unit]
        if before is not None and before != done and (before.attempt == done.attempt or _is_in_work(before)):
            self._replaced.append(before)
        markers[done.unit] = done
        self._progress.advance(done)

    def _lists(self) -> "KnownLists":
        with ThreadPoolExecutor() as pool:
            state = read_journal(self._journal, 0, pool)["plan-read"]
        ids = state.planned or tuple(sorted({*state.markers, *state.unreadable}))
        return KnownLists(config=self._config, ids=ids, sources=self._manifest.sources)

    def _readable_markers(self, stage: str) -> dict[str, Marker]:
        markers = {}
        for entry in self._store.find(f"journal/{stage}"):
            try:
                marker = Marker.read(self._store, entry.path)
            except RunError:  # damaged: as if it were not there
                continue
            markers[marker.unit] = marker
        return markers

    def _known(self, stage: Any) -> tuple[dict[str, str], frozenset[str]]:
        """What a fetch stage can be made whole from: where each unit's record is, and the shards; those undamaged."""
        if not isinstance(stage, FetchStage):
            return {}, frozenset()
        generation = generation_of(stage.name)
        markers = self._readable_markers(stage_name(generation, "verdict" if generation else "record"))
        records = {unit: marker.outputs[0].path for unit, marker in markers.items()}
        whole = {unit: path for unit, path in records.items() if path not in self._damaged}
        return whole, frozenset(self._pinned) - self._damaged


def mend_task(
    stage: Any,
    journal: Journal,
    pinned: Mapping[str, FileInfo],
    records: Mapping[str, str],
    shards: frozenset[str],
) -> Callable[[Task], Marker | Refusal | PairmillError]:
    """The function that does a unit again; see the module for what may come of it."""

    def mend_unit(task: Task) -> Marker | Refusal | PairmillError:
        try:
            with journal.attempt(stage.name, task.unit.id) as output:
                if isinstance(stage, FetchStage):
                    record = records.get(task.unit.id)
                    adopted = refetch(stage, task.unit, task.old, output, journal, record, shards)
                    if adopted is not None:
                        return adopted
                else:
                    stage.run(task.unit, output)
                return _replace(stage.name, task, output, journal, pinned)
        except (RunError, CannotRestoreError) as error:
            return Refusal(unit=task.unit.id, reason=str(error))
        except PairmillError as error:
            return error

    mend_unit.__name__ = mend_unit.__qualname__ = f"{stage.name}_mend"
    return mend_unit


def _replace(
    stage: str, task: Task, output: UnitOutput, journal: Journal, pinned: Mapping[str, FileInfo]
) -> Marker | Refusal:
    made = {name: (local, publish_as, file_sha256(local)) for name, local, publish_as in output.files()}
    for _, publish_as, sha256 in made.values():
        if publish_as and publish_as in pinned and sha256 != pinned[publish_as].sha256:
            reason = f"{publish_as} would have other bytes than manifest.json says"
            return Refusal(unit=task.unit.id, reason=reason, is_other=True)
    if task.old is None or {file.name: file.sha256 for file in task.old.outputs} != {n: m[2] for n, m in made.items()}:
        return journal.commit(stage, task.unit.id, output, inputs=task.unit.inputs, replace=True)
    for file in task.old.outputs:
        if file.path in task.damaged:
            journal.store.put_file(made[file.name][0], file.path)
    marker = replace(task.old, inputs=task.unit.inputs)
    if marker != task.old:
        journal.store.write_bytes(marker_path(stage, marker.unit), marker.to_json())
    return marker


@dataclass(frozen=True, kw_only=True)
class KnownLists:
    """Stage plan-read without looking at the lists, which may be gone: only one whose rows are damaged is read again.

    ids: of the units as the journal has them, in the order of `sources`, which are the manifest's.
    """

    config: BuildConfig
    ids: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]
    name: str = "plan-read"
    num_cpus: float = 1.0
    memory_bytes: int = ReadStage.memory_bytes

    def units(self) -> Sequence[Unit]:
        return [
            Unit(id=id, params={"sha256": source["sha256"]}) for id, source in zip(self.ids, self.sources, strict=True)
        ]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        """Read the list again. RunError when it is gone, or not the one that the dataset was made from."""
        try:
            read = ReadStage.of(self.config)
        except RequestError as error:
            raise RunError(f"the list is needed again: {error}") from error
        found = {each.id: each for each in read.units()}
        if unit.id not in found:
            raise RunError("the list is needed again, and those that there are now are others")
        read.run(found[unit.id], output)
        if json.loads(output.path("source.json").read_bytes())["sha256"] != unit.params["sha256"]:
            raise RunError("the list is needed again, and it has another content by now")


def _is_in_work(marker: Marker) -> bool:
    return all(output.path.startswith("work/") for output in marker.outputs)
