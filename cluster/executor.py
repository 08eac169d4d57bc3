"""Running a stage: every unit without a marker is run once somewhere, and its marker collected.

A stage is a pure description of units plus one function `run(unit, output)`. `RayExecutor` runs it as Ray tasks with a
bounded number in flight; `InlineExecutor` runs the same function in this process.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import ray

from cluster.disk import full_disk, is_full
from cluster.errors import PairmillError, RunError
from cluster.interrupt import raise_if_interrupted
from cluster.journal import Journal, Marker, UnitOutput, marker_path
from cluster.lifeline import raise_if_lost
from cluster.lineage import is_stale, lineage
from cluster.progress import Progress

logger = logging.getLogger(__name__)

MAX_KILLS = 5
"""How many workers an item may lose, whatever killed them."""
MAX_KILLS_OF_PART = 2
"""The same of a part of a unit that has lost all its workers."""
MAX_NODE_DEATHS = 50
"""How often an item is done again because its node has gone: that is not the item's fault."""
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


@dataclass(frozen=True, kw_only=True)
class Lost:
    """In the place of a result: an item whose workers were killed `max_kills` times, and how it ended last."""

    item: Any
    error: Exception


class Executor(Protocol):
    """Applies a function to items somewhere; results come as they finish."""

    def map_unordered(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        num_cpus: float,
        memory_bytes: int,
        max_kills: int = MAX_KILLS,
    ) -> Iterator[Any]: ...


class InlineExecutor:
    """One item after the other in this process."""

    def map_unordered(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        num_cpus: float,
        memory_bytes: int,
        max_kills: int = MAX_KILLS,
    ) -> Iterator[Any]:
        return map(function, items)


_NODE_DIED = (ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)
"""The second: done, and a result too large to travel inline died with its node."""
_KILLED = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    *_NODE_DIED,
)


@dataclass(kw_only=True)
class _Attempts:
    """How it went with an item so far; `nodes` lived when it was sent out last."""

    item: Any
    num_kills: int = 0
    num_node_deaths: int = 0
    nodes: frozenset[str] = frozenset()

    def may_go_on(self, error: Exception, max_kills: int) -> bool:
        """Count a task that was killed; whether to try again."""
        if isinstance(error, _NODE_DIED) or not self.nodes <= _living_nodes():
            self.num_node_deaths += 1
        else:
            self.num_kills += 1
        logger.warning("a task was killed: %s", _told(error))
        return self.num_kills < max_kills and self.num_node_deaths < MAX_NODE_DEATHS


class RayExecutor:
    """Ray tasks, never more in flight than the cluster can run at once plus a few to hide scheduling.

    A task whose worker or node dies is run again elsewhere; an error raised by the function is not retried. Ray would
    do so itself, but without end where it kills a worker for want of memory, and without telling.
    is_local: this machine is the whole cluster and no node will ever join it.
    """

    def __init__(self, *, is_local: bool = False) -> None:
        self._is_local = is_local

    def map_unordered(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        *,
        num_cpus: float,
        memory_bytes: int,
        max_kills: int = MAX_KILLS,
    ) -> Iterator[Any]:
        remote = ray.remote(function).options(num_cpus=num_cpus, memory=memory_bytes or None, max_retries=0)
        if items:
            self._check_fit(num_cpus, memory_bytes)
        waiting = deque(_Attempts(item=item) for item in items)
        in_flight: dict[ray.ObjectRef, _Attempts] = {}
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < _slots(num_cpus):
                    attempts = waiting.popleft()
                    attempts.nodes = _living_nodes()
                    in_flight[remote.remote(attempts.item)] = attempts
                ready, _ = ray.wait(list(in_flight), num_returns=1, timeout=INTERRUPT_CHECK_S)
                raise_if_interrupted()
                raise_if_lost()
                for reference in ready:
                    attempts = in_flight.pop(reference)
                    try:
                        yield ray.get(reference)
                    except _KILLED as error:
                        if attempts.may_go_on(error, max_kills):
                            waiting.append(attempts)  # behind the others, when there may be more memory
                        else:
                            yield Lost(item=attempts.item, error=error)
                    except ray.exceptions.RayError as error:
                        raise failed(error) from error
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
    task, lost = unit_task(stage, journal), list[Lost]()
    needs: dict[str, Any] = {"num_cpus": stage.num_cpus, "memory_bytes": stage.memory_bytes}
    for marker in executor.map_unordered(task, missing, max_kills=MAX_KILLS, **needs):
        if isinstance(marker, Exception):
            raise marker
        if isinstance(marker, Lost):
            lost.append(marker)
            continue
        markers[marker.unit] = marker
        progress.advance(marker)
        raise_if_interrupted()
    for each in lost:  # now nothing else asks for memory
        markers[each.item.id] = run_divided(stage, each, journal, executor)
        progress.advance(markers[each.item.id])
    journal.seen[stage.name] = {unit.id: markers[unit.id] for unit in units}
    if missing:
        journal.sweep(stage.name)
    progress.finish()
    return dict(journal.seen[stage.name])


@runtime_checkable
class Divisible(Stage, Protocol):
    """A stage whose units can be done in parts."""

    def halves(self, unit: Unit) -> Sequence[Unit]:
        """Two units that together are this one, in order; none when it cannot be divided further."""

    def join(self, parts: Sequence[Marker], output: UnitOutput) -> None:
        """Write what the unit would have written, from its parts in order."""

    def give_up(self, unit: Unit, output: UnitOutput) -> None:
        """Write the output of a unit that cannot be done: what it is about has failed, for a reason of its own."""


def run_divided(stage: Any, lost: Lost, journal: Journal, executor: Executor) -> Marker:
    """The marker of a unit that kills its workers: it is halved until what kills them is alone, and given up.

    Parts have markers of their own until the unit has its one. Raises RunError if the stage cannot be divided.
    """
    if not isinstance(stage, Divisible):
        raise failed(lost.error) from lost.error
    unit: Unit = lost.item
    logger.warning("stage %s unit %s: killed too often; doing it in parts", stage.name, unit.id)
    in_parts = replace(cast(Any, stage), name=f"{stage.name}-parts-{unit.id}")
    parts = [part for half in stage.halves(unit) for part in _run_part(in_parts, half, journal, executor)]
    with journal.attempt(stage.name, unit.id) as output:
        stage.join(parts, output) if parts else stage.give_up(unit, output)
        marker = journal.commit(stage.name, unit.id, output, inputs=unit.inputs)
    for folder in ("journal", "work"):
        journal.store.remove(f"{folder}/{in_parts.name}")
    return marker


def _run_part(stage: Any, part: Unit, journal: Journal, executor: Executor) -> list[Marker]:
    """Markers of a part: one, or those of its own parts."""
    task = unit_task(stage, journal)
    needs: dict[str, Any] = {"num_cpus": stage.num_cpus, "memory_bytes": stage.memory_bytes}
    (done,) = executor.map_unordered(task, [part], max_kills=MAX_KILLS_OF_PART, **needs)
    if isinstance(done, Exception):
        raise done
    if isinstance(done, Marker):
        return [done]
    if halves := stage.halves(part):
        return [marker for half in halves for marker in _run_part(stage, half, journal, executor)]
    with journal.attempt(stage.name, part.id) as output:
        stage.give_up(part, output)
        return [journal.commit(stage.name, part.id, output)]


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


def failed(error: Exception) -> RunError:
    """What Ray itself reports (workers lost too often, out of memory, import error), for people."""
    return RunError(
        f"a Ray task failed and will not be tried again: {_told(error)}; "
        "finished units are kept, run the same command to go on"
    )


def _told(error: Exception) -> str:
    """The one line of Ray's message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    best = 0 if isinstance(error, ray.exceptions.OutOfMemoryError) else -1
    return lines[best] if lines else type(error).__name__


def _living_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _slots(num_cpus: float) -> int:
    total = float(ray.cluster_resources().get("CPU", 1.0))
    return max(1, int(total / num_cpus)) + 2
