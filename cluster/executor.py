"""Running a stage: every unit without a marker is run once somewhere, and its marker collected.

A stage is a pure description of units plus one function `run(unit, output)`. `RayExecutor` runs it as Ray tasks with a
bounded number in flight; `InlineExecutor` runs the same function in this process.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import ray

from cluster.disk import full_disk, is_full
from cluster.errors import PairmillError, RunError
from cluster.interrupt import raise_if_interrupted
from cluster.journal import Journal, Marker, UnitOutput, marker_path
from cluster.lifeline import raise_if_lost
from cluster.lineage import is_stale, lineage
from cluster.progress import Progress

logger = logging.getLogger(__name__)

MAX_RETRIES_AFTER_CRASH = 5
INTERRUPT_CHECK_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a stage's work: `id` sorts in the stage's order and is valid as a file name.

    inputs: what its marker will say that it was made from; `run_stage` fills it in.
    """

    id: str
    params: dict[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] | None = None


class Stage(Protocol):
    """What to do, apart from where it runs. Stages are pickled and sent to workers: keep them small."""

    @property
    def name(self) -> str: ...

    @property
    def num_cpus(self) -> float: ...

    @property
    def memory_bytes(self) -> int: ...

    def units(self) -> Sequence[Unit]:
        """Every unit, in order; the same list whenever it is called on the same input."""

    def run(self, unit: Unit, output: UnitOutput) -> None:
        """Do one unit: a pure function of committed inputs (and, when fetching, of the web's responses)."""


class Executor(Protocol):
    """Applies a function to items somewhere; results come as they finish."""

    def map_unordered(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, num_cpus: float, memory_bytes: int
    ) -> Iterator[Any]: ...


class InlineExecutor:
    """One item after the other in this process."""

    def map_unordered(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, num_cpus: float, memory_bytes: int
    ) -> Iterator[Any]:
        return map(function, items)


class RayExecutor:
    """Ray tasks, never more in flight than the cluster can run at once plus a few to hide scheduling.

    A task whose worker or node dies is run again elsewhere; an error raised by the function is not retried.
    is_local: this machine is the whole cluster and no node will ever join it.
    """

    def __init__(self, *, is_local: bool = False) -> None:
        self._is_local = is_local

    def map_unordered(
        self, function: Callable[[Any], Any], items: Sequence[Any], *, num_cpus: float, memory_bytes: int
    ) -> Iterator[Any]:
        remote = ray.remote(function).options(
            num_cpus=num_cpus, memory=memory_bytes or None, max_retries=MAX_RETRIES_AFTER_CRASH
        )
        if items:
            self._check_fit(num_cpus, memory_bytes)
        waiting = list(reversed(items))
        in_flight: list[ray.ObjectRef] = []
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < _slots(num_cpus):
                    in_flight.append(remote.remote(waiting.pop()))
                ready, in_flight = ray.wait(in_flight, num_returns=1, timeout=INTERRUPT_CHECK_S)
                raise_if_interrupted()
                raise_if_lost()
                for reference in ready:
                    yield _result(reference)
        finally:
            for reference in in_flight:
                ray.cancel(reference, force=True)

    def _check_fit(self, num_cpus: float, memory_bytes: int) -> None:
        """Ray lets a task that fits on no node wait for ever. A cluster may grow, so there we only say so."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= num_cpus and node.get("memory", 0) >= memory_bytes for node in nodes):
            return
        has = "; ".join(f"{node.get('CPU', 0):g} cores, {node.get('memory', 0) / 2**20:,.0f} MiB" for node in nodes)
        said = (
            f"a task needs {num_cpus:g} cores and {memory_bytes / 2**20:,.0f} MiB of memory, which no node has "
            f"({has or 'there is none'}); ask for less in the settings of the stage (*.num_cpus, *.memory_mib, "
            "plan.rows_per_range), or use larger nodes"
        )
        if self._is_local:
            raise RunError(said)
        logger.warning("%s; waiting for one", said)


def run_stage(stage: Stage, journal: Journal, executor: Executor, progress: Progress) -> dict[str, Marker]:
    """Bring every unit of a stage to its marker and return the markers by unit id, in unit order.

    Units that have a marker are not run again, unless it says that they were made from something else than there is
    now. Raises RunError naming the unit when one fails for good; what was committed stays, so the same call goes on
    from there.
    """
    inputs_of = lineage(journal, stage)
    units = [replace(unit, inputs=inputs_of(unit)) for unit in stage.units()]
    markers = journal.markers(stage.name)
    journal.announce(stage.name, [unit.id for unit in units])
    for unit in units:
        if unit.id in markers and is_stale(markers[unit.id], unit.inputs or {}):
            logger.warning("stage %s unit %s: its inputs were made again; doing it again", stage.name, unit.id)
            journal.store.remove(marker_path(stage.name, unit.id))
            del markers[unit.id]
    missing = [unit for unit in units if unit.id not in markers]
    progress.start(stage.name, num_units=len(units), done=[markers[unit.id] for unit in units if unit.id in markers])
    task = unit_task(stage, journal)
    for marker in executor.map_unordered(task, missing, num_cpus=stage.num_cpus, memory_bytes=stage.memory_bytes):
        if isinstance(marker, Exception):
            raise marker
        markers[marker.unit] = marker
        progress.advance(marker)
        raise_if_interrupted()
    if missing:
        journal.sweep(stage.name)
    progress.finish()
    journal.seen[stage.name] = {unit.id: markers[unit.id] for unit in units}
    return dict(journal.seen[stage.name])


def unit_task(stage: Stage, journal: Journal) -> Callable[[Unit], Marker | PairmillError]:
    """The function that is applied to units: attempt, commit, return the winning marker.

    Errors come back as values so that their class and text survive the journey between processes. Its name is what
    `ray list tasks` and the workers' process titles show.
    """

    def run_unit(unit: Unit) -> Marker | PairmillError:
        try:
            if marker := journal.marker(stage.name, unit.id):
                return marker
            started = time.monotonic()
            with journal.attempt(stage.name, unit.id) as output:
                stage.run(unit, output)
                seconds = round(time.monotonic() - started, 3)
                return journal.commit(stage.name, unit.id, output, seconds, unit.inputs)
        except PairmillError as error:
            return error
        except Exception as error:  # whatever a unit raises must reach the user with the unit's name
            if marker := journal.marker(stage.name, unit.id):
                return marker  # the same command, started twice, did it first and swept our files
            if is_full(error):
                return full_disk(*([journal.store.url] if journal.store.is_local else []))
            logger.exception("stage %s unit %s failed", stage.name, unit.id)
            return RunError(
                f"stage {stage.name}, unit {unit.id}: {type(error).__name__}: {error}; "
                "finished units are kept, run the same command to go on"
            )

    run_unit.__name__ = run_unit.__qualname__ = f"{stage.name}_unit"
    return run_unit


def _result(reference: ray.ObjectRef) -> Any:
    """A task's result; what Ray itself reports (worker lost too often, out of memory, import error) as RunError."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RunError(
            f"a Ray task failed and will not be tried again: {lines[-1] if lines else type(error).__name__}; "
            "finished units are kept, run the same command to go on"
        ) from error


def _slots(num_cpus: float) -> int:
    total = float(ray.cluster_resources().get("CPU", 1.0))
    return max(1, int(total / num_cpus)) + 2
