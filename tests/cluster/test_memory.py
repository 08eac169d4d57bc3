"""Ray kills a worker for want of memory: not for ever, and a stage that can be divided goes on without it."""

import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from rich.console import Console

from cluster.errors import RunError
from cluster.executor import Executor, Unit, run_stage
from cluster.journal import Journal, Marker, UnitOutput
from cluster.progress import Progress
from cluster.session import RayConfig, ray_session
from cluster.store import Store

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file by name


@dataclass(frozen=True, kw_only=True)
class Hungry:
    """Runs long enough for Ray to find that memory is short."""

    name: str = "hungry"
    num_cpus: float = 1.0
    memory_bytes: int = 0

    def units(self) -> list[Unit]:
        return [Unit(id="00000")]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        time.sleep(60)


class Divided(Hungry):
    """The same in two parts."""

    def halves(self, unit: Unit) -> list[Unit]:
        return [] if len(unit.id) > 5 else [Unit(id=f"{unit.id}a"), Unit(id=f"{unit.id}b")]

    def join(self, parts: list[Marker], output: UnitOutput) -> None:
        output.path("parts").write_text(" ".join(part.unit for part in parts))

    def give_up(self, unit: Unit, output: UnitOutput) -> None:
        output.path("given-up").write_text(unit.id)


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    """A Ray that finds that every byte is one too many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", "0.01")
        patch.setenv("RAY_memory_monitor_refresh_ms", "50")
        with ray_session(RayConfig(num_cpus=1)) as executor:
            yield executor


@pytest.fixture(autouse=True)
def _few_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.executor.MAX_KILLS", 1)
    monkeypatch.setattr("cluster.executor.MAX_KILLS_OF_PART", 1)


def run(stage: Hungry, journal: Journal, executor: Executor) -> Marker:
    (marker,) = run_stage(stage, journal, executor, Progress(Console(file=io.StringIO()))).values()
    return marker


def test_what_cannot_be_divided_ends_the_run_and_says_why(tmp_path: Path, executor: Executor) -> None:
    with pytest.raises(RunError, match="due to the node running low on memory"):
        run(Hungry(), Journal(Store(str(tmp_path))), executor)


def test_what_can_be_divided_is_done_in_parts_and_given_up_last(tmp_path: Path, executor: Executor) -> None:
    store = Store(str(tmp_path))
    marker = run(Divided(), Journal(store), executor)
    assert store.read_bytes(marker.path_of("parts")) == b"00000a 00000b"
    assert {entry.path for entry in store.find()} == {
        "journal/hungry.json",
        "journal/hungry/00000.json",
        marker.path_of("parts"),
    }
